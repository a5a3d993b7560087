import pytest

from lowmem_dpo.records.folder import read_metrics
from lowmem_dpo.steps.gradients import PER_PAIR
from lowmem_dpo.training.recorder import mean_metrics


def step(number, loss, num_pairs, **others):
    return {**dict.fromkeys(PER_PAIR, loss), "num_pairs": num_pairs, "step": number, **others}


def test_mean_metrics_is_over_pairs_and_the_gradient_norm_over_steps():
    steps = [step(1, 1.0, 8, grad_norm=2.0), step(2, 4.0, 4, grad_norm=5.0)]
    mean = mean_metrics(steps)
    assert mean["loss"] == mean["rewards/margins"] == 2.0
    assert mean["grad_norm"] == 3.5
    assert mean["num_pairs"] == 12 and mean["step"] == 2


def test_mean_metrics_of_full_batches_is_the_mean_of_the_steps_to_the_bit():
    losses = [0.1, 0.7, 0.3]
    assert mean_metrics([step(i, x, 49) for i, x in enumerate(losses)])["loss"] == sum(losses) / 3
    assert mean_metrics([step(1, 0.1, 49)])["loss"] == 0.1


def test_mean_metrics_leaves_out_skipped_steps():
    skipped = {"skipped_steps": 1, "step": 3}
    mean = mean_metrics([step(1, 1.0, 2), step(2, 3.0, 2), skipped])
    assert (mean["loss"], mean["num_pairs"], mean["skipped_steps"]) == (2.0, 4, 1)
    assert mean_metrics([skipped]) == skipped


@pytest.mark.parametrize("litter", [b'{"step": 10, "lo', b"[]", b"{}", b"\xff", b'{"step": "x"}'])
def test_read_metrics_leaves_out_what_is_no_line(tmp_path, litter):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    path.write_bytes(b'{"step": 1}\n' + litter + b'\n{"step": 2}\n')
    assert [row["step"] for row in read_metrics(path)] == [1, 2]

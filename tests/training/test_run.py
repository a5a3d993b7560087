import time
from types import SimpleNamespace

import pytest
import torch

from lowmem_dpo.cli import main
from lowmem_dpo.losses.objective import Objective
from lowmem_dpo.machine.device import matmul_rate
from lowmem_dpo.memory.levers import Levers
from lowmem_dpo.settings.configs import TrainConfig
from lowmem_dpo.training import run
from lowmem_dpo.training.memory_plan import MemoryPlan, wanted_pack_tokens
from lowmem_dpo.training.pairs import Pairs
from lowmem_dpo.training.run import Batches, forward_tokens, warn_of_short_run
from lowmem_dpo.weights import size
from tests.packs.folding import fold

PAIRS = [
    fold(0, (1,) * 50, (2,) * 25, (3,) * 25, 50, 50),
    fold(1, (1,) * 60, (2,) * 20, (3,) * 20, 60, 60),
]


def tokens(evaluation=(), only_reference=False, **settings) -> int:
    config = TrainConfig(**{"batch_size": 1, **settings})
    pairs = Pairs(PAIRS, list(evaluation), "", {})
    batches = Batches.of(config, len(PAIRS))
    return forward_tokens(pairs, batches, Objective.of(config), trains=not only_reference)


def test_forward_tokens_counts_the_reference_once_and_three_passes_a_step():
    assert tokens() == 200 + 3 * 200
    assert tokens(num_train_epochs=2) == 200 + 3 * 400
    assert tokens(max_steps=1) == 100 + 3 * 100  # of pairs that no step takes no reference
    assert tokens(PAIRS[:1], max_steps=1) == 200 + 3 * 100
    assert tokens(reference_free=True) == 3 * 200
    assert tokens(loss_type="simpo") == 3 * 200
    assert tokens(loss_type="aot", batch_size=2) == 200 + 4 * 200
    assert tokens(PAIRS[:1]) == 300 + 3 * 200
    assert tokens(PAIRS[:1], only_reference=True) == 300


@pytest.mark.parametrize("shuffle", [True, False])
def test_used_pairs_are_those_of_the_steps_in_their_order(shuffle):
    few, all_of_them = (
        Batches.of(TrainConfig(batch_size=3, max_steps=n, shuffle=shuffle), 11) for n in (2, 9)
    )
    assert few.used() == [i for batch in few.from_step(0) for i in batch] and len(few.used()) == 6
    assert sorted(all_of_them.used()) == list(range(11))
    assert all_of_them.used()[:6] == few.used()


def test_self_check_takes_the_shortest_and_the_longest_pair(monkeypatch):
    lengths = [5, 3, 9, 4]
    trees = [fold(n, (1,) * n, (2,) * n, (3,) * n, n, n) for n in lengths]
    taken = []
    monkeypatch.setattr(run, "check_packing", lambda model, pack, ids: taken.append(pack) or 0.0)
    assert run.self_check(SimpleNamespace(model=None), trees) == 0.0
    assert sorted(tree.row for tree in taken[0].trees) == [3, 9]


def test_matmul_rate_counts_the_products_of_the_time_measured(monkeypatch):
    clock = iter([0.0, 0.1, 0.2, 0.4, 0.4])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    assert matmul_rate(torch.float32) == 2 * (2 * 256 * 2048 * 2048) / 0.4


@pytest.fixture
def large(monkeypatch):
    """Let the tiny model count as large, and weights be out of reach."""
    monkeypatch.setattr(size, "LARGE_FOR_A_CPU", 1000)

    def read(*args, **kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr("lowmem_dpo.training.fit.load_policy", read)


@pytest.mark.parametrize("verb", ["train", "precompute"])
def test_a_large_model_asks_for_the_cpu_by_name(
    large, verb, llama_dir, pairs_file, tmp_path, capsys
):
    words = ["--model", str(llama_dir), "--data", str(pairs_file())]
    assert main([verb, *words, "--output_dir", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "name it: --device cpu" in error and error.count("\n") == 1
    assert "takes at least" in error and "GFLOP/s" in error
    assert not (tmp_path / "out" / "config.yaml").exists()


def test_a_large_model_goes_on_where_the_cpu_is_named(
    large, llama_dir, pairs_file, tmp_path, capsys
):
    words = ["--model", str(llama_dir), "--data", str(pairs_file()), "--device", "cpu"]
    with pytest.raises(AssertionError, match="weights were read"):
        main(["train", *words, "--output_dir", str(tmp_path / "out")])
    assert "takes at least" in capsys.readouterr().out


def test_a_small_model_is_trained_without_a_word(llama_dir, pairs_file, tmp_path, capsys):
    words = ["--model", str(llama_dir), "--data", str(pairs_file())]
    assert main(["train", *words, "--output_dir", str(tmp_path / "out"), "--max_steps", "1"]) == 0
    assert "takes at least" not in capsys.readouterr().out


EVALUATED = {"eval_fraction": 0.1}
PATIENT = {**EVALUATED, "eval_steps": 2, "early_stopping_patience": 4}


@pytest.fixture
def no_run_is_short(monkeypatch) -> None:
    monkeypatch.setattr(run, "FEW_STEPS", 0)


def said(capsys, **settings) -> str:
    config = TrainConfig(batch_size=1, **settings)
    warn_of_short_run(config, config.max_steps, config.warmup_steps, Batches.of(config, 10))
    printed = capsys.readouterr()
    return " ".join((printed.out + printed.err).split())


@pytest.mark.usefixtures("no_run_is_short")
@pytest.mark.parametrize(
    ("settings", "change", "line"),
    [
        ({"logging_steps": 11}, {"logging_steps": 10}, "logging_steps 11 is more than the run's"),
        ({"eval_steps": 11, **EVALUATED}, {"eval_steps": 10}, "evaluated at the last step only"),
        (
            {"save_strategy": "steps", "save_steps": 11},
            {"save_steps": 10},
            "the only checkpoint is that of the last step",
        ),
        ({"warmup_steps": 10}, {"warmup_steps": 9}, "steps, 9 are used; lower it"),
        (PATIENT, {"early_stopping_patience": 3}, "cannot stop a run of 5 evaluations"),
        (PATIENT, {"eval_steps": 1}, "early_stopping_patience 4 cannot"),
    ],
)
def test_warn_of_short_run_names_what_the_run_is_too_short_for(capsys, settings, change, line):
    warning = said(capsys, **settings)
    assert line in warning and warning.count("warning") == 1
    assert said(capsys, **(settings | change)) == ""


@pytest.mark.usefixtures("no_run_is_short")
def test_warn_of_short_run_is_silent_about_the_defaults(capsys):
    assert said(capsys) == ""


def test_warn_of_short_run_counts_the_steps_of_a_run_that_hardly_moves(capsys):
    assert "only 10 steps: 10 pairs in batches of 1; for more, lower batch_size" in said(capsys)
    assert "only 2 steps: max_steps is 2; for more, raise it" in said(capsys, max_steps=2)
    assert said(capsys, num_train_epochs=2) == ""


@pytest.mark.parametrize(
    ("epochs", "steps"), [(1.1, 110), (1.101, 111), (0.07, 7), (2.0, 200), (0.001, 1)]
)
def test_batches_take_no_step_for_rounding(epochs, steps):
    config = TrainConfig(batch_size=4, num_train_epochs=epochs)
    assert Batches.of(config, 400).num_steps == steps


@pytest.mark.parametrize(
    "device, wanted, expected", [("cpu", 200, 200), ("cuda", 200, 256), ("cuda", 256, 256)]
)
def test_pack_tokens_that_are_given_are_rounded_up_on_a_card(device, wanted, expected, capsys):
    assert wanted_pack_tokens(wanted, PAIRS, torch.device(device)) == expected
    said = f"pack_tokens {wanted}: {expected}, on a card it is a multiple of 128"
    assert (said in capsys.readouterr().out) == (wanted != expected)


@pytest.mark.parametrize("device, expected", [("cpu", 192), ("cuda", 256)])
def test_packs_of_a_card_are_multiples_of_128(device, expected):
    policy = SimpleNamespace(
        model=SimpleNamespace(device=torch.device(device)), fingerprint=lambda n: {}
    )
    cache, memory = SimpleNamespace(pack_tokens=lambda *_: None), MemoryPlan(Levers())
    trees = [fold(0, (1,) * 60, (2,) * 40, (3,) * 40, 60, 60)]
    assert run.plan_pack_tokens(trees, policy, cache, memory, batch_size=1, seed=0) == expected

import errno
import gc
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lowmem_dpo.linears.lora import linear_layers, lora_parameters
from lowmem_dpo.linears.nf4 import Nf4Weight
from lowmem_dpo.reference import fill
from lowmem_dpo.reference.cache import ReferenceCache
from lowmem_dpo.settings.configs import TrainConfig
from lowmem_dpo.stopping import RunStopped
from lowmem_dpo.trainer import Trainer
from lowmem_dpo.training import fit, policy
from lowmem_dpo.training import run as preparation
from lowmem_dpo.training.fit import prepare
from lowmem_dpo.training.policy import Policy
from tests.tiny import save_tiny_model
from tests.training.conftest import environment

pytestmark = pytest.mark.usefixtures("without_plots")


@pytest.fixture
def config(llama_dir, pairs_file, tmp_path) -> TrainConfig:
    return TrainConfig(
        model=str(llama_dir),
        data=str(pairs_file(13)),
        output_dir=str(tmp_path / "out"),
        batch_size=4,
        lora_r=4,
        learning_rate=1e-3,
    )


@pytest.fixture
def forwards(monkeypatch) -> list[bool]:
    """One entry per forward of a backbone: whether a gradient will follow."""
    calls: list[bool] = []
    load_policy = fit.load_policy

    def load(*arguments, **options):
        policy = load_policy(*arguments, **options)
        policy.model.backbone.register_forward_hook(
            lambda *_: calls.append(torch.is_grad_enabled())
        )
        return policy

    monkeypatch.setattr(fit, "load_policy", load)
    return calls


def test_warm_cache_leaves_training_steps_without_a_reference_forward(config, forwards, tmp_path):
    prepare(config)
    forwards.clear()
    trainer = Trainer(config)
    at_step = []
    trainer.add_step_callback(lambda result: at_step.append(list(forwards)))
    trainer.fit()
    num_packs = sum(forwards)  # every forward with a gradient is a micro-batch of the policy
    before_training = forwards.index(True)
    assert num_packs == len(at_step) == 4  # these pairs fit into one micro-batch a step
    assert forwards[before_training:] == [True] * num_packs
    assert before_training == 1 + 4 + 1  # self-check: packed and 4 plain; a sample of the cache


def objects_of(kind: type) -> dict[int, Any]:
    """Everything of a type that the process holds, by its id."""
    return {id(thing): thing for thing in gc.get_objects() if isinstance(thing, kind)}


def test_process_holds_the_base_weights_once(config):
    # Other tests' objects, which may not be collected yet; held, so that no id is given out again.
    others = objects_of(Nf4Weight) | objects_of(torch.Tensor)
    trainer = Trainer(config)
    trainer.fit()
    gc.collect()
    model = trainer.policy.model
    weights = objects_of(Nf4Weight).keys() - others.keys()
    assert len(weights) == len(linear_layers(model.network)) == 14
    tensors = [t for key, t in objects_of(torch.Tensor).items() if key not in others]
    tables = {t.data_ptr() for t in tensors if t.shape == model.head_weight.shape}
    assert len(tables) == 2  # embedding and head


def test_cache_serves_another_beta_loss_rate_seed_and_adapter_start(config, capsys):
    prepare(config)
    capsys.readouterr()
    for change in ({"beta": 0.7}, {"loss_type": "ipo"}, {"learning_rate": 1e-5}, {"seed": 1}):
        run = prepare(replace(config, **change))
        assert run.reference.num_scored == 0
        assert run.reference.recheck_rms == 0.0


def test_edited_data_file_costs_only_the_changed_pairs(config):
    prepare(config)
    path = Path(config.data)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[3]["chosen"] += " and more"
    rows.append({"prompt": "new", "chosen": "a", "rejected": "b"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert prepare(config).reference.num_scored == 2


def test_interrupted_pass_goes_on_where_it_stopped(config, monkeypatch):
    monkeypatch.setattr(fill, "SECONDS_PER_SHARD", 0.0)
    config = replace(config, pack_tokens=128)
    calls = []
    score = preparation.score

    def failing(parts, pack):
        calls.append(len(pack.trees))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return score(parts, pack)

    monkeypatch.setattr(preparation, "score", failing)
    with pytest.raises(KeyboardInterrupt):
        prepare(config)
    monkeypatch.setattr(preparation, "score", score)
    assert prepare(config).reference.num_scored == 13 - sum(calls[:2])


def test_reference_equals_the_policy_at_step_zero_in_any_order_to_the_bit(config):
    for seed in (1, 2, 3):
        run = Trainer(replace(config, seed=seed, output_dir=f"{config.output_dir}{seed}"))
        metrics = []
        run.add_step_callback(lambda result, m=metrics: m.append(result.metrics))
        run.fit()
        assert metrics[0]["rewards/margins"] == 0.0 and metrics[0]["rewards/chosen"] == 0.0
        assert metrics[-1]["rewards/margins"] != 0.0


@pytest.mark.parametrize(
    "family",
    ["mistral-window", "gemma2", "gemma3", "phi3", "granite", "olmo2", "cohere", "cohere2"],
)
def test_reference_equals_the_policy_at_step_zero_in_every_family(config, tmp_path, family):
    model = save_tiny_model(tmp_path / "model", family)
    result = Trainer(replace(config, model=str(model), max_steps=3)).fit()
    record = json.loads((result.output_dir / "run.json").read_text())
    assert record["step_zero"]["exact"]
    assert record["self_check_rms"] < 1e-5
    assert result.metrics["rewards/margins"] != 0.0


def test_reference_of_a_run_from_an_adapter_is_the_base_with_it(config, tmp_path):
    first = Trainer(replace(config, learning_rate=1e-2, num_train_epochs=3)).fit()
    start = str(first.output_dir / "adapter")
    second = replace(config, init_adapter=start, output_dir=str(tmp_path / "second"))
    run = prepare(second)
    assert run.reference.num_scored == 13  # the base's numbers are not these
    bare = prepare(config)
    key = run.pairs.train[0].digest
    assert not torch.allclose(run.reference.logps[key], bare.reference.logps[key], atol=1e-3)
    result = Trainer(second).fit()
    record = json.loads((result.output_dir / "run.json").read_text())
    assert record["step_zero"]["exact"]


def test_model_may_be_an_adapter_folder(config, tmp_path, capsys):
    first = Trainer(replace(config, learning_rate=1e-2)).fit()
    second = replace(config, model=str(first.output_dir / "best"), output_dir=str(tmp_path / "b"))
    run = prepare(second)
    assert "is an adapter: starting from it" in capsys.readouterr().out
    assert any(p.any() for n, p in lora_parameters(run.policy.model.network).items() if "_b" in n)


def tamper(config, amount: float) -> None:
    """Shift the cached numbers of every pair, under valid digests."""
    run = prepare(config)
    cache = ReferenceCache(Path(os.environ["LOWMEM_DPO_CACHE"]), run.policy.identity)
    for path in cache.directory.glob("*.safetensors"):
        path.unlink()
    shifted = {key: logps + amount for key, logps in run.reference.logps.items()}
    cache.write(shifted, run.policy.fingerprint(run.pack_tokens))


def test_numbers_that_do_not_belong_to_the_model_stop_the_run(config):
    tamper(config, 0.5)
    with pytest.raises(RunStopped, match="do not belong to this model"):
        prepare(config)


def test_numbers_within_rounding_are_used_with_a_warning(config, capsys):
    tamper(config, 1e-5)
    Trainer(config).fit()
    printed = capsys.readouterr().out
    assert "not exactly" in printed and "step zero is not exact" in printed


def other_numerics(monkeypatch) -> None:
    fingerprint = Policy.fingerprint
    monkeypatch.setattr(
        Policy, "fingerprint", lambda self, n: {**fingerprint(self, n), "torch": "9.9"}
    )


def test_another_fingerprint_says_what_differs_and_scores_again(config, monkeypatch, capsys):
    prepare(config)
    other_numerics(monkeypatch)
    capsys.readouterr()
    assert prepare(config).reference.num_scored == 13
    printed = capsys.readouterr().out
    assert "scored again" in printed and "-> 9.9" in printed


def test_reference_accept_keeps_the_numbers(config, monkeypatch, capsys):
    prepare(config)
    other_numerics(monkeypatch)
    run = prepare(replace(config, reference="accept"))
    assert run.reference.num_scored == 0 and not run.reference.same_fingerprint
    assert "kept" in capsys.readouterr().out


def test_another_attention_path_is_another_fingerprint(config, monkeypatch):
    assert prepare(config).reference.same_fingerprint
    monkeypatch.setattr(policy, "attention_path", lambda *arguments: "lowmem_dpo_tree, triton")
    run = prepare(replace(config, reference="accept"))
    assert run.reference.num_scored == 0 and not run.reference.same_fingerprint


def test_cached_micro_batch_size_is_used_again(config):
    first = prepare(replace(config, pack_tokens=448))
    assert first.reference.num_scored == 13
    again = prepare(config)
    assert again.pack_tokens == 448 and again.reference.num_scored == 0


@pytest.mark.parametrize("loss_type", ["simpo", ["simpo", "sft"]], ids=str)
def test_losses_without_a_reference_score_nothing_and_say_so(config, forwards, capsys, loss_type):
    settings = {"loss_type": loss_type, "beta": 2.0}
    result = Trainer(replace(config, **settings)).fit()
    assert f"loss {loss_type}: without a reference" in capsys.readouterr().out
    assert forwards.count(False) == 5  # the self-check
    assert json.loads((result.output_dir / "run.json").read_text())["step_zero"] is None
    assert not (Path(os.environ["LOWMEM_DPO_CACHE"]) / "reference").exists()
    with pytest.raises(ValueError, match="precompute has nothing to do: loss_type"):
        Trainer(replace(config, **settings)).precompute()


def test_run_says_once_what_is_unusual_and_what_the_loss_costs(config, capsys):
    Trainer(replace(config, loss_type="aot", beta=3.0, learning_rate=0.5)).fit()
    printed = capsys.readouterr().out
    assert printed.count("warning: beta 3 is outside 0.01 to 0.5, usual for aot\n") == 1
    assert printed.count("warning: learning_rate 0.5 is outside 1e-06 to 5e-05") == 1
    assert printed.count("one more forward pass a step") == 1


def test_reference_free_scores_nothing_and_warns(config, forwards, capsys):
    result = Trainer(replace(config, reference_free=True)).fit()
    assert "less stable" in capsys.readouterr().out
    assert forwards.count(False) == 5  # the self-check
    assert json.loads((result.output_dir / "run.json").read_text())["step_zero"] is None
    assert not (Path(os.environ["LOWMEM_DPO_CACHE"]) / "reference").exists()


def every_shard_fails(monkeypatch, times: int) -> list[int]:
    """Let the first writes of a shard meet a full disk; returns the sizes that were tried."""
    write, tried = ReferenceCache.write, []

    def full(self, logps, fingerprint):
        tried.append(len(logps))
        if len(tried) <= times:
            raise OSError(errno.ENOSPC, "No space left on device", "x")
        write(self, logps, fingerprint)

    monkeypatch.setattr(ReferenceCache, "write", full)
    monkeypatch.setattr(fill, "SECONDS_PER_SHARD", -1.0)
    return tried


def test_a_full_disk_is_said_once_and_training_goes_on_in_memory(config, monkeypatch, capsys):
    tried = every_shard_fails(monkeypatch, 99)
    config = replace(config, pack_tokens=128)
    result = Trainer(config).fit()
    assert len(tried) > 2 and tried[-1] == 13  # each time all that is not written yet
    printed = capsys.readouterr().out
    assert printed.count("cannot write the reference cache") == 1
    assert "No space left on device" in printed
    record = json.loads((result.output_dir / "run.json").read_text())
    assert record["step_zero"]["exact"] and record["finished"]


def test_a_disk_with_room_again_gets_all_that_was_scored(config, monkeypatch):
    every_shard_fails(monkeypatch, 2)
    config = replace(config, pack_tokens=128)
    assert prepare(config).reference.cache_error is None
    assert prepare(config).reference.num_scored == 0


def test_precompute_fails_if_the_cache_cannot_take_it(config, monkeypatch):
    every_shard_fails(monkeypatch, 99)
    with pytest.raises(OSError, match="No space left"):
        Trainer(config).precompute()


def test_a_cache_folder_that_cannot_be_made_does_not_stop_training(config, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    Trainer(replace(config, cache_dir=str(tmp_path / "file" / "cache"))).fit()
    assert "cannot write the reference cache" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_pass_after_its_micro_batch_and_keeps_what_was_scored(
    config, monkeypatch, number, capfd
):
    config = replace(config, pack_tokens=128)
    score, scored = preparation.score, []

    def interrupted(parts, pack):
        result = score(parts, pack)
        scored.append(len(pack.trees))
        if len(scored) == 2:
            os.kill(os.getpid(), number)
        return result

    monkeypatch.setattr(preparation, "score", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(config)
    assert len(scored) == 2 and "finishing this step" in capfd.readouterr().err
    monkeypatch.setattr(preparation, "score", score)
    assert prepare(config).reference.num_scored == 13 - sum(scored)


def test_a_reference_that_is_not_finite_names_its_row_and_is_not_cached(config, monkeypatch):
    score = preparation.score

    def poisoned(parts, pack):
        logps = score(parts, pack)
        start = 0
        for tree, counts in zip(pack.trees, pack.counts, strict=True):
            if tree.row == 7:
                logps[start] = torch.nan
            start += sum(counts)
        return logps

    monkeypatch.setattr(preparation, "score", poisoned)
    with pytest.raises(RunStopped, match="reference log-probs of data row 7 are not finite"):
        prepare(config)
    monkeypatch.setattr(preparation, "score", score)
    assert prepare(config).reference.num_scored == 13


SHARING = """
import sys
from lowmem_dpo.reference import fill
from lowmem_dpo.cli import main
fill.SECONDS_PER_SHARD = -1.0
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_two_runs_that_share_a_damaged_cache_do_no_harm(config, tmp_path):
    config = replace(config, pack_tokens=128)
    run = prepare(config)
    cache = ReferenceCache(Path(os.environ["LOWMEM_DPO_CACHE"]), run.policy.identity)
    (shard,) = cache.directory.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-3])
    words = [sys.executable, "-c", SHARING, "precompute", "--model", str(config.model)]
    words += ["--data", str(config.data), "--pack_tokens", "128", "--lora_r", "4"]
    both = [
        subprocess.Popen(words, env=environment(), stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    printed = [process.communicate(timeout=240)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], printed
    again = prepare(config)
    assert again.reference.num_scored == 0
    for digest, logps in run.reference.logps.items():
        assert torch.equal(again.reference.logps[digest], logps)

import time
from typing import Any

import pytest
import torch

from lowmem_dpo.cli import main
from lowmem_dpo.losses.objective import Objective
from lowmem_dpo.machine.device import matmul_rate
from lowmem_dpo.settings.configs import TrainConfig
from lowmem_dpo.training import run
from lowmem_dpo.training.run import (
    Batches,
    Pairs,
    forward_tokens,
    plan_pack_tokens,
    warn_of_short_run,
)
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
    assert tokens(max_steps=1) == 200 + 3 * 100
    assert tokens(reference_free=True) == 3 * 200
    assert tokens(loss_type="simpo") == 3 * 200
    assert tokens(loss_type="aot", batch_size=2) == 200 + 4 * 200
    assert tokens(PAIRS[:1]) == 300 + 3 * 200
    assert tokens(PAIRS[:1], only_reference=True) == 300


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


def test_generate_with_a_large_model_only_says_that_it_is_slow(monkeypatch, llama_dir, capsys):
    monkeypatch.setattr(size, "LARGE_FOR_A_CPU", 1000)
    words = ["--model", str(llama_dir), "--prompt", "hello", "--max_new_tokens", "2"]
    assert main(["generate", *words]) == 0
    assert "on a CPU: an answer takes minutes" in capsys.readouterr().out


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


def test_warmup_settings_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match=r"warmup_ratio=0\.2 has no effect with warmup_steps=5"):
        TrainConfig(warmup_steps=5, warmup_ratio=0.2)
    with pytest.raises(ValueError, match="warmup_steps=5 has no effect with lr_scheduler_type"):
        TrainConfig(warmup_steps=5, lr_scheduler_type="constant")


def test_plan_pack_tokens_takes_no_more_than_a_step_can_fill(capsys):
    def planned(wanted: int) -> int:
        policy: Any = None  # nothing is asked of it, nor of the cache
        return plan_pack_tokens(PAIRS, policy, policy, batch_size=2, seed=0, wanted=wanted)

    assert planned(128) == 128 and capsys.readouterr().out == ""
    assert planned(2**24) == 256
    assert f"pack_tokens {2**24}: 256 are taken" in capsys.readouterr().out

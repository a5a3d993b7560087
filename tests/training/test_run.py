import time

import pytest
import torch

from lowmem_dpo.cli import main
from lowmem_dpo.losses.objective import Objective
from lowmem_dpo.machine.rate import matmul_rate
from lowmem_dpo.settings.configs import TrainConfig
from lowmem_dpo.training.run import Pairs, forward_tokens
from lowmem_dpo.training.steps import Batches
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

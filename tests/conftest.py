"""What every room's tests share; torch is imported only by the tests and fixtures that need it."""

import ctypes
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import FAMILIES, SIZES, save_tiny_model

# What libraries read once, when they are imported. The suite runs on every core: threads inside a
# test would only fight for them.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"


def has_usable_card() -> bool:
    """Whether torch can use a card; without NVIDIA's driver that is known without torch."""
    try:
        ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return False
    import torch

    return torch.cuda.is_available()


HAS_CARD = has_usable_card()

# `device auto` refuses the CPU beside a card that is not ready; hiding it is the wish for the CPU.
if not HAS_CARD:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not HAS_CARD:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWMEM_DPO_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing plots takes longer than training a tiny model."""
    monkeypatch.setattr("lowmem_dpo.training.recorder.draw_plots", lambda *paths: [])


@pytest.fixture
def tiny_checkpoint(tmp_path: Path) -> Callable[..., tuple[Path, Any]]:
    """Write a small random checkpoint as transformers does; gives its folder and the model."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    def write(family="llama", *, name="base", dtype=torch.float32, shards=False, **changes):
        config = AutoConfig.for_model(**SIZES | {"vocab_size": 96} | FAMILIES[family] | changes)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if "norm" in parameter_name or parameter_name.endswith("bias"):
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(tmp_path / name, **({"max_shard_size": "20KB"} if shards else {}))
        return tmp_path / name, model

    return write


def random_pairs(num_pairs: int, seed: int = 0) -> list[dict[str, str]]:
    rng = random.Random(seed)

    def text(low: int, high: int) -> str:
        return "".join(rng.choice("abcdefgh ") for _ in range(rng.randint(low, high)))

    rows = []
    for i in range(num_pairs):
        opening = text(0, 8)
        rows.append(
            {
                "prompt": f"{i} {text(3, 25)}",
                "chosen": f"{opening}y{text(1, 20)}",
                "rejected": f"{opening}n{text(1, 30)}",
            }
        )
    return rows


@pytest.fixture
def pairs_file(tmp_path: Path) -> Callable[..., Path]:
    def write(num_pairs: int = 12, seed: int = 0, name: str = "pairs.jsonl") -> Path:
        path = tmp_path / name
        rows = random_pairs(num_pairs, seed)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write

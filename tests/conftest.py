import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.tiny import save_tiny_model

# The suite runs on every core; threads inside a test would only fight for them.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

# `device auto` refuses the CPU beside a card that is not ready; hiding it is the wish for the CPU.
if not torch.cuda.is_available():
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWMEM_DPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("llama"))


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

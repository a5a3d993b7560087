"""Checkpoints: everything a run needs to go on as if nothing had happened.

A checkpoint is a folder `checkpoints/step-000200/` with the adapter in PEFT's format (so it can be
used by itself), the optimizer's tensors, the generators' states and a JSON record of the rest. It
is written under a temporary name and renamed when whole, so a folder with a checkpoint's name is
always a checkpoint. Nothing is pickled.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

STATE_FILE = "trainer_state.json"
TENSOR_FILE = "trainer_state.safetensors"
SCHEMA_VERSION = 1


@dataclass
class TrainingState:
    """The moving parts of a run beside the adapter.

    Attributes:
        step: Optimizer steps done.
        num_tokens: Tokens seen.
        best_eval_loss: Lowest evaluation loss so far.
        unlogged: Metrics of the steps since the last logged line.
    """

    optimizer: torch.optim.Optimizer
    schedule: LRScheduler
    scaler: torch.amp.GradScaler
    step: int = 0
    num_tokens: int = 0
    best_eval_loss: float | None = None
    unlogged: list[dict[str, float]] = field(default_factory=list)


def save_checkpoint(
    directory: Path,
    state: TrainingState,
    save_adapter: Callable[[Path], None],
    facts: dict[str, Any],
) -> Path:
    """Write `directory/step-NNNNNN`.

    Args:
        directory: The run's folder of checkpoints.
        state: What to save.
        save_adapter: Writes the adapter into a folder.
        facts: What a resumed run must agree with (settings, digests); JSON values.

    Returns:
        The checkpoint's folder.
    """
    target = directory / f"step-{state.step:06d}"
    temporary = directory / f".{target.name}.part"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_adapter(temporary)
    tensors = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    optimizer = _take_tensors(state.optimizer.state_dict(), "optimizer", tensors)
    save_file(tensors, temporary / TENSOR_FILE)
    record = {
        "schema_version": SCHEMA_VERSION,
        "step": state.step,
        "num_tokens": state.num_tokens,
        "best_eval_loss": state.best_eval_loss,
        "unlogged": state.unlogged,
        "optimizer": optimizer,
        "schedule": _plain(state.schedule.state_dict()),
        "scaler": state.scaler.state_dict(),
        "facts": facts,
    }
    (temporary / STATE_FILE).write_text(json.dumps(record, indent=1), encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    os.replace(temporary, target)
    return target


def load_checkpoint(directory: Path, state: TrainingState) -> None:
    """Restore `state` and the random generators from a checkpoint; the adapter is loaded apart.

    Raises:
        ValueError: If the folder holds no checkpoint of ours.
    """
    record = read_record(directory)
    tensors = load_file(directory / TENSOR_FILE)
    state.optimizer.load_state_dict(_put_tensors(record["optimizer"], tensors))
    state.schedule.load_state_dict(record["schedule"])
    state.scaler.load_state_dict(record["scaler"])
    state.step, state.num_tokens = record["step"], record["num_tokens"]
    state.best_eval_loss, state.unlogged = record["best_eval_loss"], record["unlogged"]
    torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random.cuda"])


def read_record(directory: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint.

    Raises:
        ValueError: If the folder holds no checkpoint of ours.
    """
    try:
        return json.loads((directory / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{directory} is not a checkpoint that can be resumed: {error}") from None


def list_checkpoints(directory: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted(path for path in directory.glob("step-*") if (path / STATE_FILE).exists())


def prune_checkpoints(directory: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints."""
    for path in list_checkpoints(directory)[:-keep]:
        shutil.rmtree(path)


def replace_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Write a folder under a temporary name, then put it in `target`'s place."""
    temporary = target.with_name(f".{target.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write(temporary)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(temporary, target)


def _take_tensors(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Copy a nested state to JSON values; its tensors go to `tensors`, their names stay."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().clone()
        return {"tensor": name}
    if isinstance(value, dict):
        return {
            str(key): _take_tensors(item, f"{name}.{key}", tensors) for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_take_tensors(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]
    return value


def _put_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The reverse of `_take_tensors`; keys that are numbers become integers again."""
    if isinstance(value, dict):
        if value.keys() == {"tensor"}:
            return tensors[value["tensor"]]
        return {
            int(key) if key.isdigit() else key: _put_tensors(item, tensors)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [_put_tensors(item, tensors) for item in value]
    return value


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    """A schedule's state without what cannot be written as JSON (its lambdas hold no state)."""
    return {key: value for key, value in state.items() if key != "lr_lambdas"} | {
        "lr_lambdas": [None]
    }

"""Checkpoints: everything a run needs to go on as if nothing had happened.

A checkpoint is a folder `checkpoints/step-000200/` with the adapter in PEFT's format (so it can be
used by itself), the optimizer's tensors, the generators' states and a JSON record of the rest. It
is written under a temporary name and renamed when whole, so a folder with a checkpoint's name is
always a checkpoint. Its SHA256SUMS (what `sha256sum --check` reads) tells a damaged one: no run
goes on from it, and no older one is deleted in its favour. Nothing is pickled.

A run that goes back to an older checkpoint renames the later ones `step-000200.ahead-of-000100`:
they are another future's, good or damaged, and go once this one has a checkpoint of its own.
"""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from lowmem_dpo.console import warn
from lowmem_dpo.files import move, remove_folder, replace_file, replace_folder

STATE_FILE = "trainer_state.json"
TENSOR_FILE = "trainer_state.safetensors"
SUMS_FILE = "SHA256SUMS"
SCHEMA_VERSION = 4

_NAME = re.compile(r"step-[0-9]+")
_SET_ASIDE = re.compile(r"step-[0-9]+\.ahead-of-([0-9]+)")


@dataclass
class TrainingState:
    """The moving parts of a run beside the adapter.

    Attributes:
        optimizer: Over the adapter's parameters.
        lr_scheduler: Of its learning rate.
        scaler: Loss scaling, live in float16 only.
        device: Whose random state counts.
        step: Optimizer steps done.
        num_tokens: Tokens seen.
        best_eval_loss: Lowest evaluation loss so far.
        eval_loss_to_beat: Evaluation loss at the last improvement that early stopping counted.
        num_evaluations_without_improvement: In a row, to the last one.
        num_skipped_in_a_row: Steps skipped for a loss or gradient that is not finite, to the last.
        unlogged: Metrics of the steps since the last logged line.
        last_metrics: Of the last step that was not skipped.
        eval_metrics: Of the last evaluation, with its step.
    """

    optimizer: torch.optim.Optimizer
    lr_scheduler: LRScheduler
    scaler: torch.amp.GradScaler
    device: torch.device
    step: int = 0
    num_tokens: int = 0
    best_eval_loss: float | None = None
    eval_loss_to_beat: float | None = None
    num_evaluations_without_improvement: int = 0
    num_skipped_in_a_row: int = 0
    unlogged: list[dict[str, float]] = field(default_factory=list)
    last_metrics: dict[str, float] = field(default_factory=dict)
    eval_metrics: dict[str, float] = field(default_factory=dict)


PLAIN = (
    "step",
    "num_tokens",
    "best_eval_loss",
    "eval_loss_to_beat",
    "num_evaluations_without_improvement",
    "num_skipped_in_a_row",
    "unlogged",
    "last_metrics",
    "eval_metrics",
)


def save_checkpoint(
    directory: Path,
    state: TrainingState,
    save_adapter: Callable[[Path], None],
    facts: dict[str, Any],
) -> None:
    """Write `directory/step-NNNNNN`.

    Args:
        directory: The run's folder of checkpoints.
        state: What to save.
        save_adapter: Writes the adapter into a folder.
        facts: What a resumed run must agree with (settings, digests); JSON values.
    """

    def write(folder: Path) -> None:
        save_adapter(folder)
        tensors = {"random.cpu": torch.get_rng_state()}
        if state.device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(state.device)
        record = {
            "schema_version": SCHEMA_VERSION,
            **{name: getattr(state, name) for name in PLAIN},
            "optimizer": _take_tensors(state.optimizer.state_dict(), "optimizer", tensors),
            "schedule": _plain(state.lr_scheduler.state_dict()),
            "scaler": state.scaler.state_dict(),
            "facts": facts,
        }
        replace_file(folder / TENSOR_FILE, save(tensors))
        replace_file(folder / STATE_FILE, json.dumps(record, indent=1, allow_nan=False).encode())
        replace_file(folder / SUMS_FILE, _digests(folder).encode())

    replace_folder(directory / f"step-{state.step:06d}", write)


def load_checkpoint(directory: Path, state: TrainingState) -> None:
    """Restore `state` and the random generators from a checkpoint; the adapter is loaded apart.

    Raises:
        ValueError: If the folder holds no whole checkpoint of ours.
    """
    record = read_record(directory)
    try:
        tensors = load((directory / TENSOR_FILE).read_bytes())
        state.optimizer.load_state_dict(_put_tensors(record["optimizer"], tensors))
        page_state(state.optimizer)
        state.lr_scheduler.load_state_dict(record["schedule"])
        state.scaler.load_state_dict(record["scaler"])
        for name in PLAIN:
            setattr(state, name, record[name])
        torch.set_rng_state(tensors["random.cpu"])
        if state.device.type == "cuda" and "random.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random.cuda"], state.device)
    except (OSError, KeyError, SafetensorError) as error:
        raise _damaged(directory, error) from None


def page_state(optimizer: torch.optim.Optimizer) -> None:
    """Put a paged optimizer's moments, loaded from a checkpoint, into paged memory again.

    bitsandbytes loads them into plain device memory, where they would stay.
    """
    if not getattr(optimizer, "is_paged", False):
        return
    new_buffer = optimizer.get_state_buffer  # type: ignore[attr-defined]
    for parameter, state in optimizer.state.items():
        for name in ("state1", "state2"):
            loaded = state[name]
            paged = new_buffer(parameter, dtype=loaded.dtype)
            if parameter.device.type == "cuda":
                torch.cuda.synchronize(parameter.device)  # the buffer is zeroed asynchronously
            state[name] = paged.copy_(loaded)


def read_record(directory: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint.

    Raises:
        ValueError: If the folder holds no checkpoint of ours.
    """
    try:
        record = json.loads((directory / STATE_FILE).read_text(encoding="utf-8"))
        if record["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"{directory} was written by another version; start afresh")
        record["facts"], record["step"]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise _damaged(directory, error) from None
    return record


def check_undamaged(directory: Path) -> None:
    """Refuse a checkpoint that is not what was written.

    Raises:
        ValueError: Naming the file, and an older checkpoint that is good.
    """
    if damage := find_damage(directory):
        raise _damaged(directory, damage)


def _damaged(directory: Path, why: Exception | str) -> ValueError:
    siblings = list_checkpoints(directory.parent)
    older = siblings[: siblings.index(directory)] if directory in siblings else siblings
    good = next((path for path in reversed(older) if not find_damage(path)), None)
    hint = "start afresh in another output_dir" if good is None else f"resume from {good}"
    why = why if isinstance(why, str) else f"{type(why).__name__}: {why}"
    return ValueError(f"{directory} is no checkpoint that can be resumed ({why}); {hint}")


def find_damage(directory: Path) -> str | None:
    """Hold the files of a checkpoint against their digests; what else lies there is not ours.

    Returns:
        Which file is damaged or missing; None if all are as they were written.
    """
    listed = set()
    try:
        for line in (directory / SUMS_FILE).read_bytes().splitlines():
            digest, separator, raw = line.partition(b"  ")
            name = raw.decode(errors="replace")
            if not separator or digest.decode(errors="replace") != _digest(directory / name):
                return f"{name or SUMS_FILE} is damaged"
            listed.add(name)
    except FileNotFoundError as error:
        return f"{Path(error.filename).relative_to(directory).as_posix()} is missing"
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    except ValueError:  # a zero byte in a name
        return f"{SUMS_FILE} is damaged"
    # A list that was cut short has lost its end, which is where these are.
    return None if listed >= {STATE_FILE, TENSOR_FILE} else f"{SUMS_FILE} is damaged"


def _digests(directory: Path) -> str:
    """A line with digest and name for every file, as `sha256sum` writes them."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return "".join(f"{_digest(p)}  {p.relative_to(directory).as_posix()}\n" for p in paths)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def list_checkpoints(directory: Path) -> list[Path]:
    """The checkpoints of a run, oldest first; folders of other names are nobody's here."""
    found = (path for path in directory.glob("step-*") if _NAME.fullmatch(path.name))
    return sorted((path for path in found if path.is_dir()), key=_step)


def _step(path: Path) -> int:
    """The step of a checkpoint of ours; text would sort step-1000000 before step-999999."""
    return int(path.name.removeprefix("step-"))


def newest_good_checkpoint(directory: Path) -> Path | None:
    """The newest checkpoint that is as it was written; damaged ones are said and passed over.

    Raises:
        ValueError: If there are checkpoints and every one is damaged.
    """
    checkpoints = list_checkpoints(directory)
    for path in reversed(checkpoints):
        damage = find_damage(path)
        if damage is None:
            return path
        warn(f"checkpoint {path} is passed over: {damage}")
    if checkpoints:
        raise ValueError(
            f"every checkpoint in {directory} is damaged; start afresh in another output_dir"
        )
    return None


def prune_checkpoints(directory: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, once the newest is known to be good.

    What was set aside goes too, once there is a checkpoint ahead of where the run went back to.
    """
    checkpoints = list_checkpoints(directory)
    if not checkpoints:
        return
    newest, unwanted = _step(checkpoints[-1]), checkpoints[:-keep]
    for path in directory.glob("step-*"):
        match = _SET_ASIDE.fullmatch(path.name)
        if match and int(match[1]) < newest:
            unwanted.append(path)
    if not unwanted:
        return
    if damage := find_damage(checkpoints[-1]):
        warn(f"checkpoint {checkpoints[-1]} is not what was written ({damage}); all are kept")
        return
    for path in unwanted:
        remove_folder(path)


def set_aside_checkpoints(directory: Path, step: int) -> list[Path]:
    """Rename the checkpoints ahead of where a run goes on from; no resume finds them any more.

    Returns:
        What they are called now.
    """
    renamed = []
    for path in list_checkpoints(directory):
        if _step(path) > step:
            target = path.with_name(f"{path.name}.ahead-of-{step:06d}")
            if target.exists():  # of a still earlier future
                remove_folder(target)
            move(path, target)
            renamed.append(target)
    return renamed


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
    """A learning-rate scheduler's state as JSON can hold it: its lambdas have no state."""
    return {key: value for key, value in state.items() if key != "lr_lambdas"} | {
        "lr_lambdas": [None]
    }

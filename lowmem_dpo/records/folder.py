"""The folder a run leaves, and its records: config.yaml, run.json, metrics.jsonl."""

import contextlib
import importlib.metadata
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowmem_dpo.console import warn
from lowmem_dpo.files import (
    NoLocksError,
    append,
    lock_file,
    move,
    recover,
    remove_folder,
    replace_file,
    replace_folder,
    unlock_file,
)
from lowmem_dpo.records.checkpoints import (
    STATE_FILE,
    SUMS_FILE,
    check_undamaged,
    newest_good_checkpoint,
    read_record,
)
from lowmem_dpo.settings.groups import RunSettings
from lowmem_dpo.version import __version__

SCHEMA_VERSION = 1

# What a digest that differs means.
DIGESTS = {
    "data_digest": "the pairs changed (other rows, or another tokenizer)",
    "template_digest": "the chat template changed",
    "model_digest": "the model changed",
}
# Settings under which a run may be resumed although they changed; it shares all others.
FREE_TO_CHANGE = {
    "output_dir",
    "eval_steps",
    "logging_steps",
    "save_strategy",
    "save_steps",
    "early_stopping_patience",
    "early_stopping_threshold",
    "keep_checkpoints",
    "resume",
    "cache_dir",
    "quantized_copy",
    "report_to",
    "memory_limit",
    "host_memory_limit",
    "memory_check",
    "keep_activations",
    "layer_inputs",
    "layer_weights",
    "embedding_weight",
    "head_weight",
    "optimizer_state",
    "head_kernel",
    "kernels",
    "reference",
    "device",
    "model",
    "data",
    "eval_data",
    # What they read has a digest of its own.
    "dataset_config",
    "dataset_train_split",
    "dataset_test_split",
    "columns",
    "on_bad_row",
    "init_adapter",
}

# What tells that a folder holds a run, and what else it writes there.
RUN_FILES = ("config.yaml", "adapter", "best", "checkpoints")
RECORD_FILES = ("run.json", "metrics.jsonl")


@dataclass
class RunFolder:
    """Paths and records of one run; `hold_folder` makes it.

    Attributes:
        root: The folder.
        checkpoints: Its checkpoints' folder.
        metrics: Its metrics.jsonl.
        best: The folder of the best adapter.
        checkpoint: Where to resume from; None to start afresh.
        record: What run.json says.
    """

    root: Path
    checkpoints: Path
    metrics: Path
    best: Path
    checkpoint: Path | None
    record: dict[str, Any] = field(
        default_factory=lambda: {"schema_version": SCHEMA_VERSION, "sessions": []}
    )

    def start(self, settings_yaml: str, resumed_step: int) -> None:
        """Write config.yaml; cut metrics.jsonl back to the step that the run goes on from."""
        replace_file(self.root / "config.yaml", settings_yaml.encode())
        rows = read_metrics(self.metrics) if resumed_step else []
        kept = [row for row in rows if row["step"] <= resumed_step]
        replace_file(self.metrics, "".join(json.dumps(row) + "\n" for row in kept).encode())
        if resumed_step:
            with contextlib.suppress(OSError, ValueError):
                record = json.loads((self.root / "run.json").read_text(encoding="utf-8"))
                if isinstance(record, dict) and isinstance(record.get("sessions"), list):
                    self.record = record

    def set_aside_best(self, step: int, best_eval_loss: float | None) -> Path | None:
        """Rename best/ if it is of a step ahead of where the run goes on from.

        It is if a later evaluation, which is still in metrics.jsonl, was better than what the
        checkpoint knows as the best.

        Returns:
            What it is called now; None if it stays.
        """
        later = [
            row["eval_loss"]
            for row in read_metrics(self.metrics)
            if row["step"] > step and "eval_loss" in row
        ]
        is_ahead = bool(later) and (best_eval_loss is None or min(later) < best_eval_loss)
        if not is_ahead or not self.best.exists():
            return None
        self._forget_set_aside()
        target = self.best.with_name(f"best.ahead-of-{step:06d}")
        move(self.best, target)
        return target

    def keep_best_of_killed_run(self) -> Path | None:
        """Rename the best/ of a run that left no checkpoint, before another starts afresh here.

        Returns:
            What it is called now; None if there is none.
        """
        if not self.best.exists():
            return None
        names = (self.best.with_name(f"best.killed-{number}") for number in itertools.count(1))
        target = next(path for path in names if not path.exists())
        move(self.best, target)
        return target

    def save_best(self, save_adapter: Callable[[Path], None]) -> None:
        """Write best/; what was set aside for it goes."""
        replace_folder(self.best, save_adapter)
        self._forget_set_aside()

    def _forget_set_aside(self) -> None:
        for path in self.root.glob("best.ahead-of-*"):
            remove_folder(path)

    def note(self, **facts: Any) -> None:
        """Add facts to run.json."""
        self.record.update(facts)
        text = json.dumps(self.record, indent=2, default=str, allow_nan=False) + "\n"
        replace_file(self.root / "run.json", text.encode())

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        line = {"schema_version": SCHEMA_VERSION, **metrics}
        append(self.metrics, (json.dumps(line, allow_nan=False) + "\n").encode())


@contextlib.contextmanager
def hold_folder(settings: RunSettings) -> Iterator[RunFolder]:
    """Make a run's folder, find where to resume, and hold it: inside, no other run writes there.

    Folders that are made for it and stay empty, as where the run is refused, are gone afterwards.

    Args:
        settings: Where the run goes, and whether it goes on with an earlier one.

    Raises:
        ValueError: If the folder holds a run and resume is not set, the checkpoint is not there,
            there is none and a new run would overwrite what an earlier one left, or the folder
            cannot be written.
    """
    root = Path(settings.output_dir)
    made = [folder for folder in (root, *root.parents) if not folder.exists()]
    lock = None
    try:
        root.mkdir(parents=True, exist_ok=True)
        if (lock := lock_file(root / ".lock")) is None:
            raise ValueError(f"another run is writing to {root}; choose another --output_dir")
    except NoLocksError as error:
        warn(f"{root} cannot be locked: {error.strerror}; let no other run write to it")
    except OSError as error:
        raise ValueError(f"cannot write output_dir {root}: {error.strerror}") from None
    try:
        checkpoint = _find_checkpoint(root, settings.resume)
        checkpoints = root / "checkpoints"
        yield RunFolder(root, checkpoints, root / "metrics.jsonl", root / "best", checkpoint)
    finally:
        if lock is not None:
            unlock_file(lock)
        with contextlib.suppress(OSError):  # it is not empty
            for folder in made:
                folder.rmdir()


def _find_checkpoint(root: Path, resume: str | None) -> Path | None:
    """Where to go on from; what a kill left half done in the folder is cleared away."""
    checkpoints = root / "checkpoints"
    holds_run = any((root / name).exists() for name in RUN_FILES)
    if resume is None and holds_run:
        raise ValueError(
            f"{root} holds a run already; go on with --resume auto, or choose another --output_dir"
        )
    checkpoint = None if resume in (None, "auto") else Path(str(resume))
    if checkpoint is not None:
        if not any((checkpoint / name).exists() for name in (SUMS_FILE, STATE_FILE)):
            raise ValueError(
                f"{checkpoint} is no checkpoint; set --resume auto, which takes the newest, or "
                f"the path of one, such as {checkpoints / 'step-000100'}"
            )
        if holds_run and checkpoint.resolve().parent != checkpoints.resolve():
            raise ValueError(
                f"{root} holds a run and {checkpoint} is not its checkpoint; "
                "choose another --output_dir"
            )
        check_undamaged(checkpoint)
    recover(root, *RUN_FILES, *RECORD_FILES)
    recover(checkpoints, "step-")
    if resume == "auto":
        checkpoint = newest_good_checkpoint(checkpoints)
        if checkpoint is None:
            _check_nothing_is_lost(root)
    return checkpoint


def _check_nothing_is_lost(root: Path) -> None:
    """Refuse to start afresh over an adapter, or over the record of a finished run.

    The best/ of a run that was killed is no reason: it is kept under another name.
    """
    left = ["adapter/"] if (root / "adapter").exists() else []
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        if json.loads((root / "run.json").read_text(encoding="utf-8"))["finished"]:
            left.append("the record of a finished run")
    if left:
        left += ["best/"] if (root / "best").exists() else []
        raise ValueError(
            f"{root} holds {' and '.join(left)} but no checkpoint to go on from, and "
            "starting afresh would overwrite that; choose another --output_dir"
        )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, if there is one; what a kill cut short is left out."""
    rows = []
    for line in path.read_text("utf-8", errors="replace").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
    return rows


def settings_to_share(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a resumed run must have as its checkpoint has them."""
    return {name: value for name, value in settings.items() if name not in FREE_TO_CHANGE}


def check_resumable(
    checkpoint: Path, facts: Mapping[str, Any], usual: Mapping[str, Any] | None = None
) -> None:
    """Refuse to resume a run whose model, data or settings changed.

    Args:
        checkpoint: To go on from.
        facts: Some of what the run must share with it: settings, digests.
        usual: The settings' defaults: what a checkpoint does not know had no other value.

    Raises:
        ValueError: Naming what changed.
    """
    recorded = {**(usual or {}), **read_record(checkpoint)["facts"]}
    names = [name for name in sorted(facts) if facts[name] != recorded.get(name)]
    if "template_digest" in names and "data_digest" in names:
        names.remove("data_digest")  # the template's text is part of every pair
    changed = [
        DIGESTS.get(name) or f"{name} {recorded.get(name)} -> {facts[name]}" for name in names
    ]
    if "data_digest" in names:
        then, now = recorded.get("text_versions", {}), text_versions()
        changed += [f"{n} {then[n]} -> {now[n]}" for n in now if then.get(n, now[n]) != now[n]]
    if changed:
        raise ValueError(
            f"cannot resume {checkpoint}: {'; '.join(changed)}; "
            "set it back, or start afresh in another output_dir"
        )


def text_versions() -> dict[str, str]:
    """Versions of what makes token ids of the rows."""
    others = {name: importlib.metadata.version(name) for name in ("transformers", "tokenizers")}
    return {"lowmem_dpo": __version__} | others

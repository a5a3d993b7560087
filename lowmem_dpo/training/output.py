"""The folder a run leaves, and its records: config.yaml, run.json, metrics.jsonl."""

import contextlib
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any

from lowmem_dpo.config import TrainConfig
from lowmem_dpo.files import append, lock_file, recover, replace_file, unlock_file
from lowmem_dpo.settings import to_yaml
from lowmem_dpo.training.checkpoints import check_undamaged, newest_good_checkpoint, read_record

SCHEMA_VERSION = 1

# Settings under which a run may be resumed although they changed.
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
    "layer_inputs",
    "head_weight",
    "head_kernel",
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


class RunFolder:
    """Paths and records of one run.

    Args:
        config: The run's settings.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.root = Path(config.output_dir)
        self.checkpoints = self.root / "checkpoints"
        self.metrics = self.root / "metrics.jsonl"
        self.record: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "sessions": []}
        self._lock: IO[bytes] | None = None

    def open(self, config: TrainConfig) -> Path | None:
        """Make the folder and hold it against other runs, or find where to resume.

        Returns:
            The checkpoint to resume from, or None to start afresh.

        Raises:
            ValueError: If the folder holds a run and resume is not set, the checkpoint is not
                there or is another setting's, or the folder cannot be written.
        """
        holds_run = any((self.root / name).exists() for name in RUN_FILES)
        if config.resume is None and holds_run:
            raise ValueError(
                f"{self.root} holds a run already; go on with --resume auto, "
                "or choose another --output_dir"
            )
        checkpoint = None
        if config.resume not in (None, "auto"):
            checkpoint = Path(str(config.resume))
            if holds_run and checkpoint.resolve().parent != self.checkpoints.resolve():
                raise ValueError(
                    f"{self.root} holds a run and {checkpoint} is not its checkpoint; "
                    "choose another --output_dir"
                )
            check_undamaged(checkpoint)
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self._lock = lock_file(self.root / ".lock")
        except OSError as error:
            raise ValueError(f"cannot write output_dir {self.root}: {error.strerror}") from None
        if self._lock is None:
            raise ValueError(f"another run is writing to {self.root}; choose another --output_dir")
        try:
            recover(self.root, *RUN_FILES, *RECORD_FILES)
            recover(self.checkpoints, "step-")
            if config.resume == "auto":
                checkpoint = newest_good_checkpoint(self.checkpoints)
            if checkpoint is not None:
                check_resumable(resume_facts(config), read_record(checkpoint)["facts"], checkpoint)
        except BaseException:
            self.close()
            raise
        return checkpoint

    def close(self) -> None:
        """Let other runs have the folder."""
        if self._lock is not None:
            unlock_file(self._lock)
            self._lock = None

    def start(self, config: TrainConfig, resumed_step: int) -> None:
        """Write config.yaml; cut metrics.jsonl back to the step that the run goes on from."""
        replace_file(self.root / "config.yaml", to_yaml(replace(config, resume=None)).encode())
        kept = []
        if self.metrics.exists():
            for line in self.metrics.read_text("utf-8", errors="replace").splitlines():
                try:
                    if json.loads(line)["step"] <= resumed_step:
                        kept.append(line + "\n")
                except (json.JSONDecodeError, KeyError, TypeError):  # cut short by a kill
                    continue
        replace_file(self.metrics, "".join(kept).encode())
        if resumed_step:
            with contextlib.suppress(OSError, json.JSONDecodeError):
                self.record = json.loads((self.root / "run.json").read_text(encoding="utf-8"))

    def note(self, **facts: Any) -> None:
        """Add facts to run.json."""
        self.record.update(facts)
        text = json.dumps(self.record, indent=2, default=str, allow_nan=False) + "\n"
        replace_file(self.root / "run.json", text.encode())

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        line = {"schema_version": SCHEMA_VERSION, **metrics}
        append(self.metrics, (json.dumps(line, allow_nan=False) + "\n").encode())


def check_resumable(
    facts: Mapping[str, Any], recorded: Mapping[str, Any], checkpoint: Path
) -> None:
    """Refuse to resume a run whose model, data or settings changed.

    Args:
        facts: `resume_facts` of this run.
        recorded: Those in the checkpoint; more than `facts` may be there.
        checkpoint: For the message.

    Raises:
        ValueError: Naming what changed.
    """
    changed = [
        f"{name} changed" if "digest" in name else f"{name} {recorded.get(name)} -> {facts[name]}"
        for name in sorted(facts)
        if facts.get(name) != recorded.get(name)
    ]
    if changed:
        raise ValueError(
            f"cannot resume {checkpoint}: {'; '.join(changed)}; "
            "set it back, or start afresh in another output_dir"
        )


def resume_facts(config: TrainConfig, **digests: Any) -> dict[str, Any]:
    """What a resumed run must share with the run it goes on with."""
    settings = asdict(config).items()
    return {name: value for name, value in settings if name not in FREE_TO_CHANGE} | digests

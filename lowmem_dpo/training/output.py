"""The folder a run leaves, and its records: config.yaml, run.json, metrics.jsonl."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowmem_dpo.config import TrainConfig, to_yaml
from lowmem_dpo.training.checkpoints import list_checkpoints, read_record

SCHEMA_VERSION = 1

# Settings under which a run may be resumed although they changed.
FREE_TO_CHANGE = {
    "output_dir",
    "eval_steps",
    "logging_steps",
    "save_strategy",
    "save_steps",
    "keep_checkpoints",
    "resume",
    "cache_dir",
    "report_to",
    "memory_limit",
    "layer_inputs",
    "reference",
    "device",
    "model",
    "data",
    "eval_data",
    "init_adapter",
}


class RunFolder:
    """Paths and records of one run.

    Args:
        config: The run's settings.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.root = Path(config.output_dir)
        self.checkpoints = self.root / "checkpoints"
        self.metrics = self.root / "metrics.jsonl"
        self.record: dict[str, Any] = {"schema_version": SCHEMA_VERSION}

    def open(self, config: TrainConfig) -> Path | None:
        """Make the folder, or find where to resume.

        Returns:
            The checkpoint to resume from, or None to start afresh.

        Raises:
            ValueError: If the folder holds a run and resume is not set, or the checkpoint is not
                there.
        """
        holds_run = (self.root / "config.yaml").exists()
        if config.resume is None and holds_run:
            raise ValueError(
                f"{self.root} holds a run already; go on with --resume auto, "
                "or choose another --output_dir"
            )
        checkpoint = None
        if config.resume == "auto":
            checkpoint = next(reversed(list_checkpoints(self.checkpoints)), None)
        elif config.resume is not None:
            checkpoint = Path(config.resume)
            read_record(checkpoint)
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"cannot make output_dir {self.root}: {error.strerror}") from None
        return checkpoint

    def start(self, config: TrainConfig, resumed_step: int) -> None:
        """Write config.yaml; cut metrics.jsonl back to the step that the run goes on from."""
        write_text(self.root / "config.yaml", to_yaml(config))
        kept = []
        if self.metrics.exists():
            for line in self.metrics.read_text(encoding="utf-8").splitlines():
                try:
                    if json.loads(line)["step"] <= resumed_step:
                        kept.append(line + "\n")
                except (json.JSONDecodeError, KeyError):
                    continue
        write_text(self.metrics, "".join(kept))

    def note(self, **facts: Any) -> None:
        """Add facts to run.json."""
        self.record.update(facts)
        write_text(self.root / "run.json", json.dumps(self.record, indent=2, default=str) + "\n")

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(dict(metrics)) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is either the old one or the new one, never half of it."""
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def check_resumable(
    facts: Mapping[str, Any], recorded: Mapping[str, Any], checkpoint: Path
) -> None:
    """Refuse to resume a run whose model, data or settings changed.

    Args:
        facts: `resume_facts` of this run.
        recorded: Those in the checkpoint.
        checkpoint: For the message.

    Raises:
        ValueError: Naming what changed.
    """
    changed = [
        f"{name} {recorded.get(name)} -> {facts.get(name)}"
        for name in sorted(facts.keys() | recorded.keys())
        if facts.get(name) != recorded.get(name)
    ]
    if changed:
        raise ValueError(
            f"cannot resume {checkpoint}: {'; '.join(changed)}; "
            "set it back, or start afresh in another output_dir"
        )


def resume_facts(config: TrainConfig, **digests: str) -> dict[str, Any]:
    """What a resumed run must share with the run it goes on with."""
    import dataclasses

    settings = dataclasses.asdict(config).items()
    return {name: value for name, value in settings if name not in FREE_TO_CHANGE} | digests

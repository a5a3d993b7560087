"""Experiment trackers: the lines of metrics.jsonl for TensorBoard, Weights & Biases or Trackio.

They are asked for by `report_to` and off by default. metrics.jsonl stays the record of a run: a
tracker that fails later (its network, its disk) is said once and left out, and the run goes on.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lowmem_dpo.console import warn

PROJECT = "lowmem_dpo"


class Tracker(NamedTuple):
    """One that was started: where lines go, how it ends, and the id under which it goes on."""

    log: Callable[[Mapping[str, float], int], Any]
    finish: Callable[[], Any]
    run_id: str | None = None


def check_installed(names: Sequence[str]) -> None:
    """Refuse trackers whose package is missing, before anything is loaded.

    Raises:
        ValueError: With the command that installs it.
    """
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError:
            raise ValueError(
                f"report_to {name} needs a package that is not installed; "
                f"pip install {name}, or leave report_to out"
            ) from None


class Trackers:
    """The trackers of one run.

    Args:
        names: Of `report_to`.
        root: The run's folder; its name is the run's.
        settings: The resolved settings, shown beside the curves.
        resumed_step: Where the run goes on from; 0 at its start.
        run_ids: What `run_ids` was in the run that is resumed.

    Attributes:
        run_ids: Tracker to the id under which a resumed run goes on with the same curve.
    """

    def __init__(
        self,
        names: Sequence[str],
        root: Path,
        settings: Mapping[str, Any],
        resumed_step: int,
        run_ids: Mapping[str, str],
    ) -> None:
        self._live: dict[str, Tracker] = {}
        for name in names:
            try:
                self._live[name] = START[name](
                    root, dict(settings), resumed_step, run_ids.get(name)
                )
            except Exception as error:
                _warn_of(name, error)
        ids = {name: tracker.run_id for name, tracker in self._live.items()}
        self.run_ids = {name: run_id for name, run_id in ids.items() if run_id is not None}

    def log(self, metrics: Mapping[str, float]) -> None:
        """Send one line of metrics, which holds its `step`."""
        numbers = {name: value for name, value in metrics.items() if name != "step"}
        for name, tracker in list(self._live.items()):
            try:
                tracker.log(numbers, int(metrics["step"]))
            except Exception as error:  # of any kind: it is no reason to lose a run
                _warn_of(name, error)
                del self._live[name]

    def finish(self) -> None:
        """Send what is left."""
        for name, tracker in self._live.items():
            try:
                tracker.finish()
            except Exception as error:
                _warn_of(name, error)
        self._live.clear()


def _warn_of(name: str, error: Exception) -> None:
    warn(
        f"{name} failed and is left out from here on ({type(error).__name__}: {error}); "
        "metrics.jsonl holds everything"
    )


def _start_tensorboard(
    root: Path, settings: dict[str, Any], resumed_step: int, run_id: str | None
) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    # Points of an earlier session beyond the checkpoint are another future's.
    purge = resumed_step + 1 if resumed_step else None
    writer = SummaryWriter(log_dir=str(root / "tensorboard"), purge_step=purge)

    def log(metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return Tracker(log, writer.close)


def _start_wandb(
    root: Path, settings: dict[str, Any], resumed_step: int, run_id: str | None
) -> Tracker:
    wandb = importlib.import_module("wandb")
    run = wandb.init(
        project=PROJECT,
        name=root.resolve().name,
        dir=str(root),
        config=settings,
        id=run_id,
        resume="allow",
    )
    return Tracker(lambda metrics, step: run.log(dict(metrics), step=step), run.finish, run.id)


def _start_trackio(
    root: Path, settings: dict[str, Any], resumed_step: int, run_id: str | None
) -> Tracker:
    trackio = importlib.import_module("trackio")
    name = run_id or root.resolve().name
    trackio.init(project=PROJECT, name=name, config=settings, resume="allow")
    return Tracker(
        lambda metrics, step: trackio.log(dict(metrics), step=step), trackio.finish, name
    )


START: dict[str, Callable[[Path, dict[str, Any], int, str | None], Tracker]] = {
    "tensorboard": _start_tensorboard,
    "wandb": _start_wandb,
    "trackio": _start_trackio,
}

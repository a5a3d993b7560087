"""What a run writes as it goes: metrics, evaluations, checkpoints, adapters, plots."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from lowmem_dpo.console import ProgressBar, say, size, speed, warn
from lowmem_dpo.files import replace_folder
from lowmem_dpo.linears.lora import lora_parameters
from lowmem_dpo.records.checkpoints import (
    TrainingState,
    prune_checkpoints,
    save_checkpoint,
    set_aside_checkpoints,
)
from lowmem_dpo.records.folder import RunFolder
from lowmem_dpo.records.plots import draw_plots
from lowmem_dpo.records.trackers import Trackers
from lowmem_dpo.settings.groups import RunSettings
from lowmem_dpo.steps.gradients import EXTRA_PER_PAIR, PER_PAIR, Metrics
from lowmem_dpo.training.loop import StepResult, check_weights_finite, evaluate
from lowmem_dpo.training.run import Run

FEW_STEPS_TO_LOG_ALL = 100


class Recorder:
    """Keeps the record of one run.

    Args:
        run: What is trained.
        state: Its moving parts; what it knows of logged lines and evaluations is kept here.
        folder: Where the record goes.
        trackers: Where its lines go too; None for nowhere.
        settings: When to write what.
    """

    def __init__(
        self,
        run: Run,
        state: TrainingState,
        folder: RunFolder,
        trackers: Trackers | None,
        settings: RunSettings,
    ) -> None:
        self.run, self.state, self.folder, self.trackers = run, state, folder, trackers
        self.settings = settings
        self.parameters = lora_parameters(run.policy.model.network)
        self.num_steps, self.saved_step = run.batches.num_steps, state.step
        few = self.num_steps < FEW_STEPS_TO_LOG_ALL
        self.logging_steps = settings.logging_steps or (1 if few else 10)
        self.eval_steps = settings.eval_steps or run.batches.steps_per_epoch

    @property
    def stops_early(self) -> bool:
        """Whether the last evaluations improved nothing, as often as the patience allows."""
        patience = self.settings.early_stopping_patience
        return patience is not None and self.state.num_evaluations_without_improvement >= patience

    def record(self, result: StepResult, bar: ProgressBar) -> bool:
        """Write what is due after a step.

        Args:
            result: Of the step.
            bar: Advanced by one.

        Returns:
            Whether this was the last step.
        """
        step = result.step
        self._take_in(result)
        if step == 1:
            self.folder.note(step_zero=result.step_zero)
        bar.advance(1, _summary(result.metrics))
        is_last = step == self.num_steps
        if step % self.logging_steps == 0 or is_last:
            self._log(bar)
        if self.run.pairs.evaluation and (step % self.eval_steps == 0 or is_last):
            self._evaluate()
            is_last = is_last or self.stops_early
        if is_last and self.state.unlogged:
            self._log(bar)
        if self._is_save_step(step, is_last):
            self.save()
        return is_last

    def save(self) -> None:
        """Write a checkpoint, unless this step has one."""
        if self.saved_step == self.state.step:
            return
        check_weights_finite(self.parameters, self.state.step)
        checkpoints = self.folder.checkpoints
        save_checkpoint(checkpoints, self.state, self.run.policy.save, self.run.facts)
        prune_checkpoints(checkpoints, self.settings.keep_checkpoints)
        self.saved_step = self.state.step

    def finish(self) -> Path:
        """Write the last adapter, best/ where no evaluation did, and the plots.

        Returns:
            The adapter's folder.
        """
        check_weights_finite(self.parameters, self.state.step)
        adapter = self.folder.root / "adapter"
        replace_folder(adapter, self.run.policy.save)
        if not self.run.pairs.evaluation or not self.folder.best.exists():
            self.folder.save_best(self.run.policy.save)
        try:
            draw_plots(self.folder.metrics, self.folder.root / "plots")
        except OSError as error:  # the run itself is saved by now
            warn(f"the plots could not be drawn: {error}")
        return adapter

    def _take_in(self, result: StepResult) -> None:
        """Keep a step's metrics for the next line; of a skipped step, those that are numbers."""
        if "skipped_steps" in result.metrics:
            self.state.unlogged.append(without_pairs(result.metrics))
        else:
            self.state.unlogged.append(result.metrics)
            self.state.last_metrics = result.metrics

    def _log(self, bar: ProgressBar) -> None:
        metrics = mean_metrics(self.state.unlogged)
        self.state.unlogged.clear()
        self._write(metrics)
        if bar.bar is None:
            step = int(metrics["step"])
            say(f"step {step}/{self.num_steps}: {_summary(metrics)}, {bar.time_left} left")

    def _write(self, metrics: Mapping[str, float]) -> None:
        self.folder.log(metrics)
        if self.trackers is not None:
            self.trackers.log(metrics)

    def _is_save_step(self, step: int, is_last: bool) -> bool:
        if self.settings.save_strategy == "no":
            return False
        by_steps = self.settings.save_strategy == "steps"
        every = self.settings.save_steps if by_steps else self.run.batches.steps_per_epoch
        return is_last or step % (every or 1) == 0

    def _evaluate(self) -> None:
        check_weights_finite(self.parameters, self.state.step)
        metrics = evaluate(self.run, self.run.pairs.evaluation)
        loss = metrics["eval_loss"]
        self.state.eval_metrics = {"step": self.state.step, **metrics}
        self._write(self.state.eval_metrics)
        say(
            f"evaluation at step {self.state.step}: loss {loss:.4f}, margin "
            f"{metrics['eval_rewards/margins']:+.3f}, accuracy "
            f"{metrics['eval_rewards/accuracies']:.2f}"
        )
        self._count_improvement(loss)
        lowest = self.state.best_eval_loss
        if lowest is None or loss < lowest or not self.folder.best.exists():
            self.state.best_eval_loss = loss
            self.folder.save_best(self.run.policy.save)
        if self.stops_early:
            times = self.state.num_evaluations_without_improvement
            threshold = self.settings.early_stopping_threshold
            by = f" by more than early_stopping_threshold {threshold:g}" if threshold else ""
            say(
                f"stopped early: the last {times} evaluations did not lower eval_loss "
                f"{self.state.eval_loss_to_beat:.4f}{by}"
            )

    def _count_improvement(self, loss: float) -> None:
        """Count evaluations since the loss last fell by more than the threshold.

        The loss to beat stays until then, so that many small steps down count in the end.
        """
        to_beat = self.state.eval_loss_to_beat
        if to_beat is None or to_beat - loss > self.settings.early_stopping_threshold:
            self.state.eval_loss_to_beat = loss
            self.state.num_evaluations_without_improvement = 0
        else:
            self.state.num_evaluations_without_improvement += 1


def leave_later_steps(folder: RunFolder, state: TrainingState, keep_checkpoints: int) -> None:
    """Set aside, and name, what belongs to steps ahead of the checkpoint that was resumed."""
    if aside := set_aside_checkpoints(folder.checkpoints, state.step):
        names = ", ".join(path.name for path in aside)
        warn(
            f"going back to step {state.step}: the later checkpoints are {names} now, and are "
            "deleted when a new one is written"
        )
    if best := folder.set_aside_best(state.step, state.best_eval_loss):
        say(
            f"best/ is of a later step than {state.step}: it is {best.name} now, until an "
            "evaluation writes a new one"
        )
    # A kill may have come between a checkpoint and the deletion of older ones.
    prune_checkpoints(folder.checkpoints, keep_checkpoints)


def say_fresh_start(folder: RunFolder) -> None:
    """Say that there was nothing to resume, and what becomes of what a killed run left."""
    left = ""
    if best := folder.keep_best_of_killed_run():
        left = f"; the best/ of a killed run is {best.name} now, its metrics are overwritten"
    say(f"resume auto: no checkpoint in {folder.checkpoints}, starting afresh{left}")


def mean_metrics(steps: Iterable[Mapping[str, float]]) -> Metrics:
    """Mean over the pairs of several steps; of the gradient norm, over the steps.

    `num_pairs` is how many pairs that were; the rest is the last step's. Steps that were skipped
    are counted (`skipped_steps`) and give nothing to the means.
    """
    steps = list(steps)
    result = dict(steps[-1])
    taken = [step for step in steps if "skipped_steps" not in step]
    if taken:
        counts = [step["num_pairs"] for step in taken]
        weights = [count / max(counts) for count in counts]  # exactly 1 for full batches
        result["num_pairs"] = sum(counts)
        for name in (*PER_PAIR, *EXTRA_PER_PAIR):
            if name in taken[0]:
                total = sum(w * step[name] for w, step in zip(weights, taken, strict=True))
                result[name] = total / sum(weights)
    norms = [step["grad_norm"] for step in taken if "grad_norm" in step]
    if norms:  # a step whose float16 gradient overflowed has no norm
        result["grad_norm"] = sum(norms) / len(norms)
    if skipped := sum(step.get("skipped_steps", 0) for step in steps):
        result["skipped_steps"] = skipped
    return result


def without_pairs(metrics: Mapping[str, float]) -> Metrics:
    """The metrics of a skipped step that may be written: not those of its pairs and gradient."""
    left_out = {*PER_PAIR, *EXTRA_PER_PAIR, "num_pairs", "grad_norm"}
    return {name: value for name, value in metrics.items() if name not in left_out}


def _summary(metrics: Metrics) -> str:
    """Loss, margin, accuracy, speed and memory in one line."""
    if "loss" not in metrics or not math.isfinite(metrics["loss"]):
        return "skipped"
    text = (
        f"loss {metrics['loss']:.4f}, margin {metrics['rewards/margins']:+.3f}, "
        f"accuracy {metrics['rewards/accuracies']:.2f}, "
        f"{speed(metrics['pairs_per_second'])} pairs/s"
    )
    if "peak_memory_bytes" in metrics:
        text += f", peak {size(metrics['peak_memory_bytes'])}"
    return text

"""What surrounds the training loop: logging, evaluation, checkpoints, the adapters it leaves."""

import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lowmem_dpo.console import ProgressBar, duration, say, size, speed, warn
from lowmem_dpo.files import replace_folder
from lowmem_dpo.model.lora import lora_parameters
from lowmem_dpo.stopping import Interrupt
from lowmem_dpo.training.batches import Schedule
from lowmem_dpo.training.checkpoints import (
    TrainingState,
    load_checkpoint,
    prune_checkpoints,
    read_record,
    save_checkpoint,
    set_aside_checkpoints,
)
from lowmem_dpo.training.health import check_adapter_moves, check_weights_finite
from lowmem_dpo.training.loop import StepResult, evaluate, predicted_fill, train_steps
from lowmem_dpo.training.metrics import (
    Metrics,
    mean_metrics,
    with_friendly_names,
    without_pairs,
)
from lowmem_dpo.training.optimizers import make_optimizer, make_schedule
from lowmem_dpo.training.output import RunFolder, check_resumable, resume_facts
from lowmem_dpo.training.plots import draw_plots
from lowmem_dpo.training.setup import Run
from lowmem_dpo.training.trackers import Trackers
from lowmem_dpo.version import __version__
from lowmem_dpo.weights.adapters import load_adapter

FEW_STEPS_TO_LOG_ALL = 100

StepCallback = Callable[[StepResult], Any]


@dataclass
class TrainResult:
    """What `fit` returns.

    Attributes:
        final_loss: Loss of the last step that was not skipped.
        metrics: That step's metrics, with the last evaluation's (eval_*).
        num_steps: Optimizer steps of the whole run.
        output_dir: The run's folder.
    """

    final_loss: float
    metrics: dict[str, float]
    num_steps: int
    output_dir: Path


class Fit:
    """One call of `Trainer.fit`.

    Args:
        run: Policy, pairs and reference.
        folder: Where the run goes.
        callbacks: Called after every step.
    """

    def __init__(self, run: Run, folder: RunFolder, callbacks: Sequence[StepCallback]) -> None:
        self.run, self.folder, self.callbacks = run, folder, callbacks
        self.config = config = run.config
        self.schedule = Schedule.of(config, len(run.pairs.train))
        self.parameters = lora_parameters(run.policy.model.network)
        optimizer = make_optimizer(config, self.parameters.values())
        self.state = TrainingState(
            optimizer=optimizer,
            schedule=make_schedule(config, optimizer, self.schedule.num_steps),
            scaler=torch.amp.GradScaler(
                run.policy.model.device.type, enabled=run.policy.model.dtype == torch.float16
            ),
            device=run.policy.model.device,
        )
        few = self.schedule.num_steps < FEW_STEPS_TO_LOG_ALL
        self.logging_steps = config.logging_steps or (1 if few else 10)
        self.eval_steps = self.schedule.eval_steps(config)
        self.facts = resume_facts(
            config,
            model_digest=run.policy.digest,
            data_digest=run.pairs.digest,
            planned_pack_tokens=run.pack_tokens,
        )

    def go(self, checkpoint: Path | None) -> TrainResult:
        """Train from the start or from a checkpoint to the end."""
        if checkpoint is not None:
            check_resumable(self.facts, read_record(checkpoint)["facts"], checkpoint)
            load_adapter(self.run.policy.model.network, checkpoint)
            load_checkpoint(checkpoint, self.state)
            self._leave_later_steps()
            # A kill may have come between a checkpoint and the deletion of older ones.
            prune_checkpoints(self.folder.checkpoints, self.config.keep_checkpoints)
            say(f"resumed from {checkpoint}")
        elif self.config.resume == "auto":
            say(f"resume auto: no checkpoint in {self.folder.checkpoints}, starting afresh")
        self.folder.start(self.config, self.state.step)
        self._note_start()
        begun, start = time.perf_counter(), self.state.step
        self.trackers = Trackers(
            self.config.trackers,
            self.folder.root,
            asdict(self.config),
            start,
            self.folder.record.get("trackers", {}),
        )
        self.folder.note(trackers=self.trackers.run_ids)
        try:
            with Interrupt() as interrupt:
                self._train(interrupt)
                check_adapter_moves(self.parameters, self.state.step)
                self._save_adapters()
        finally:
            self.trackers.finish()
        self._draw_plots()
        seconds = time.perf_counter() - begun
        steps = self.state.step - start
        session = {"from_step": start, "to_step": self.state.step, "seconds": seconds}
        self.folder.note(
            sessions=[*self.folder.record["sessions"], session],
            stopped_early=self._stops_early(),
            finished=True,
        )
        adapter = self.folder.root / "adapter"
        say(f"done: {steps} steps in {duration(seconds)}; the adapter is in {adapter}")
        return TrainResult(
            final_loss=self.state.last_metrics.get("loss", math.nan),
            metrics=self.state.eval_metrics | self.state.last_metrics,
            num_steps=self.state.step,
            output_dir=self.folder.root,
        )

    def _leave_later_steps(self) -> None:
        """Set aside, and name, what belongs to steps ahead of the checkpoint."""
        step = self.state.step
        if aside := set_aside_checkpoints(self.folder.checkpoints, step):
            names = ", ".join(path.name for path in aside)
            warn(
                f"going back to step {step}: the later checkpoints are {names} now, and are "
                "deleted when a new one is written"
            )
        if best := self.folder.set_aside_best(step, self.state.best_eval_loss):
            say(
                f"best/ is of a later step than {step}: it is {best.name} now, until an evaluation "
                "writes a new one"
            )

    def _train(self, interrupt: Interrupt) -> None:
        num_steps = self.schedule.num_steps
        bar = ProgressBar("training", num_steps, "steps", done=self.state.step, lines=False)
        if self._stops_early():  # a resumed run that had stopped
            return
        with bar:
            for result in train_steps(self.run, self.state, self.schedule):
                metrics = self._take(result)
                if result.step == 1:
                    self.folder.note(step_zero=self.run.step_zero)
                bar.advance(1, _summary(metrics))
                is_last = result.step == num_steps
                if result.step % self.logging_steps == 0 or is_last:
                    self._log(bar)
                if self.run.pairs.evaluation and (result.step % self.eval_steps == 0 or is_last):
                    self._evaluate()
                    is_last = is_last or self._stops_early()
                if is_last and self.state.unlogged:
                    self._log(bar)
                if self._is_save_step(result.step, is_last) or interrupt.requested:
                    self._save_checkpoint()
                for callback in self.callbacks:
                    callback(StepResult(result.step, metrics))
                if interrupt.requested:
                    say(f"interrupted after step {result.step}; go on with --resume auto")
                    raise KeyboardInterrupt
                if is_last:
                    return

    def _take(self, result: StepResult) -> Metrics:
        """Keep a step's metrics for the next line; of a skipped step, those that are numbers."""
        metrics = with_friendly_names(result.metrics)
        if "skipped_steps" in metrics:
            self.state.unlogged.append(without_pairs(result.metrics))
        else:
            self.state.unlogged.append(result.metrics)
            self.state.last_metrics = metrics
        return metrics

    def _stops_early(self) -> bool:
        patience = self.config.early_stopping_patience
        return patience is not None and (self.state.num_evaluations_without_improvement >= patience)

    def _log(self, bar: ProgressBar) -> None:
        metrics = mean_metrics(self.state.unlogged)
        self.state.unlogged.clear()
        self._write(metrics)
        if bar.bar is None:
            step, num_steps = int(metrics["step"]), self.schedule.num_steps
            say(f"step {step}/{num_steps}: {_summary(metrics)}, {bar.time_left} left")

    def _write(self, metrics: Mapping[str, float]) -> None:
        self.folder.log(metrics)
        self.trackers.log(metrics)

    def _is_save_step(self, step: int, is_last: bool) -> bool:
        if self.config.save_strategy == "no":
            return False
        by_steps = self.config.save_strategy == "steps"
        every = self.config.save_steps if by_steps else self.schedule.steps_per_epoch
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
        if self._stops_early():
            times = self.state.num_evaluations_without_improvement
            threshold = self.config.early_stopping_threshold
            by = f" by more than early_stopping_threshold {threshold:g}" if threshold else ""
            say(
                f"stopped early: the last {times} evaluations did not lower eval_loss "
                f"{self.state.eval_loss_to_beat:.4f}{by}"
            )

    def _count_improvement(self, loss: float) -> None:
        """Count evaluations since the loss last fell by more than the threshold.

        The loss to beat stays until then, so that many small steps down count in the end.
        """
        state = self.state
        to_beat = state.eval_loss_to_beat
        if to_beat is None or to_beat - loss > self.config.early_stopping_threshold:
            state.eval_loss_to_beat = loss
            state.num_evaluations_without_improvement = 0
        else:
            state.num_evaluations_without_improvement += 1

    def _save_checkpoint(self) -> None:
        check_weights_finite(self.parameters, self.state.step)
        save_checkpoint(self.folder.checkpoints, self.state, self.run.policy.save, self.facts)
        prune_checkpoints(self.folder.checkpoints, self.config.keep_checkpoints)

    def _save_adapters(self) -> None:
        """adapter/ is the last state; best/ the best evaluated one, or the last."""
        check_weights_finite(self.parameters, self.state.step)
        replace_folder(self.folder.root / "adapter", self.run.policy.save)
        if not self.run.pairs.evaluation or not self.folder.best.exists():
            self.folder.save_best(self.run.policy.save)

    def _draw_plots(self) -> None:
        try:
            draw_plots(self.folder.metrics, self.folder.root / "plots")
        except OSError as error:  # the run itself is saved by now
            warn(f"the plots could not be drawn: {error}")

    def _note_start(self) -> None:
        run, policy = self.run, self.run.policy
        fill = predicted_fill(run, self.schedule)
        say(f"plan: {self.schedule.num_steps} steps, micro-batches {fill:.0%} filled")
        self.folder.note(
            version=__version__,
            python=platform.python_version(),
            platform=platform.platform(),
            numerics=policy.fingerprint(run.pack_tokens),
            model=policy.identity,
            data=run.pairs.facts,
            data_digest=run.pairs.digest,
            plan={
                "pack_tokens": run.pack_tokens,
                "fill": fill,
                "num_steps": self.schedule.num_steps,
            },
            self_check_rms=run.self_check_rms,
            reference=None
            if run.reference is None
            else {
                "num_scored": run.reference.num_scored,
                "recheck_rms": run.reference.recheck_rms,
                "same_fingerprint": run.reference.same_fingerprint,
            },
            finished=False,
        )


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

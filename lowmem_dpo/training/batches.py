"""How many optimizer steps a run has, and which pairs each of them takes."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from lowmem_dpo.console import warn
from lowmem_dpo.packs.packing import epoch_order
from lowmem_dpo.settings.groups import OptimizerSettings, RunSettings

FEW_STEPS = 20


@dataclass(frozen=True)
class Batches:
    """How many steps a run has, and which pairs each takes."""

    num_pairs: int
    batch_size: int
    num_steps: int
    seed: int
    shuffle: bool

    @classmethod
    def of(cls, settings: OptimizerSettings, num_pairs: int) -> "Batches":
        """Those of a run: whole epochs in batches, the last one possibly short."""
        per_epoch = math.ceil(num_pairs / settings.batch_size)
        # Rounded first: 100 * 1.1 is a little more than 110.
        steps = math.ceil(round(per_epoch * settings.num_train_epochs, 6))
        num_steps = settings.max_steps or max(1, steps)
        return cls(num_pairs, settings.batch_size, num_steps, settings.seed, settings.shuffle)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the data."""
        return math.ceil(self.num_pairs / self.batch_size)

    def from_step(self, first_step: int) -> Iterator[list[int]]:
        """Indices of the pairs of each step, from `first_step` to the end."""
        order, order_epoch = list(range(self.num_pairs)), -1
        for step in range(first_step, self.num_steps):
            epoch, place = divmod(step, self.steps_per_epoch)
            if self.shuffle and epoch != order_epoch:
                order, order_epoch = epoch_order(self.num_pairs, self.seed, epoch), epoch
            yield order[place * self.batch_size : (place + 1) * self.batch_size]


def warn_of_few_steps(batches: Batches) -> None:
    """Say before a short run starts that it will hardly move the model, and what to change."""
    if batches.num_steps < FEW_STEPS:
        steps = "1 step" if batches.num_steps == 1 else f"{batches.num_steps} steps"
        warn(
            f"only {steps}: {batches.num_pairs} pairs in batches of {batches.batch_size}; "
            "for more, lower batch_size or raise num_train_epochs"
        )


def warn_of_late_settings(run: RunSettings, warmup_steps: int | None, batches: Batches) -> None:
    """Say which settings count in more steps than the run has, and what happens instead."""
    steps = batches.num_steps
    settings = {
        "logging_steps": "metrics are written at the last step only",
        "eval_steps": "it is evaluated at the last step only",
        "save_steps": "the only checkpoint is that of the last step",
    }
    for name, instead in settings.items():
        if (getattr(run, name) or 0) > steps:
            warn(f"{name} {getattr(run, name)} is more than the run's {steps} steps: {instead}")
    if (warmup_steps or 0) >= steps:
        warn(
            f"warmup_steps {warmup_steps} leaves nothing of the run's {steps} steps, "
            f"{steps - 1} are used; lower it"
        )
    patience = run.early_stopping_patience
    evaluations = math.ceil(steps / (run.eval_steps or batches.steps_per_epoch))
    # The first evaluation is the best so far, and after the last there is nothing left to stop.
    if patience is not None and patience + 1 >= evaluations:
        warn(
            f"early_stopping_patience {patience} cannot stop a run of {evaluations} evaluations; "
            "lower it or eval_steps"
        )

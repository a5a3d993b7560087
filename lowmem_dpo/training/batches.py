"""How many optimizer steps a run has, and which pairs each of them takes."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from lowmem_dpo.console import warn
from lowmem_dpo.packs.packing import epoch_order
from lowmem_dpo.settings.configs import TrainConfig

FEW_STEPS = 20


@dataclass
class Schedule:
    """How many steps a run has, and which pairs each takes."""

    num_pairs: int
    batch_size: int
    num_steps: int
    seed: int
    shuffle: bool

    @classmethod
    def of(cls, config: TrainConfig, num_pairs: int) -> "Schedule":
        """The schedule of a run: whole epochs in batches, the last one possibly short."""
        per_epoch = math.ceil(num_pairs / config.batch_size)
        # Rounded first: 100 * 1.1 is a little more than 110.
        steps = math.ceil(round(per_epoch * config.num_train_epochs, 6))
        num_steps = config.max_steps or max(1, steps)
        return cls(num_pairs, config.batch_size, num_steps, config.seed, config.shuffle)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the data."""
        return math.ceil(self.num_pairs / self.batch_size)

    def eval_steps(self, config: TrainConfig) -> int:
        """Steps between evaluations: as set, else one pass over the data."""
        return config.eval_steps or self.steps_per_epoch

    def num_evaluations(self, config: TrainConfig) -> int:
        """How often a run evaluates that has something to evaluate on; the last step counts."""
        return math.ceil(self.num_steps / self.eval_steps(config))

    def batches(self, first_step: int) -> Iterator[list[int]]:
        """Indices of the pairs of each step, from `first_step` to the end."""
        order, order_epoch = list(range(self.num_pairs)), -1
        for step in range(first_step, self.num_steps):
            epoch, place = divmod(step, self.steps_per_epoch)
            if self.shuffle and epoch != order_epoch:
                order, order_epoch = epoch_order(self.num_pairs, self.seed, epoch), epoch
            yield order[place * self.batch_size : (place + 1) * self.batch_size]


def warn_of_few_steps(schedule: Schedule) -> None:
    """Say before a short run starts that it will hardly move the model, and what to change."""
    if schedule.num_steps < FEW_STEPS:
        steps = "1 step" if schedule.num_steps == 1 else f"{schedule.num_steps} steps"
        warn(
            f"only {steps}: {schedule.num_pairs} pairs in batches of {schedule.batch_size}; "
            "for more, lower batch_size or raise num_train_epochs"
        )


def warn_of_late_settings(config: TrainConfig, schedule: Schedule) -> None:
    """Say which settings count in more steps than the run has, and what happens instead."""
    steps = schedule.num_steps
    settings = {
        "logging_steps": "metrics are written at the last step only",
        "eval_steps": "it is evaluated at the last step only",
        "save_steps": "the only checkpoint is that of the last step",
    }
    for name, instead in settings.items():
        if (getattr(config, name) or 0) > steps:
            warn(f"{name} {getattr(config, name)} is more than the run's {steps} steps: {instead}")
    if (config.warmup_steps or 0) >= steps:
        warn(
            f"warmup_steps {config.warmup_steps} leaves nothing of the run's {steps} steps, "
            f"{steps - 1} are used; lower it"
        )
    patience, evaluations = config.early_stopping_patience, schedule.num_evaluations(config)
    # The first evaluation is the best so far, and after the last there is nothing left to stop.
    if patience is not None and patience + 1 >= evaluations:
        warn(
            f"early_stopping_patience {patience} cannot stop a run of {evaluations} evaluations; "
            "lower it or eval_steps"
        )

"""The optimizer steps of a run: how many, which pairs each takes, and by what the adapter moves."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from lowmem_dpo.console import warn
from lowmem_dpo.model.language_model import LanguageModel
from lowmem_dpo.model.lora import lora_parameters
from lowmem_dpo.packs.packing import epoch_order
from lowmem_dpo.records.checkpoints import TrainingState
from lowmem_dpo.settings.groups import OptimizerSettings, RunSettings

FEW_STEPS = 20


@dataclass(frozen=True)
class Batches:
    """How many steps a run has, and which pairs each takes."""

    num_pairs: int
    batch_size: int
    steps_per_epoch: int
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
        return cls(
            num_pairs, settings.batch_size, per_epoch, num_steps, settings.seed, settings.shuffle
        )

    def from_step(self, first_step: int) -> Iterator[list[int]]:
        """Indices of the pairs of each step, from `first_step` to the end."""
        order, order_epoch = list(range(self.num_pairs)), -1
        for step in range(first_step, self.num_steps):
            epoch, place = divmod(step, self.steps_per_epoch)
            if self.shuffle and epoch != order_epoch:
                order, order_epoch = epoch_order(self.num_pairs, self.seed, epoch), epoch
            yield order[place * self.batch_size : (place + 1) * self.batch_size]


def warn_of_short_run(run: RunSettings, warmup_steps: int | None, batches: Batches) -> None:
    """Say before it starts that a run will hardly move the model, or that settings come too late.

    Those count in more steps than the run has; what happens instead is said too.
    """
    steps = batches.num_steps
    if steps < FEW_STEPS:
        warn(
            f"only {'1 step' if steps == 1 else f'{steps} steps'}: {batches.num_pairs} pairs in "
            f"batches of {batches.batch_size}; for more, lower batch_size or raise num_train_epochs"
        )
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


def new_state(settings: OptimizerSettings, model: LanguageModel, num_steps: int) -> TrainingState:
    """The moving parts of a run at its start.

    Args:
        settings: Of the optimizer.
        model: Whose adapter is trained.
        num_steps: Optimizer steps of the run.
    """
    optimizer = make_optimizer(settings, lora_parameters(model.network).values())
    lr_scheduler = make_lr_scheduler(settings, optimizer, num_steps)
    is_scaled = model.dtype == torch.float16
    scaler = torch.amp.GradScaler(model.device.type, enabled=is_scaled)
    return TrainingState(optimizer, lr_scheduler, scaler, model.device)


def check_optimizer(name: str, device: torch.device) -> None:
    """Refuse an optimizer that cannot work on a device.

    Raises:
        ValueError: If it would page where there is nothing to page.
    """
    if name == "paged_adamw_8bit" and device.type != "cuda":
        raise ValueError(f"optim paged_adamw_8bit cannot page on {device.type}; use adamw_8bit")


def make_optimizer(
    settings: OptimizerSettings, parameters: Iterable[nn.Parameter]
) -> torch.optim.Optimizer:
    """The optimizer named by `settings.optim` over the adapter's parameters."""
    if settings.optim == "sgd":
        return torch.optim.SGD(
            parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
    options: dict[str, Any] = {
        "lr": settings.learning_rate,
        "betas": (settings.adam_beta1, settings.adam_beta2),
        "eps": settings.adam_epsilon,
        "weight_decay": settings.weight_decay,
    }
    if settings.optim in ("adamw_8bit", "paged_adamw_8bit"):
        import bitsandbytes as bnb

        is_paged = settings.optim == "paged_adamw_8bit"
        return bnb.optim.AdamW8bit(list(parameters), **options, is_paged=is_paged)
    return torch.optim.AdamW(parameters, **options, fused=True)


def make_lr_scheduler(
    settings: OptimizerSettings, optimizer: torch.optim.Optimizer, num_steps: int
) -> LRScheduler:
    """The schedule named by `settings.lr_scheduler_type`, over `num_steps` optimizer steps."""
    warmup_steps = settings.warmup_steps
    if warmup_steps is None:
        warmup_steps = math.ceil(settings.warmup_ratio * num_steps)
    return get_scheduler(
        settings.lr_scheduler_type,
        optimizer,
        # At least the last step trains: a run of one step would spend it at rate 0.
        num_warmup_steps=min(warmup_steps, num_steps - 1),
        num_training_steps=num_steps,
    )

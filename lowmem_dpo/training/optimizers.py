"""Optimizers and learning-rate schedules by their settings' names."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from lowmem_dpo.model.language_model import LanguageModel
from lowmem_dpo.model.lora import lora_parameters
from lowmem_dpo.records.checkpoints import TrainingState
from lowmem_dpo.settings.groups import OptimizerSettings


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


def check_optimizer(name: str, device: torch.device) -> None:
    """Refuse an optimizer that cannot work on a device.

    Raises:
        ValueError: If it would page where there is nothing to page.
    """
    if name == "paged_adamw_8bit" and device.type != "cuda":
        raise ValueError(f"optim paged_adamw_8bit cannot page on {device.type}; use adamw_8bit")


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

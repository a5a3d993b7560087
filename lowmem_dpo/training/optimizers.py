"""Optimizers and learning-rate schedules by their settings' names."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from lowmem_dpo.settings.configs import TrainConfig


def make_optimizer(
    config: TrainConfig, parameters: Iterable[nn.Parameter]
) -> torch.optim.Optimizer:
    """The optimizer named by `config.optim` over the adapter's parameters."""
    if config.optim == "sgd":
        return torch.optim.SGD(
            parameters, lr=config.learning_rate, weight_decay=config.weight_decay
        )
    settings: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
        "weight_decay": config.weight_decay,
    }
    if config.optim in ("adamw_8bit", "paged_adamw_8bit"):
        import bitsandbytes as bnb

        is_paged = config.optim == "paged_adamw_8bit"
        return bnb.optim.AdamW8bit(list(parameters), **settings, is_paged=is_paged)
    return torch.optim.AdamW(parameters, **settings, fused=True)


def page_state(optimizer: torch.optim.Optimizer) -> None:
    """Put a paged optimizer's moments, loaded from a checkpoint, into paged memory again.

    bitsandbytes loads them into plain device memory, where they would stay.
    """
    if not getattr(optimizer, "is_paged", False):
        return
    new_buffer = optimizer.get_state_buffer  # type: ignore[attr-defined]
    for parameter, state in optimizer.state.items():
        for name in ("state1", "state2"):
            loaded = state[name]
            paged = new_buffer(parameter, dtype=loaded.dtype)
            if parameter.device.type == "cuda":
                torch.cuda.synchronize(parameter.device)  # the buffer is zeroed asynchronously
            state[name] = paged.copy_(loaded)


def make_schedule(
    config: TrainConfig, optimizer: torch.optim.Optimizer, num_steps: int
) -> LRScheduler:
    """The schedule named by `config.lr_scheduler_type`, over `num_steps` optimizer steps."""
    warmup_steps = config.warmup_steps
    if warmup_steps is None:
        warmup_steps = math.ceil(config.warmup_ratio * num_steps)
    return get_scheduler(
        config.lr_scheduler_type,
        optimizer,
        # At least the last step trains: a run of one step would spend it at rate 0.
        num_warmup_steps=min(warmup_steps, num_steps - 1),
        num_training_steps=num_steps,
    )

"""What an optimizer step changes, and with what: optimizer, learning rate, clipping."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import get_scheduler

from lowmem_dpo.records.checkpoints import TrainingState
from lowmem_dpo.settings.groups import OptimizerSettings
from lowmem_dpo.steps.host_optimizer import HOST, HostAdamW, zero_moments


def new_state(
    settings: OptimizerSettings,
    parameters: Sequence[nn.Parameter],
    num_steps: int,
    *,
    is_scaled: bool = False,
    on_host: bool = False,
) -> TrainingState:
    """The moving parts of a run at its start: optimizer, learning rate, scale of the loss.

    Args:
        settings: Of the optimizer.
        parameters: Of the adapter.
        num_steps: Optimizer steps of the run.
        is_scaled: Whether losses are scaled, as float16 needs it.
        on_host: Whether the optimizer, which is adamw then, works in host memory.
    """
    decay = settings.weight_decay
    options: dict[str, Any] = {
        "lr": settings.learning_rate,
        "betas": (settings.adam_beta1, settings.adam_beta2),
        "eps": settings.adam_epsilon,
        "weight_decay": decay,
    }
    optimizer: torch.optim.Optimizer
    assert not on_host or settings.optim == "adamw"
    if settings.optim == "sgd":
        optimizer = torch.optim.SGD(parameters, lr=settings.learning_rate, weight_decay=decay)
    elif settings.optim == "adamw":
        if on_host:
            optimizer = HostAdamW(parameters, **options)
        else:
            optimizer = torch.optim.AdamW(parameters, **options, fused=True)
    else:
        import bitsandbytes as bnb

        is_paged = settings.optim == "paged_adamw_8bit"
        optimizer = bnb.optim.AdamW8bit(parameters, **options, is_paged=is_paged)
    warmup_steps = settings.warmup_steps
    if warmup_steps is None:
        warmup_steps = math.ceil(settings.warmup_ratio * num_steps)
    lr_scheduler = get_scheduler(
        settings.lr_scheduler_type,
        optimizer,
        # At least the last step trains: a run of one step would spend it at rate 0.
        num_warmup_steps=min(warmup_steps, num_steps - 1),
        num_training_steps=num_steps,
    )
    device = parameters[0].device
    scaler = torch.amp.GradScaler(device.type, enabled=is_scaled)
    return TrainingState(optimizer, lr_scheduler, scaler, device)


def allocate_moments(optimizer: torch.optim.Optimizer) -> None:
    """Give Adam the memory of moments that it does not have yet, zeros as its first step would.

    So what a run needs at its peak is seen in the first micro-batch, not after it.
    """
    for group_index, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            if parameter in optimizer.state:  # of a checkpoint
                continue
            if isinstance(optimizer, torch.optim.AdamW):
                device = HOST if isinstance(optimizer, HostAdamW) else parameter.device
                optimizer.state[parameter] = zero_moments(parameter, device)
            elif init_state := getattr(optimizer, "init_state", None):  # of bitsandbytes
                init_state(group, parameter, group_index, index)


def clip_gradients(
    state: TrainingState, parameters: dict[str, nn.Parameter], max_grad_norm: float
) -> Tensor:
    """Scale the gradients down to a norm, 0 for none; gives the norm they had, on the device."""
    state.scaler.unscale_(state.optimizer)
    limit = max_grad_norm or math.inf
    # What torch chooses by itself, but for tensors of a rehearsal.
    foreach = True if state.device.type == "cpu" else None
    return torch.nn.utils.clip_grad_norm_(parameters.values(), limit, foreach=foreach)

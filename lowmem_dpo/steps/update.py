"""What an optimizer step changes, and with what: optimizer, learning rate, clipping."""

import math
from collections.abc import Iterable, Sequence, Set
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from transformers import get_scheduler

from lowmem_dpo.records.checkpoints import TrainingState
from lowmem_dpo.settings.groups import OptimizerSettings
from lowmem_dpo_kernels.triton_support import is_rehearsing

HOST = torch.device("cpu")


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


def allocate_moments(
    optimizer: torch.optim.Optimizer, parameters: Set[nn.Parameter] | None = None
) -> None:
    """Give Adam the memory of moments that it does not have yet, zeros as its first step would.

    So what a run needs at its peak is seen in the first micro-batch, not after it.

    Args:
        optimizer: Whose.
        parameters: Of which; by default of all.
    """
    for group_index, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            is_left_out = parameters is not None and parameter not in parameters
            if is_left_out or parameter in optimizer.state:  # of a checkpoint
                continue
            if isinstance(optimizer, torch.optim.AdamW):
                device = HOST if isinstance(optimizer, HostAdamW) else parameter.device
                optimizer.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=device),
                    "exp_avg": torch.zeros_like(parameter, device=device),
                    "exp_avg_sq": torch.zeros_like(parameter, device=device),
                }
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


class HostAdamW(torch.optim.AdamW):
    """torch's fused AdamW for a CPU, of parameters that are elsewhere.

    The card holds the adapter and its gradients, and no moment of them. A step brings gradients and
    matrices down, updates the matrices here, and sends them up again: 12 bytes a trainable number
    over the link once an optimizer step, for 8 bytes less on the card. The matrices come down anew
    each time, although they are what was last sent up: so whatever else changed them, a checkpoint
    or a starting adapter that was loaded, counts here too.

    To torch it is an AdamW of the device's parameters, so learning rate, clipping, loss scale and
    checkpoints are as with any; a checkpoint of one is good for the other. On a CPU it has the bits
    of `torch.optim.AdamW(fused=True)`; CUDA's kernel rounds otherwise in the last bits.

    Args:
        parameters: fp32, on the device.
        options: Of `torch.optim.AdamW`.

    Attributes:
        buffers: By parameter, where it and its gradient lie for an update; pinned for a card.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], **options: Any) -> None:
        super().__init__(parameters, **options, fused=True)
        # A loss scale counts before the gradients leave the device; then this is a plain step.
        self._step_supports_amp_scaling = False
        self.buffers = {
            parameter: (_host_buffer(parameter), _host_buffer(parameter))
            for group in self.param_groups
            for parameter in group["params"]
        }

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the parameters that have a gradient."""
        assert closure is None
        moved = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        allocate_moments(self, set(chain(*moved)))
        for parameter in chain(*moved):
            here, gradient = self.buffers[parameter]
            # Behind the upload of the step before, which read this memory in the same stream.
            here.copy_(parameter, non_blocking=True)
            gradient.copy_(parameter.grad, non_blocking=True)
        for device in {parameter.device for parameter in chain(*moved)}:
            if device.type == "cuda" and not is_rehearsing():
                torch.cuda.current_stream(device).synchronize()
        for group, parameters in zip(self.param_groups, moved, strict=True):
            self._update(group, parameters)
            for parameter in parameters:
                parameter.copy_(self.buffers[parameter][0], non_blocking=True)

    def _update(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        """Update the host's copies of a group's parameters."""
        states = [self.state[parameter] for parameter in parameters]
        beta1, beta2 = group["betas"]
        adamw(
            [self.buffers[parameter][0] for parameter in parameters],
            [self.buffers[parameter][1] for parameter in parameters],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but the moments go nowhere near the device."""
        super().load_state_dict(state_dict | {"state": {}})
        names = chain(*(group["params"] for group in state_dict["param_groups"]))
        parameters = chain(*(group["params"] for group in self.param_groups))
        for name, parameter in zip(names, parameters, strict=True):
            if moments := state_dict["state"].get(name):
                self.state[parameter] = {key: x.to(HOST, copy=True) for key, x in moments.items()}


def _host_buffer(parameter: nn.Parameter) -> Tensor:
    is_pinned = parameter.device.type == "cuda"
    return torch.empty(parameter.shape, dtype=parameter.dtype, pin_memory=is_pinned)

"""AdamW in host memory: the card holds the adapter and its gradients, and no moment of them.

A step brings gradients and matrices down, updates the matrices here, and sends them up again: 12
bytes a trainable number over the link once an optimizer step, for 8 bytes less on the card.

The matrices come down anew each time, although they are what was last sent up: so whatever else
changed them, a checkpoint or a starting adapter that was loaded, counts here too.
"""

from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from lowmem_dpo_kernels.triton_support import is_rehearsing

HOST = torch.device("cpu")


class HostAdamW(torch.optim.AdamW):
    """torch's fused AdamW for a CPU, of parameters that are elsewhere.

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
        for parameter in chain(*moved):
            here, gradient = self.buffers[parameter]
            # Behind the upload of the step before, which read this memory in the same stream.
            here.copy_(parameter, non_blocking=True)
            gradient.copy_(parameter.grad, non_blocking=True)
            if parameter not in self.state:
                self.state[parameter] = zero_moments(parameter, HOST)
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


def zero_moments(parameter: nn.Parameter, device: torch.device) -> dict[str, Tensor]:
    """What a fused AdamW knows of a parameter before its first step."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device=device),
        "exp_avg": torch.zeros_like(parameter, device=device),
        "exp_avg_sq": torch.zeros_like(parameter, device=device),
    }


def _host_buffer(parameter: nn.Parameter) -> Tensor:
    is_pinned = parameter.device.type == "cuda"
    return torch.empty(parameter.shape, dtype=parameter.dtype, pin_memory=is_pinned)

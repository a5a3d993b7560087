"""What a module needs to be run a second time in the backward pass, and what it can leave out.

Dropout must draw again what it drew: the state of the random generators is saved and restored. And
the value of a last output is not needed where only its gradient is: it is left out, and NaN stands
for it, so that whoever does read it will notice.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

RandomState = tuple[Tensor, Tensor | None]


def random_state(device: torch.device) -> RandomState:
    """States of the CPU's generator and, on a card, of the card's."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(
        device
    ) if device.type == "cuda" else None


class restored:
    """Inside, the generators repeat what followed `state`; afterwards they go on."""

    def __init__(self, state: RandomState, device: torch.device) -> None:
        self.cpu, self.cuda = state
        self.fork = torch.random.fork_rng([device] if device.type == "cuda" else [])
        self.device = device

    def __enter__(self) -> None:
        self.fork.__enter__()
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)

    def __exit__(self, *exception: Any) -> None:
        self.fork.__exit__(*exception)


class CanLeaveOut(Protocol):
    """A module that need not compute its output."""

    output_is_read: bool


@contextmanager
def output_unread(module: CanLeaveOut | None) -> Iterator[None]:
    """Inside, the module returns `unread` for its output; its gradients are the same."""
    if module is None:
        yield
        return
    module.output_is_read = False
    try:
        yield
    finally:
        module.output_is_read = True


def unread(like: Tensor, *shape: int) -> Tensor:
    """NaN in a shape, in the memory of one number; dtype and device are those of `like`."""
    return like.new_full((), torch.nan).expand(shape)

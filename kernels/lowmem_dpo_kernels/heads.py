"""An output head whose weight is not one dense tensor: quantised, or kept in host memory.

The vocabulary is visited in order, slice by slice, once a pass. So a head need not be a tensor: it
need only hand out its slices, each made when its turn comes and forgotten after it.

Shapes: D hidden, V vocabulary, S slice width.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class SlicedWeight(Protocol):
    """A frozen head [V, D] that hands out slices of rows."""

    @property
    def shape(self) -> Sequence[int]:
        """(V, D)."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Of the slices."""
        ...

    @property
    def device(self) -> torch.device:
        """Of the slices."""
        ...

    def slices(self, width: int) -> Iterator[Tensor]:
        """All rows in order, `width` at a time: [S, D], the last may be shorter.

        A slice may be overwritten once the next is asked for, by work that is queued after the work
        queued on the current stream until then. `width` is a multiple of 64.
        """
        ...


Weight = Tensor | SlicedWeight


class FrozenHead(NamedTuple):
    """An output head: logits are softcap(logit_scale * (hidden @ weight.T + bias)).

    Attributes:
        weight: [V, D].
        bias: [V], or None.
        logit_scale: Factor of the logits, after the bias.
        logit_softcap: Cap c of c * tanh(logits / c), after the scale; None for none.
    """

    weight: Weight
    bias: Tensor | None = None
    logit_scale: float = 1.0
    logit_softcap: float | None = None


def weight_slices(weight: Weight, width: int) -> Iterator[Tensor]:
    """The rows of any head in order, `width` at a time."""
    return iter(weight.split(width)) if isinstance(weight, Tensor) else weight.slices(width)

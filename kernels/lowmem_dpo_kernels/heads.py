"""What a pass over an output head works on: the head, one slice of it, and the rows that it scores.

The vocabulary is visited in order, slice by slice, once a pass. So a head need not be one dense
tensor, but may be quantised or kept in host memory: it need only hand out its slices, each made
when its turn comes and forgotten after it. Every path's inner step takes a block of `ScoredRows`
and one `HeadSlice`, and updates the rows in place. The equations are in `token_logps`.

Shapes: T scored tokens or, of a block, B of them; D hidden, V vocabulary, S slice width.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

IGNORED = -100
"""A target that is not scored."""

EXPONENT_HEADROOM = {torch.float16: 10.0}
"""Largest exponent of a softmax weight, in nats, by its type; 0 for others. float16 needs its upper
range too, or it loses the softmax's tail; its maximum is e^11."""


@runtime_checkable
class SlicedWeight(Protocol):
    """A frozen head [V, D] that hands out slices of rows, as a tensor does."""

    @property
    def shape(self) -> Sequence[int]:
        """(V, D)."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the slices."""

    @property
    def device(self) -> torch.device:
        """Of the slices."""

    def split(self, width: int) -> Iterable[Tensor]:
        """All rows in order, `width` at a time: [S, D], the last may be shorter.

        A slice may be overwritten once the next is asked for, by work that is queued after the work
        queued on the current stream until then. `width` is a multiple of 64.
        """


Weight = Tensor | SlicedWeight


class FrozenHead(NamedTuple):
    """An output head: logits are softcap(logit_scale * (hidden @ weight.T + bias))."""

    weight: Weight  # [V, D]
    bias: Tensor | None = None  # [V]
    logit_scale: float = 1.0  # factor of the logits, after the bias
    logit_softcap: float | None = None  # cap c of c * tanh(logits / c), after the scale


class HeadSlice(NamedTuple):
    """Some rows of the head, and what becomes of their logits: bias, then scale, then cap."""

    keys: Tensor  # [S, D] operand type; rows from `width` on are padding
    start: int  # where they begin in the vocabulary
    width: int  # how many they are
    bias: Tensor | None  # [width] fp32
    logit_scale: float
    logit_softcap: float | None


class ScoredRows(NamedTuple):
    """Running statistics of all T rows, or of a block of them.

    The sums leave the target out. They are relative to e^top, on the fused path to 2^top, where top
    is a whole number.
    """

    queries: Tensor  # [T, D] operand type
    targets: Tensor  # [T] int64
    top: Tensor  # [T] fp32, maximum of z_v over v != y so far, less `EXPONENT_HEADROOM`
    rest: Tensor  # [T] fp32, sum of e^z_v over v != y
    target_logit: Tensor  # [T] fp32, z_y; NaN, and so the log-prob, if no slice holds the target
    values: Tensor | None  # [T, D] fp32, sum of e^z_v W_v, times the cap's slope; or no gradient
    target_weights: Tensor | None  # [T, D] operand type, W_y, where it must be caught in passing

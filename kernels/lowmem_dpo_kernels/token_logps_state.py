"""What the pass of `token_logps` keeps of the rows that it scores, and what it brings to them.

Every path's inner step takes a block of `ScoredRows` and one `HeadSlice`, and updates the rows in
place. The equations are in `token_logps`.

Shapes: T scored tokens or, of a block, B of them; D hidden, S slice width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

LN2 = 0.6931471824645996  # rounded to fp32, as in the fused kernels


@dataclass(frozen=True)
class ScoredRows:
    """Running statistics of all T rows, or of a block of them.

    The sums leave the target out. They are relative to e^top, on the fused path to 2^top, where top
    is a whole number.
    """

    queries: Tensor  # [T, D] operand type
    targets: Tensor  # [T] int64
    top: Tensor  # [T] fp32, maximum of z_v over v != y so far, less `exponent_headroom`
    rest: Tensor  # [T] fp32, sum of e^z_v over v != y
    target_logit: Tensor  # [T] fp32, z_y; NaN, and so the log-prob, if no slice holds the target
    values: Tensor | None  # [T, D] fp32, sum of e^z_v W_v, times the cap's slope; or no gradient
    target_weights: Tensor | None  # [T, D] operand type, W_y, where it must be caught in passing

    def block(self, rows: slice) -> "ScoredRows":
        """The same of some rows, in place."""
        return ScoredRows(
            queries=self.queries[rows],
            targets=self.targets[rows],
            top=self.top[rows],
            rest=self.rest[rows],
            target_logit=self.target_logit[rows],
            values=None if self.values is None else self.values[rows],
            target_weights=None if self.target_weights is None else self.target_weights[rows],
        )

    def log_odds(self, path: str) -> Tensor:
        """[T] fp32, d = log(p_y / (1 - p_y)), once all slices have come by."""
        if path != "fused":
            return (self.target_logit - self.top) - self.rest.log()
        # 2^top is a power of two near the maximum: unlike the maximum it is not of z's own grid.
        top = self.top.double() * LN2
        return (self.target_logit.double() - top).float() - self.rest.log()


@dataclass(frozen=True)
class HeadSlice:
    """Some rows of the head, and what becomes of their logits: bias, then scale, then cap."""

    keys: Tensor  # [S, D] operand type; rows from `width` on are padding
    start: int  # where they begin in the vocabulary
    width: int  # how many they are
    bias: Tensor | None  # [width] fp32
    logit_scale: float
    logit_softcap: float | None

    def columns(self, targets: Tensor) -> Tensor:
        """[B] int64, where the targets [B] are; outside [0, width) if another slice holds them."""
        return targets - self.start


def exponent_headroom(dtype: torch.dtype) -> float:
    """Largest exponent of a softmax weight, in nats.

    float16 needs its upper range too, or it loses the softmax's tail; its maximum is e^11.
    """
    return 10.0 if dtype == torch.float16 else 0.0

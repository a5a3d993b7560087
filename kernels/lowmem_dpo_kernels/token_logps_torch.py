"""The row statistics of `token_logps` in plain PyTorch: for CPUs and older cards.

Shapes: B rows of a block, S width of a slice.
"""

import torch
from torch import Tensor


def fold_slice(
    logits: Tensor,
    columns: Tensor,
    top: Tensor,
    rest: Tensor,
    target_logit: Tensor,
    weights: Tensor,
    *,
    with_weights: bool,
    bias: Tensor | None,
    width: int,
    logit_scale: float,
    logit_softcap: float | None,
    headroom: float,
) -> Tensor:
    """Fold one slice of logits into the running statistics of its rows, all in place.

    Args:
        logits: [B, S] fp32, H Wj^T; used up. Columns from `width` on are padding.
        columns: [B] int64, the target's column; outside [0, width) where another slice holds it.
        top: [B] fp32, running maximum of z_v over v != y, less `headroom`.
        rest: [B] fp32, running sum of e^(z_v - top) over v != y.
        target_logit: [B] fp32, z_y once its slice has come by.
        weights: [B, S], may be `logits`; receives e^(z_v - top) times the cap's slope, 0 at y.
        with_weights: Whether the weights are wanted; only the gradient needs them.
        bias: [width] fp32, added to the logits.
        width: Columns that are vocabulary.
        logit_scale: Factor of the logits, after the bias.
        logit_softcap: Cap of the logits, after the scale.
        headroom: Largest exponent, in nats.

    Returns:
        [B] fp32, the factor by which this slice shrinks what was summed before it.
    """
    slope = None
    if bias is not None:
        logits[:, :width].add_(bias)
    if logit_scale != 1.0:
        logits.mul_(logit_scale)
    if logit_softcap is not None:
        logits.div_(logit_softcap).tanh_()
        slope = logits.square().neg_().add_(1.0) if with_weights else None
        logits.mul_(logit_softcap)
    logits[:, width:] = -torch.inf
    inside = (columns >= 0) & (columns < width)
    index = torch.where(inside, columns, 0)[:, None]
    picked = logits.gather(1, index)
    target_logit.copy_(torch.where(inside, picked[:, 0], target_logit))
    logits.scatter_(1, index, torch.where(inside[:, None], -torch.inf, picked))

    new_top = torch.maximum(top, logits.amax(1).sub_(headroom))
    rescale = (top - new_top).exp_()
    top.copy_(new_top)
    logits.sub_(new_top[:, None]).exp_()
    rest.mul_(rescale).add_(logits.sum(1))
    if slope is not None:
        logits.mul_(slope)
    if with_weights and weights.dtype != logits.dtype:
        weights.copy_(logits)
    return rescale

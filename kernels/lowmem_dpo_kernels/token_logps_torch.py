"""The row statistics of `token_logps` in plain PyTorch: for CPUs and older cards.

Shapes: B rows of a block, S width of a slice.
"""

import torch
from torch import Tensor

from lowmem_dpo_kernels.token_logps_state import HeadSlice, ScoredRows, exponent_headroom


def fold_slice(logits: Tensor, weights: Tensor, rows: ScoredRows, head_slice: HeadSlice) -> Tensor:
    """Fold one slice of logits into the running statistics of its rows, all in place.

    Args:
        logits: [B, S] fp32, H Wj^T; used up.
        weights: [B, S] operand type, may be `logits`; with gradient receives e^(z_v - top) times
            the cap's slope, 0 at the target.
        rows: The block; `top`, `rest` and `target_logit` are updated.
        head_slice: The slice that the logits are of.

    Returns:
        [B] fp32, the factor by which this slice shrinks what was summed before it.
    """
    width, logit_softcap = head_slice.width, head_slice.logit_softcap
    with_weights = rows.values is not None
    slope = None
    if head_slice.bias is not None:
        logits[:, :width].add_(head_slice.bias)
    if head_slice.logit_scale != 1.0:
        logits.mul_(head_slice.logit_scale)
    if logit_softcap is not None:
        logits.div_(logit_softcap).tanh_()
        slope = logits.square().neg_().add_(1.0) if with_weights else None
        logits.mul_(logit_softcap)
    logits[:, width:] = -torch.inf
    columns = head_slice.columns(rows.targets)
    inside = (columns >= 0) & (columns < width)
    index = torch.where(inside, columns, 0)[:, None]
    picked = logits.gather(1, index)
    rows.target_logit.copy_(torch.where(inside, picked[:, 0], rows.target_logit))
    logits.scatter_(1, index, torch.where(inside[:, None], -torch.inf, picked))

    largest = logits.amax(1).sub_(exponent_headroom(weights.dtype))
    new_top = torch.maximum(rows.top, largest)
    rescale = (rows.top - new_top).exp_()
    rows.top.copy_(new_top)
    logits.sub_(new_top[:, None]).exp_()
    rows.rest.mul_(rescale).add_(logits.sum(1))
    if slope is not None:
        logits.mul_(slope)
    if with_weights and weights.dtype != logits.dtype:
        weights.copy_(logits)
    return rescale

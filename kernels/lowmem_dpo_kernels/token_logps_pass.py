"""One pass over the vocabulary: every slice of the head to every block of scored rows.

What happens between a slice and a block has three paths: torch, here, for CPUs and older cards;
`token_logps_triton`, which puts another kernel between the same two products; `token_logps_fused`.
What they work on is in `heads`; how slices and blocks meet, and what becomes of the rows at the
end, is here. The equations are in `token_logps`.

A row's bits depend on its own numbers only: rows run in blocks of a fixed height, zero-padded, and
the sides of every product are multiples of 64, since BLAS libraries sum the edges of other shapes
in another order. (The fused path's own products sum every row alike, so it pads no rows.)

Shapes: N packed tokens, T scored tokens, D hidden, V vocabulary, B rows of a block, S slice width.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowmem_dpo_kernels.heads import EXPONENT_HEADROOM, IGNORED, FrozenHead, HeadSlice, ScoredRows
from lowmem_dpo_kernels.triton_support import capability_of

ALIGNMENT = 64
LN2 = 0.6931471824645996  # rounded to fp32

_HALF_PRODUCTS_FROM = {torch.float16: (7, 0), torch.bfloat16: (8, 0)}  # compute capability

logger = logging.getLogger(__name__)


def pass_numerics(device: torch.device, dtype: torch.dtype) -> tuple[int, int, torch.dtype]:
    """Rows B of a block, width S of a slice and the operands' type: never a matter of T.

    Operands are what both products read; they write fp32 (float64 for float64) in any case. Half
    operands with an fp32 result need a CUDA card of compute capability 7.0 (float16) or 8.0
    (bfloat16); elsewhere the head becomes fp32, slice by slice.
    """
    is_cuda, oldest = device.type == "cuda", _HALF_PRODUCTS_FROM.get(dtype)
    if oldest and not (is_cuda and capability_of(device) >= oldest):
        dtype = torch.float32
    # 512 rows fill any card's tiles still; half a block, of what a micro-batch scores, is padding.
    return (512, 8192, dtype) if is_cuda else (256, 2048, dtype)


def run_pass(
    hidden: Tensor, rows: Tensor, targets: Tensor, head: FrozenHead, path: str, *, grads: bool
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities of the targets, and their gradients, in one pass over the head.

    Args:
        hidden: [N, D].
        rows: [T] int64.
        targets: [T] int64, or -100.
        head: In hidden's dtype.
        path: torch, triton or fused.
        grads: Whether the gradients are wanted; log-probs have the same bits either way.

    Returns:
        Log-probs [T] and, if wanted, their gradients g [T, D]; fp32, or float64 for float64.
    """
    weight, num_tokens = head.weight, len(rows)
    catch_targets = grads and not isinstance(weight, Tensor)
    scored = _gather_rows(hidden, rows, targets, path, grads=grads, catch_targets=catch_targets)
    if num_tokens:
        _fold_vocabulary(scored, head, path)
    target_logit, top = scored.target_logit, scored.top
    if path == "fused":
        # 2^top is a power of two near the maximum: unlike the maximum it is not of z's own grid.
        target_logit, top = target_logit.double(), top.double() * LN2
    # d = log(p_y / (1 - p_y))
    log_odds = (target_logit - top).to(scored.rest.dtype) - scored.rest.log()
    ignored = targets == IGNORED
    logps = F.logsigmoid(log_odds)[:num_tokens].masked_fill_(ignored, 0.0)
    if scored.values is None:
        return logps, None
    dim = weight.shape[1]
    grad = scored.values.div_(scored.rest[:, None])[:num_tokens, :dim]
    if isinstance(weight, Tensor):
        target_weights = weight[targets.clamp(0, len(weight) - 1)].to(grad.dtype)
    else:
        assert scored.target_weights is not None
        target_weights = scored.target_weights[:num_tokens, :dim].to(grad.dtype, copy=True)
    if head.logit_softcap is not None:
        ratio = scored.target_logit[:num_tokens, None] / head.logit_softcap
        target_weights.mul_(1.0 - ratio.square())
    torch.sub(target_weights, grad, out=grad)
    factor = head.logit_scale * torch.sigmoid(-log_odds)
    grad.mul_(factor[:num_tokens, None]).masked_fill_(ignored[:, None], 0.0)
    return logps, grad


def _gather_rows(
    hidden: Tensor, rows: Tensor, targets: Tensor, path: str, *, grads: bool, catch_targets: bool
) -> ScoredRows:
    """The scored rows, of which no slice has been seen."""
    num_tokens, dim = len(rows), hidden.shape[1]
    height, _, operand_dtype = pass_numerics(hidden.device, hidden.dtype)
    # Products of torch need one shape; the fused kernels tile the rows themselves.
    padding = 0 if path == "fused" else -num_tokens % height
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    queries = hidden.new_zeros(num_tokens + padding, dim + -dim % ALIGNMENT, dtype=operand_dtype)
    queries[:num_tokens, :dim] = hidden[rows]
    # This waits for the card, but the cards that take this path with float16 (compute capability
    # 7.5) are slow enough not to notice.
    if hidden.dtype == torch.float16 and path == "torch" and not queries.isfinite().all():
        _warn_overflow()
    top = hidden.new_full((len(queries),), torch.finfo(dtype).min, dtype=dtype)
    return ScoredRows(
        queries=queries,
        targets=F.pad(targets, (0, padding), value=IGNORED),
        top=top,
        rest=torch.zeros_like(top),
        target_logit=torch.full_like(top, torch.nan),
        values=torch.zeros_like(queries, dtype=dtype) if grads else None,
        target_weights=torch.zeros_like(queries) if catch_targets else None,
    )


@functools.cache
def _warn_overflow() -> None:
    """Say it where float16 hidden states have overflowed: logits, being fp32, cannot."""
    logger.warning(
        "token_logps: the model's hidden states overflow float16 (largest number 65,504), and the "
        "log-probs of those tokens are NaN; use dtype float32, or a model made for float16"
    )


def _fold_vocabulary(rows: ScoredRows, head: FrozenHead, path: str) -> None:
    """Bring every slice of the head to every block of rows."""
    weight, (vocabulary, dim) = head.weight, head.weight.shape
    height, width, operand_dtype = pass_numerics(weight.device, weight.dtype)
    padded_vocabulary, padded_dim = vocabulary + -vocabulary % ALIGNMENT, rows.queries.shape[1]
    dense = isinstance(weight, Tensor) and weight.dtype == operand_dtype and padded_dim == dim
    # Without weights to keep, the fused path has no need of slices.
    whole = path == "fused" and rows.values is None and dense
    width = padded_vocabulary if whole else min(width, padded_vocabulary)
    fits = dense and (path == "fused" or padded_vocabulary == vocabulary)
    operands = None if fits else rows.queries.new_zeros(width, padded_dim)
    bias = None if head.bias is None else head.bias.to(rows.top.dtype)
    fold = _inner_step(rows, path, height, width)
    blocks = [  # of the same memory
        ScoredRows._make(None if part is None else part[row : row + height] for part in rows)
        for row in range(0, len(rows.queries), height)
    ]
    start = 0
    for part in weight.split(width):
        end, keys = start + len(part), part
        if operands is not None and (part.dtype, part.shape) != (operands.dtype, operands.shape):
            keys = operands[: len(part) + -len(part) % ALIGNMENT]
            keys[: len(part), :dim] = part
            keys[len(part) :] = 0
        part_bias = None if bias is None else bias[start:end]
        head_slice = HeadSlice(
            keys, start, len(part), part_bias, head.logit_scale, head.logit_softcap
        )
        for block in blocks:
            fold(block, head_slice)
            if block.target_weights is not None:
                _catch_targets(block, head_slice)
        start = end


def _catch_targets(block: ScoredRows, head_slice: HeadSlice) -> None:
    """Keep the rows of the head that are a target of this block."""
    assert block.target_weights is not None
    columns = block.targets - head_slice.start
    inside = (columns >= 0) & (columns < head_slice.width)
    caught = head_slice.keys[torch.where(inside, columns, 0)]
    torch.where(inside[:, None], caught, block.target_weights, out=block.target_weights)


def _inner_step(
    rows: ScoredRows, path: str, height: int, width: int
) -> Callable[[ScoredRows, HeadSlice], None]:
    """What brings a slice to a block on a path, with the memory that it works in."""
    if path == "fused":
        from lowmem_dpo_kernels import token_logps_fused as fused  # imports triton

        sizes, workspace = fused.sizes_of(rows.queries), None
        if rows.values is not None:
            num_rows = min(height, len(rows.queries))
            workspace = rows.queries.new_empty(fused.weights_numel(sizes, num_rows, width))
        return functools.partial(fused.fold_slice, workspace=workspace, sizes=sizes)

    statistics = fold_slice
    if path == "triton":
        from lowmem_dpo_kernels import token_logps_triton

        statistics = token_logps_triton.fold_slice
    logits = weights = rows.top.new_empty(height, width)
    if rows.queries.dtype != logits.dtype:
        weights = torch.empty_like(logits, dtype=rows.queries.dtype)
    return functools.partial(
        _fold_by_products, statistics=statistics, logits=logits, weights=weights
    )


def _fold_by_products(
    block: ScoredRows,
    head_slice: HeadSlice,
    statistics: Callable[[Tensor, Tensor, ScoredRows, HeadSlice], Tensor],
    logits: Tensor,
    weights: Tensor,
) -> None:
    """Two products of torch, fp32 where their operands are half, with row statistics between."""
    keys = head_slice.keys
    logits, weights = logits[:, : len(keys)], weights[:, : len(keys)]
    unrounded: Any = {} if logits.dtype == keys.dtype else {"out_dtype": logits.dtype}
    torch.mm(block.queries, keys.T, out=logits, **unrounded)
    rescale = statistics(logits, weights, block, head_slice)
    if block.values is not None:
        values = block.values.mul_(rescale[:, None])
        torch.addmm(values, weights, keys, out=values, **unrounded)


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
    columns = rows.targets - head_slice.start
    inside = (columns >= 0) & (columns < width)
    index = torch.where(inside, columns, 0)[:, None]
    picked = logits.gather(1, index)
    rows.target_logit.copy_(torch.where(inside, picked[:, 0], rows.target_logit))
    logits.scatter_(1, index, torch.where(inside[:, None], -torch.inf, picked))

    largest = logits.amax(1).sub_(EXPONENT_HEADROOM.get(weights.dtype, 0.0))
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

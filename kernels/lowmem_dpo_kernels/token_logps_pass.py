"""One pass over the vocabulary: every slice of the head to every block of scored rows.

What happens between a slice and a block is the path's business (`token_logps_torch`, `_triton`,
`_fused`), what is kept of a row between slices is in `token_logps_state`; how they meet, and what
becomes of the rows at the end, is here. The equations are in `token_logps`.

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

from lowmem_dpo_kernels.checks import IGNORED
from lowmem_dpo_kernels.heads import FrozenHead, weight_slices
from lowmem_dpo_kernels.token_logps_state import HeadSlice, ScoredRows

ALIGNMENT = 64

logger = logging.getLogger(__name__)


_Fold = Callable[[ScoredRows, HeadSlice], None]


def block_and_slice(device: torch.device) -> tuple[int, int]:
    """Rows B of a block and width S of a slice: part of the numerics, so never a matter of T."""
    return (1024, 8192) if device.type == "cuda" else (256, 2048)


def _operand_dtype(hidden: Tensor) -> torch.dtype:
    """The type that both products read. They write fp32 (float64 for float64) in any case.

    Half operands with an fp32 result need a CUDA card of compute capability 7.0 (float16) or 8.0
    (bfloat16); elsewhere the head becomes fp32, slice by slice.
    """
    if hidden.dtype not in (torch.float16, torch.bfloat16):
        return hidden.dtype
    oldest = (7, 0) if hidden.dtype == torch.float16 else (8, 0)
    if hidden.is_cuda and torch.cuda.get_device_capability(hidden.device) >= oldest:
        return hidden.dtype
    return torch.float32


def _pad(length: int, multiple: int = ALIGNMENT) -> int:
    return -(-length // multiple) * multiple


def _gather_rows(
    hidden: Tensor, rows: Tensor, targets: Tensor, path: str, *, grads: bool, catch_targets: bool
) -> ScoredRows:
    """The scored rows, of which no slice has been seen."""
    num_tokens, dim = len(rows), hidden.shape[1]
    # The fused kernels tile the rows themselves; products of torch need one shape.
    height = 1 if path == "fused" else block_and_slice(hidden.device)[0]
    padded_tokens, padded_dim = _pad(num_tokens, height), _pad(dim)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    queries = hidden.new_zeros(padded_tokens, padded_dim, dtype=_operand_dtype(hidden))
    queries[:num_tokens, :dim] = hidden[rows]
    if hidden.dtype == torch.float16 and path == "torch":
        _check_overflow(queries)
    top = hidden.new_full((padded_tokens,), torch.finfo(dtype).min, dtype=dtype)
    return ScoredRows(
        queries=queries,
        targets=F.pad(targets, (0, padded_tokens - num_tokens), value=IGNORED),
        top=top,
        rest=torch.zeros_like(top),
        target_logit=torch.full_like(top, torch.nan),
        values=torch.zeros_like(queries, dtype=dtype) if grads else None,
        target_weights=torch.zeros_like(queries) if grads and catch_targets else None,
    )


def _check_overflow(queries: Tensor) -> None:
    """Say it where float16 hidden states have overflowed: theirs are the NaN among the log-probs.

    Logits cannot overflow, being fp32. This waits for the card, but the cards that take this path
    with float16 (compute capability 7.5) are slow enough not to notice.
    """
    if not queries.isfinite().all():
        _warn_overflow()


@functools.cache
def _warn_overflow() -> None:
    logger.warning(
        "token_logps: the model's hidden states overflow float16 (largest number 65,504), and the "
        "log-probs of those tokens are NaN; use dtype float32, or a model made for float16"
    )


def _operand(part: Tensor, workspace: Tensor | None) -> Tensor:
    """A slice [S, D] of the head in the operands' type, zero-padded to multiples of 64."""
    if workspace is None or (part.dtype == workspace.dtype and part.shape == workspace.shape):
        return part
    operand = workspace[: _pad(len(part))]
    operand[: len(part), : part.shape[1]] = part
    operand[len(part) :] = 0
    return operand


def _multiply(left: Tensor, right: Tensor, out: Tensor, *, add: bool = False) -> None:
    """Write `left @ right` to `out`, or add it, unrounded where `out` is fp32 and they are half."""
    kwargs: dict[str, Any] = {} if out.dtype == left.dtype else {"out_dtype": out.dtype}
    if add:
        torch.addmm(out, left, right, out=out, **kwargs)
    else:
        torch.mm(left, right, out=out, **kwargs)


def _fold_vocabulary(rows: ScoredRows, head: FrozenHead, path: str) -> None:
    """Bring every slice of the head to every block of rows."""
    weight, (vocabulary, dim) = head.weight, head.weight.shape
    height, width = block_and_slice(weight.device)
    bias = None if head.bias is None else head.bias.to(rows.top.dtype)
    has_operands = isinstance(weight, Tensor) and weight.dtype == rows.queries.dtype
    dense = has_operands and _pad(dim) == dim
    # Without weights to keep, the fused path has no need of slices.
    whole = path == "fused" and rows.values is None and dense
    width = _pad(vocabulary) if whole else min(width, _pad(vocabulary))
    fits = dense and (path == "fused" or _pad(vocabulary) == vocabulary)
    workspace = None if fits else rows.queries.new_zeros(width, _pad(dim))
    fold = _fused_fold(rows, height, width) if path == "fused" else _row_fold(rows, path, width)
    start = 0
    for part in weight_slices(weight, width):
        end = start + len(part)
        head_slice = HeadSlice(
            keys=_operand(part, workspace),
            start=start,
            width=len(part),
            bias=None if bias is None else bias[start:end],
            logit_scale=head.logit_scale,
            logit_softcap=head.logit_softcap,
        )
        for row in range(0, len(rows.queries), height):
            block = rows.block(slice(row, row + height))
            fold(block, head_slice)
            if block.target_weights is not None:
                _catch_targets(block, head_slice)
        start = end


def _row_fold(rows: ScoredRows, path: str, width: int) -> _Fold:
    """Two products of torch with the row statistics between them."""
    if path == "torch":
        from lowmem_dpo_kernels.token_logps_torch import fold_slice
    else:  # imports triton
        from lowmem_dpo_kernels.token_logps_triton import fold_slice

    all_logits = rows.top.new_empty(block_and_slice(rows.top.device)[0], width)
    all_weights = all_logits
    if rows.queries.dtype != all_logits.dtype:
        all_weights = torch.empty_like(all_logits, dtype=rows.queries.dtype)

    def fold(block: ScoredRows, head_slice: HeadSlice) -> None:
        keys = head_slice.keys
        logits, weights = all_logits[:, : len(keys)], all_weights[:, : len(keys)]
        _multiply(block.queries, keys.T, out=logits)
        rescale = fold_slice(logits, weights, block, head_slice)
        if block.values is not None:
            values = block.values.mul_(rescale[:, None])
            _multiply(weights, keys, out=values, add=True)

    return fold


def _fused_fold(rows: ScoredRows, height: int, width: int) -> _Fold:
    """Products and statistics in Triton."""
    from lowmem_dpo_kernels import token_logps_fused as fused

    sizes, workspace = fused.sizes_of(rows.queries), None
    if rows.values is not None:
        num_rows = min(height, len(rows.queries))
        workspace = rows.queries.new_empty(fused.weights_numel(sizes, num_rows, width))
    return functools.partial(fused.fold_slice, workspace=workspace, sizes=sizes)


def _catch_targets(block: ScoredRows, head_slice: HeadSlice) -> None:
    """Keep the rows of the head that are a target of this block."""
    assert block.target_weights is not None
    columns = head_slice.columns(block.targets)
    inside = (columns >= 0) & (columns < head_slice.width)
    caught = head_slice.keys[torch.where(inside, columns, 0)]
    torch.where(inside[:, None], caught, block.target_weights, out=block.target_weights)


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
    catch_targets = not isinstance(weight, Tensor)
    scored = _gather_rows(hidden, rows, targets, path, grads=grads, catch_targets=catch_targets)
    if num_tokens:
        _fold_vocabulary(scored, head, path)
    log_odds = scored.log_odds(path)
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

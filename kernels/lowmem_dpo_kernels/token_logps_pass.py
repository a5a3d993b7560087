"""One pass over the vocabulary: every slice of the head to every block of scored rows.

What happens between a slice and a block is the path's business (`token_logps_torch`, `_triton`,
`_fused`); what is kept of a row between slices, and what becomes of it at the end, is here. The
equations are in `token_logps`.

A row's bits depend on its own numbers only: rows run in blocks of a fixed height, zero-padded, and
the sides of every product are multiples of 64, since BLAS libraries sum the edges of other shapes
in another order. (The fused path's own products sum every row alike, so it pads no rows.)

Shapes: N packed tokens, T scored tokens, D hidden, V vocabulary, B rows of a block, S slice width.
"""

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowmem_dpo_kernels import token_logps_torch
from lowmem_dpo_kernels.checks import IGNORED
from lowmem_dpo_kernels.heads import Weight, weight_slices

ALIGNMENT = 64
LN2 = 0.6931471824645996  # rounded to fp32, as in the fused kernels

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _State:
    """Running statistics of T rows; of all of them, or of a block.

    The sums leave the target out and are relative to e^top, on the fused path to 2^top.
    """

    queries: Tensor  # [T, D] operand type
    labels: Tensor  # [T] int64
    top: Tensor  # [T] fp32, maximum so far
    rest: Tensor  # [T] fp32, sum of e^z
    target_logit: Tensor  # [T] fp32, z_y; NaN, and so the log-prob, if no slice holds the target
    values: Tensor | None  # [T, D] fp32, sum of e^z W; None without gradient
    target_rows: Tensor | None  # [T, D] operand type, W_y, where it must be caught in passing

    def block(self, rows: slice) -> "_State":
        """The same of some rows, in place."""
        return _State(
            queries=self.queries[rows],
            labels=self.labels[rows],
            top=self.top[rows],
            rest=self.rest[rows],
            target_logit=self.target_logit[rows],
            values=None if self.values is None else self.values[rows],
            target_rows=None if self.target_rows is None else self.target_rows[rows],
        )

    def log_odds(self, path: str) -> Tensor:
        """[T] fp32, d = log(p_y / (1 - p_y))."""
        if path != "fused":
            return (self.target_logit - self.top) - self.rest.log()
        # 2^top is a power of two near the maximum: unlike the maximum it is not of z's own grid.
        top = self.top.double() * LN2
        return (self.target_logit.double() - top).float() - self.rest.log()


@dataclass(frozen=True)
class _Slice:
    """Some rows of the head, and what becomes of their logits."""

    keys: Tensor  # [S, D] operand type, S padded
    start: int  # where they begin in the vocabulary
    width: int  # how many they are
    bias: Tensor | None  # [width] fp32
    logit_scale: float
    logit_softcap: float | None


_Fold = Callable[[_State, _Slice], None]


def tile(device: torch.device) -> tuple[int, int]:
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


def _start(
    hidden: Tensor, rows: Tensor, targets: Tensor, path: str, *, grads: bool, catch_targets: bool
) -> _State:
    """Gather the scored rows; no slice has been seen."""
    num_tokens, dim = len(rows), hidden.shape[1]
    # The fused kernels tile the rows themselves; products of torch need one shape.
    height = 1 if path == "fused" else tile(hidden.device)[0]
    padded_tokens, padded_dim = _pad(num_tokens, height), _pad(dim)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    queries = hidden.new_zeros(padded_tokens, padded_dim, dtype=_operand_dtype(hidden))
    queries[:num_tokens, :dim] = hidden[rows]
    if hidden.dtype == torch.float16 and path == "torch":
        _check_overflow(queries)
    top = hidden.new_full((padded_tokens,), torch.finfo(dtype).min, dtype=dtype)
    return _State(
        queries=queries,
        labels=F.pad(targets, (0, padded_tokens - num_tokens), value=IGNORED),
        top=top,
        rest=torch.zeros_like(top),
        target_logit=torch.full_like(top, torch.nan),
        values=torch.zeros_like(queries, dtype=dtype) if grads else None,
        target_rows=torch.zeros_like(queries) if grads and catch_targets else None,
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


def _fold_vocabulary(
    state: _State,
    weight: Weight,
    bias: Tensor | None,
    logit_scale: float,
    logit_softcap: float | None,
    path: str,
) -> None:
    """Bring every slice of the head to every block of rows."""
    (height, width), (vocabulary, dim) = tile(weight.device), weight.shape
    operand_dtype = state.queries.dtype
    dense = isinstance(weight, Tensor) and weight.dtype == operand_dtype and _pad(dim) == dim
    # Without weights to keep, the fused path has no need of slices.
    whole = path == "fused" and state.values is None and dense
    width = _pad(vocabulary) if whole else min(width, _pad(vocabulary))
    fits = dense and (path == "fused" or _pad(vocabulary) == vocabulary)
    workspace = None if fits else state.queries.new_zeros(width, _pad(dim))
    fold = _fused_fold(state, height, width) if path == "fused" else _row_fold(state, path, width)
    start = 0
    for part in weight_slices(weight, width):
        end = start + len(part)
        piece = _Slice(
            keys=_operand(part, workspace),
            start=start,
            width=len(part),
            bias=None if bias is None else bias[start:end],
            logit_scale=logit_scale,
            logit_softcap=logit_softcap,
        )
        for row in range(0, len(state.queries), height):
            block = state.block(slice(row, row + height))
            fold(block, piece)
            if block.target_rows is not None:
                _catch_targets(block, piece)
        start = end


def _row_fold(state: _State, path: str, width: int) -> _Fold:
    """Two products of torch with the row statistics between them."""
    logits = state.top.new_empty(tile(state.top.device)[0], width)
    weights = logits
    if state.queries.dtype != logits.dtype:
        weights = torch.empty_like(logits, dtype=state.queries.dtype)
    # float16 needs its upper range too, or it loses the softmax's tail; its maximum is e^11.
    headroom = 10.0 if weights.dtype == torch.float16 else 0.0
    fold_slice = _fold_function(path)

    def fold(block: _State, piece: _Slice) -> None:
        tile, tile_weights = logits[:, : len(piece.keys)], weights[:, : len(piece.keys)]
        _multiply(block.queries, piece.keys.T, out=tile)
        rescale = fold_slice(
            tile,
            block.labels - piece.start,
            block.top,
            block.rest,
            block.target_logit,
            tile_weights,
            with_weights=block.values is not None,
            bias=piece.bias,
            width=piece.width,
            logit_scale=piece.logit_scale,
            logit_softcap=piece.logit_softcap,
            headroom=headroom,
        )
        if block.values is not None:
            values = block.values.mul_(rescale[:, None])
            _multiply(tile_weights, piece.keys, out=values, add=True)

    return fold


def _fused_fold(state: _State, height: int, width: int) -> _Fold:
    """Products and statistics in Triton."""
    from lowmem_dpo_kernels import token_logps_fused as fused

    tiles, workspace = fused.tiles_of(state.queries), None
    if state.values is not None:
        num_rows = min(height, len(state.queries))
        workspace = state.queries.new_empty(fused.weights_numel(tiles, num_rows, width))

    def fold(block: _State, piece: _Slice) -> None:
        fused.fold_slice(
            block.queries,
            piece.keys,
            block.labels - piece.start,
            block.top,
            block.rest,
            block.target_logit,
            block.values,
            workspace,
            tiles=tiles,
            bias=piece.bias,
            width=piece.width,
            logit_scale=piece.logit_scale,
            logit_softcap=piece.logit_softcap,
        )

    return fold


def _fold_function(path: str) -> Callable[..., Tensor]:
    if path == "torch":
        return token_logps_torch.fold_slice
    from lowmem_dpo_kernels import token_logps_triton

    return token_logps_triton.fold_slice


def _catch_targets(block: _State, piece: _Slice) -> None:
    """Keep the rows of the head that are a target of this block."""
    assert block.target_rows is not None
    columns = block.labels - piece.start
    inside = (columns >= 0) & (columns < piece.width)
    caught = piece.keys[torch.where(inside, columns, 0)]
    torch.where(inside[:, None], caught, block.target_rows, out=block.target_rows)


def score(
    with_grads: bool,
    hidden: Tensor,
    rows: Tensor,
    weight: Weight,
    targets: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    logit_softcap: float | None,
    path: str,
) -> tuple[Tensor, Tensor | None]:
    """Score rows in one pass.

    Args:
        with_grads: Whether the gradients are wanted; log-probs have the same bits either way.
        hidden: [N, D].
        rows: [T] int64.
        weight: [V, D] in hidden's dtype.
        targets: [T] int64, or -100.
        bias: [V] in hidden's dtype, or None.
        logit_scale: Factor of the logits, after the bias.
        logit_softcap: Cap of the logits, after the scale; None for none.
        path: torch, triton or fused.

    Returns:
        Log-probs [T] and, if wanted, their gradients g [T, D]; fp32, or float64 for float64.
    """
    catch_targets = not isinstance(weight, Tensor)
    state = _start(hidden, rows, targets, path, grads=with_grads, catch_targets=catch_targets)
    bias = None if bias is None else bias.to(state.top.dtype)
    if len(rows):
        _fold_vocabulary(state, weight, bias, logit_scale, logit_softcap, path)
    log_odds = state.log_odds(path)
    ignored = state.labels == IGNORED
    logps = F.logsigmoid(log_odds).masked_fill_(ignored, 0.0)[: len(rows)]
    if state.values is None:
        return logps, None
    dim = weight.shape[1]
    factor = logit_scale * torch.sigmoid(-log_odds)
    grads = state.values.div_(state.rest[:, None])[: len(rows), :dim]
    if isinstance(weight, Tensor):
        target_rows = weight[targets.clamp(0, len(weight) - 1)].to(grads.dtype)
    else:
        assert state.target_rows is not None
        target_rows = state.target_rows[: len(rows), :dim].to(grads.dtype, copy=True)
    if logit_softcap is not None:
        slope = 1.0 - (state.target_logit[: len(rows), None] / logit_softcap).square()
        target_rows.mul_(slope)
    torch.sub(target_rows, grads, out=grads)
    grads.mul_(factor[: len(rows), None]).masked_fill_(ignored[: len(rows), None], 0.0)
    return logps, grads

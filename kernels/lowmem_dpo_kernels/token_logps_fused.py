"""`token_logps` with its row statistics inside the product: no logit is ever written.

A program multiplies a tile of rows by a tile of the head, H Wj^T, and folds the tile while it is in
registers: its maximum, its sum of e^z and the target's logit go out, and, if the gradient is
wanted, the softmax weights in the type of the second product. Three kernels:

    _score_tile   a tile of logits to its statistics, and its weights E = e^z / 2^m, 2^m >= max e^z
    _fold_tiles   top and rest of every row, tile after tile in the order of the vocabulary
    _add_values   values = values * shrink + sum over tiles 2^(m - top) E W

Without gradient the second product and E are left out, and the whole vocabulary may go through in
one launch: 2 T D V FLOPs, and 8 bytes a row and tile (T V / 16 for tiles of 128) in place of the
logits' 4 T V.

A tile's exponent m is a whole number, so every change of reference is a product with a power of
two, which rounds nothing. So the sums have the same bits however the vocabulary is cut into slices,
and however the fold is compiled; what is compiled for `_score_tile` does not depend on whether
weights are wanted. So logits, and log-probs, have the same bits with and without gradient.

Replaces: what `token_logps_triton.fold_slice` stands between, and both products.
FLOPs: 4 T D V, as there. Bytes saved: 8 a logit (fp32, written and read).
Deterministic: every number is written by one program; no atomics, no locks.

Shapes: B rows of a block, S width of a slice, D hidden, J tiles of a slice.
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowmem_dpo_kernels.heads import HeadSlice, ScoredRows
from lowmem_dpo_kernels.token_logps_pass import LN2
from lowmem_dpo_kernels.token_logps_triton import soft_capped
from lowmem_dpo_kernels.triton_support import capability_of, launch

INTERPRETED = triton.knobs.runtime.interpret  # kernels run on the CPU, for tests
_LN2 = tl.constexpr(LN2)
LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234663852886e38)


@dataclass(frozen=True)
class LaunchSizes:
    """How the two products are launched on one kind of card."""

    rows: int  # of a tile, of both products
    columns: int  # vocabulary of a tile of logits; part of the numerics, as `rows` is not
    score_step: int  # D that the first product takes at a time
    dims: int  # D of a tile of values
    value_step: int  # vocabulary that the second product takes at a time; divides `columns`
    num_warps: int  # of both
    num_stages: int  # of both


# For half operands. They fit shared memory and spill nothing, which tiles of 128 x 256 do (up to
# 650 bytes a thread); none is measured on a card yet.
HALF_SIZES = LaunchSizes(128, 128, 64, 128, 64, 8, 3)
LARGE_CARDS = ((8, 0), (9, 0), (10, 0))  # 163 KiB of shared memory and more: room for a stage more
FP32_SIZES = LaunchSizes(64, 64, 32, 64, 32, 4, 2)  # exact fp32 products use no tensor cores
FOLD_ROWS = 128


def sizes_for(capability: tuple[int, int], dtype: torch.dtype) -> LaunchSizes:
    """What is launched on a card of a compute capability, for operands of a type."""
    if dtype == torch.float32:
        return FP32_SIZES
    return replace(HALF_SIZES, num_stages=4) if capability in LARGE_CARDS else HALF_SIZES


def sizes_of(queries: Tensor) -> LaunchSizes:
    """Those for the card that holds `queries`; the interpreter has no card."""
    if queries.device.type != "cuda":
        return FP32_SIZES
    return sizes_for(capability_of(queries.device), queries.dtype)


@triton.jit
def _power_of_two(exponent):
    """2^exponent, exact, for whole exponents <= 0; 0 from -127 down."""
    bits = (tl.maximum(exponent, -127.0).to(tl.int32) + 127) << 23
    return bits.to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["num_rows", "width", "with_weights"])
def _score_tile_kernel(
    queries_ptr,  # [B, D]
    keys_ptr,  # [S, D]
    bias_ptr,  # [S] fp32
    columns_ptr,  # [B] int64
    weights_ptr,  # [B, J * COLUMNS] operand type, written if with_weights
    tile_top_ptr,  # [J, B] fp32, written
    tile_rest_ptr,  # [J, B] fp32, written
    target_logit_ptr,  # [B] fp32, written in the row's own tile
    queries_stride,
    keys_stride,
    weights_stride,
    num_rows,
    width,
    dim,
    with_weights,  # 0 or 1
    logit_scale,
    logit_softcap,
    headroom,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    UPCAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    # Row tiles run fastest: programs at work together share a tile of the head in the cache.
    first_row, first = tl.program_id(0) * ROWS, tl.program_id(1) * COLUMNS
    row, offsets, step = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, STEP)
    num_rows_here, width_here = num_rows - first_row, width - first
    # int64 up to the tile, int32 inside. Past the end the last row is read again, which needs no
    # mask in the loop; D is whole steps.
    queries_at = queries_ptr + tl.cast(first_row, tl.int64) * queries_stride
    keys_at = keys_ptr + tl.cast(first, tl.int64) * keys_stride
    queries_row, keys_row = tl.minimum(row, num_rows_here - 1), tl.minimum(offsets, width_here - 1)
    queries_offset = queries_row[:, None] * queries_stride + step[None, :]
    keys_offset = keys_row[None, :] * keys_stride + step[:, None]
    z = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, dim, STEP):
        queries = tl.load(queries_at + start + queries_offset)
        keys = tl.load(keys_at + start + keys_offset)
        if UPCAST:
            queries, keys = queries.to(tl.float32), keys.to(tl.float32)
        z = tl.dot(queries, keys, z, input_precision="ieee")

    valid, valid_row = offsets < width_here, row < num_rows_here
    if HAS_BIAS:
        z += tl.load(bias_ptr + first + offsets, mask=valid, other=0.0)[None, :]
    z *= logit_scale
    slope = 1.0
    if HAS_SOFTCAP:
        z, slope = soft_capped(z, logit_softcap)
    column = tl.load(columns_ptr + first_row + row, mask=valid_row, other=-1) - first
    has_target = (column >= 0) & (column < tl.minimum(width_here, COLUMNS))
    column = tl.where(has_target, column, -1).to(tl.int32)
    is_target = offsets[None, :] == column[:, None]
    target_logit = tl.sum(tl.where(is_target, z, 0.0), axis=1)
    tl.store(target_logit_ptr + first_row + row, target_logit, mask=has_target)
    z = tl.where(is_target | (offsets >= width_here)[None, :], -float("inf"), z)

    top = tl.maximum(tl.ceil(tl.max(z, axis=1) * LOG2E) - headroom, LOWEST)
    weights = tl.exp(z - (top * _LN2)[:, None])
    at = tl.cast(tl.program_id(1), tl.int64) * num_rows + first_row + row
    tl.store(tile_top_ptr + at, top, mask=valid_row)
    tl.store(tile_rest_ptr + at, tl.sum(weights, axis=1), mask=valid_row)
    weights_at = weights_ptr + tl.cast(first_row, tl.int64) * weights_stride + first
    weights = (weights * slope).to(weights_ptr.dtype.element_ty)
    is_written = row < num_rows_here * with_weights
    weights_offset = row[:, None] * weights_stride + offsets[None, :]
    tl.store(weights_at + weights_offset, weights, mask=is_written[:, None])


@triton.jit(do_not_specialize=["num_rows", "num_tiles"])
def _fold_tiles_kernel(
    tile_top_ptr,  # [J, B] fp32
    tile_rest_ptr,  # [J, B] fp32
    top_ptr,  # [B] fp32, updated
    rest_ptr,  # [B] fp32, updated
    shrink_ptr,  # [B] fp32, written
    num_rows,
    num_tiles,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = row < num_rows
    before = tl.load(top_ptr + row, mask=valid, other=0.0)
    top, rest = before, tl.load(rest_ptr + row, mask=valid, other=0.0)
    for tile in range(num_tiles):
        at = tl.cast(tile, tl.int64) * num_rows + row
        tile_top = tl.load(tile_top_ptr + at, mask=valid, other=0.0)
        tile_rest = tl.load(tile_rest_ptr + at, mask=valid, other=0.0)
        new_top = tl.maximum(top, tile_top)
        rest = rest * _power_of_two(top - new_top) + tile_rest * _power_of_two(tile_top - new_top)
        top = new_top
    tl.store(top_ptr + row, top, mask=valid)
    tl.store(rest_ptr + row, rest, mask=valid)
    tl.store(shrink_ptr + row, _power_of_two(before - top), mask=valid)


@triton.jit(do_not_specialize=["num_rows", "width"])
def _add_values_kernel(
    weights_ptr,  # [B, J * COLUMNS] operand type
    keys_ptr,  # [S, D]
    tile_top_ptr,  # [J, B] fp32
    top_ptr,  # [B] fp32
    shrink_ptr,  # [B] fp32
    values_ptr,  # [B, D] fp32, updated
    weights_stride,
    keys_stride,
    values_stride,
    num_rows,
    width,
    dim,
    UPCAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DIMS: tl.constexpr,
    STEP: tl.constexpr,
):
    first_row, first_dim = tl.program_id(0) * ROWS, tl.program_id(1) * DIMS
    row, dims, step = tl.arange(0, ROWS), tl.arange(0, DIMS), tl.arange(0, STEP)
    valid, valid_dims = row < num_rows - first_row, dims < dim - first_dim
    safe_row = tl.minimum(row, num_rows - first_row - 1)
    safe_dims = tl.minimum(dims, dim - first_dim - 1)
    top = tl.load(top_ptr + first_row + safe_row)
    shrink = tl.load(shrink_ptr + first_row + safe_row)
    values_at = values_ptr + tl.cast(first_row, tl.int64) * values_stride + first_dim
    values_at += row[:, None] * values_stride + dims[None, :]
    written = valid[:, None] & valid_dims[None, :]
    values = tl.load(values_at, mask=written, other=0.0) * shrink[:, None]
    weights_at = weights_ptr + tl.cast(first_row, tl.int64) * weights_stride
    weights_offset = safe_row[:, None] * weights_stride + step[None, :]
    for start in range(0, width, STEP):
        tile = tl.cast(start // COLUMNS, tl.int64)
        tile_top = tl.load(tile_top_ptr + tile * num_rows + first_row + safe_row)
        # Weights past the width are zeros, so any row of the head will do beside them.
        keys_row = tl.minimum(step, width - start - 1)
        keys_at = keys_ptr + tl.cast(start, tl.int64) * keys_stride + first_dim
        keys = tl.load(keys_at + keys_row[:, None] * keys_stride + safe_dims[None, :])
        weights = tl.load(weights_at + start + weights_offset).to(tl.float32)
        weights *= _power_of_two(tile_top - top)[:, None]
        if UPCAST:
            keys = keys.to(tl.float32)
        else:
            weights = weights.to(keys_ptr.dtype.element_ty)
        values = tl.dot(weights, keys, values, input_precision="ieee")
    tl.store(values_at, values, mask=written)


def fold_slice(
    rows: ScoredRows, head_slice: HeadSlice, workspace: Tensor | None, sizes: LaunchSizes
) -> None:
    """Bring one slice of the head to one block of rows.

    Args:
        rows: The block; D a multiple of 64. What it sums is updated in place.
        head_slice: The slice, in queries' type.
        workspace: At least `weights_numel` numbers of queries' type; None without gradient.
        sizes: From `sizes_of`.
    """
    queries, keys, values = rows.queries, head_slice.keys, rows.values
    num_rows, dim = queries.shape
    width, logit_softcap = head_slice.width, head_slice.logit_softcap
    num_tiles = triton.cdiv(width, sizes.columns)
    # Two tensors, not halves of one: a pointer's alignment is part of what is compiled.
    tile_top, tile_rest = (rows.top.new_empty(num_tiles, num_rows) for _ in range(2))
    shrink = torch.empty_like(rows.top)
    row_tiles = triton.cdiv(num_rows, sizes.rows)
    if workspace is None:  # never read or written; its type is part of what is compiled
        weights = queries
    else:
        shape = num_rows, num_tiles * sizes.columns
        weights = workspace[: shape[0] * shape[1]].view(shape)
    shared = {
        # Triton's interpreter computes wrong numbers in bfloat16.
        "UPCAST": INTERPRETED and queries.dtype == torch.bfloat16,
        "ROWS": sizes.rows,
        "COLUMNS": sizes.columns,
        "num_warps": sizes.num_warps,
        "num_stages": sizes.num_stages,
        "enable_fp_fusion": True,  # Triton's default varies with its version and environment
    }
    product_flops = 2.0 * num_rows * width * dim
    launch(
        _score_tile_kernel,
        (row_tiles, num_tiles),
        queries,
        keys,
        rows.top if head_slice.bias is None else head_slice.bias,
        rows.targets - head_slice.start,
        *(weights, tile_top, tile_rest, rows.target_logit),
        *(queries.stride(0), keys.stride(0), weights.stride(0), num_rows, width, dim),
        int(values is not None),
        head_slice.logit_scale,
        1.0 if logit_softcap is None else logit_softcap,
        # float16 needs its upper range too, or it loses the softmax's tail.
        15.0 if queries.dtype == torch.float16 else 0.0,
        HAS_BIAS=head_slice.bias is not None,
        HAS_SOFTCAP=logit_softcap is not None,
        STEP=sizes.score_step,
        flops=product_flops,
        **shared,
    )
    launch(
        _fold_tiles_kernel,
        (triton.cdiv(num_rows, FOLD_ROWS),),
        *(tile_top, tile_rest, rows.top, rows.rest, shrink, num_rows, num_tiles),
        ROWS=FOLD_ROWS,
        enable_fp_fusion=True,
    )
    if values is None:
        return
    launch(
        _add_values_kernel,
        (row_tiles, triton.cdiv(dim, sizes.dims)),
        *(weights, keys, tile_top, rows.top, shrink, values),
        *(weights.stride(0), keys.stride(0), values.stride(0), num_rows, width, dim),
        DIMS=sizes.dims,
        STEP=sizes.value_step,
        flops=product_flops,
        **shared,
    )


def weights_numel(sizes: LaunchSizes, num_rows: int, width: int) -> int:
    """Numbers that the softmax weights of a block take; see `fold_slice`."""
    return num_rows * triton.cdiv(width, sizes.columns) * sizes.columns

"""The row kernels of `rms_norm`: a program a few rows, each read once and written once.

Bytes: forward x and y; backward dy, x and dx: 2 and 3 times those of x, where ordinary operations
move about 20 in fp32. Nothing is summed over rows, since the weight is frozen: a row has the same
bits whatever the others are.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from lowmem_dpo_kernels.rms_norm import NormKind
from lowmem_dpo_kernels.triton_support import launch

_TILE_NUMBERS = 1024  # of a program, where rows are shorter


@triton.jit
def _tile(num_rows, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """A program's rows and columns, where their numbers lie, and which of them are there."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    at = row[:, None] * D + column[None, :]
    valid = (row < num_rows)[:, None] & (column < D)[None, :]
    return row, column, at, valid


@triton.jit
def _load_weight(weight_ptr, column, offset, D: tl.constexpr):
    return tl.load(weight_ptr + column, mask=column < D, other=0.0).to(tl.float32) + offset


@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm_fwd_kernel(
    x_ptr,  # [M, D]
    weight_ptr,  # [D]
    out_ptr,  # [M, D]
    rstd_ptr,  # [M] fp32
    num_rows,
    eps,
    offset,
    D: tl.constexpr,
    ROUNDS_FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row, column, at, valid = _tile(num_rows, D, ROWS, WIDTH)
    x = tl.load(x_ptr + at, mask=valid, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)
    weight = _load_weight(weight_ptr, column, offset, D)
    normed = x * rstd[:, None]
    if ROUNDS_FIRST:
        normed = normed.to(out_ptr.dtype.element_ty).to(tl.float32)
    out = normed * weight[None, :]
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=valid)
    tl.store(rstd_ptr + row, rstd, mask=row < num_rows)


@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm_bwd_kernel(
    grad_out_ptr,  # [M, D]
    x_ptr,  # [M, D]
    weight_ptr,  # [D]
    rstd_ptr,  # [M] fp32
    grad_x_ptr,  # [M, D]
    num_rows,
    offset,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row, column, at, valid = _tile(num_rows, D, ROWS, WIDTH)
    rstd = tl.load(rstd_ptr + row, mask=row < num_rows, other=0.0)[:, None]
    normed = tl.load(x_ptr + at, mask=valid, other=0.0).to(tl.float32) * rstd
    weight = _load_weight(weight_ptr, column, offset, D)
    grad = tl.load(grad_out_ptr + at, mask=valid, other=0.0).to(tl.float32) * weight[None, :]
    mean = tl.sum(grad * normed, axis=1) / D
    grad_x = (grad - normed * mean[:, None]) * rstd
    tl.store(grad_x_ptr + at, grad_x.to(grad_x_ptr.dtype.element_ty), mask=valid)


def forward(x: Tensor, weight: Tensor, kind: NormKind, out: Tensor, rstd: Tensor) -> None:
    """Normalise rows: x [M, D] to out [M, D], both contiguous, and rstd [M] fp32; written."""
    grid, options = _options(x)
    arguments = (x, weight, out, rstd, len(x), kind.eps, kind.offset)
    launch(_rms_norm_fwd_kernel, grid, *arguments, ROUNDS_FIRST=kind.rounds_first, **options)


def backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, kind: NormKind, rstd: Tensor, grad_x: Tensor
) -> None:
    """Gradient of x, to grad_x; all [M, D] are contiguous, rstd is `forward`'s."""
    grid, options = _options(x)
    arguments = (grad_out, x, weight, rstd, grad_x, len(x), kind.offset)
    launch(_rms_norm_bwd_kernel, grid, *arguments, **options)


def _options(x: Tensor) -> tuple[tuple[int], dict[str, Any]]:
    """The grid, and how the kernels are launched: by the row's length alone."""
    width = triton.next_power_of_2(x.shape[1])
    rows = max(1, _TILE_NUMBERS // width)
    num_warps = min(16, max(1, rows * width // 512))
    options = {
        "D": x.shape[1],
        "ROWS": rows,
        "WIDTH": width,
        "num_warps": num_warps,
        "enable_fp_fusion": True,  # Triton's default varies with its version and environment
    }
    return (triton.cdiv(len(x), rows),), options

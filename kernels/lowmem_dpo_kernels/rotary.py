"""Rotary position embedding of queries or keys, in one kernel each way.

    out = (x1 cos - x2 sin, x2 cos + x1 sin),  x = (x1, x2) the halves of a head

The gradient is rotated back, by -sin. Products are rounded before they are added, which gives the
bits of PyTorch's operations. Those move 9 numbers for each of x forward, this 2 each way.

Shapes: N tokens, H heads, E head size.
Source: Su et al. (arXiv 2104.09864), in the halves of transformers' `rotate_half`.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from lowmem_dpo_kernels.triton_support import launch


@triton.jit
def _rotary_kernel(
    x_ptr,  # [N, H, E]
    cos_ptr,  # [N, E], of which the first half is read
    sin_ptr,  # [N, E]
    out_ptr,  # [N, H, E], without gaps
    token_stride,
    head_stride,
    sign,  # of the angle
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head, column = tl.arange(0, ROWS)[:, None], tl.arange(0, WIDTH)[None, :]
    at = token * 2 * HALF + column
    cos = tl.load(cos_ptr + at, mask=column < HALF, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + at, mask=column < HALF, other=0.0).to(tl.float32) * sign
    valid = (head < HEADS) & (column < HALF)
    dtype = out_ptr.dtype.element_ty
    at = x_ptr + token * token_stride + head * head_stride + column
    first = tl.load(at, mask=valid, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask=valid, other=0.0).to(tl.float32)
    low = (first * cos).to(dtype).to(tl.float32) - (second * sin).to(dtype).to(tl.float32)
    high = (second * cos).to(dtype).to(tl.float32) + (first * sin).to(dtype).to(tl.float32)
    at = out_ptr + (token * HEADS + head) * 2 * HALF + column
    tl.store(at, low.to(dtype), mask=valid)
    tl.store(at + HALF, high.to(dtype), mask=valid)


def _launch(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    x = x if x.stride(2) == 1 else x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, width = (triton.next_power_of_2(n) for n in (x.shape[1], x.shape[2] // 2))
    launch(
        _rotary_kernel,
        (len(x),),
        *(x, cos, sin, out, *x.stride()[:2], sign, x.shape[1], x.shape[2] // 2, rows, width),
        num_warps=min(8, max(1, rows * width // 512)),
        enable_fp_fusion=False,  # products are rounded before they are added
    )
    return out


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _launch(x, cos, sin, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _launch(grad, cos, sin, -1.0), None, None


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate [N, H, E], which may be strided, on CUDA; cos and sin are [N, E], of like halves.

    Raises:
        ValueError: If cos or sin does not fit x, or has gaps.
    """
    for table in (cos, sin):
        if table.shape != (len(x), x.shape[2]) or x.shape[2] % 2 or not table.is_contiguous():
            raise ValueError(f"cos and sin must be [N, E], E even, got {list(table.shape)}")
    return _Rotary.apply(x, cos, sin)

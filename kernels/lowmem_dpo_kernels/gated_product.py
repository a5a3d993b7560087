"""What a gated MLP does between its products, SwiGLU or GeGLU, in one kernel each way.

    out = act(gate) * up,  dup = act(gate) * dout,  dgate = act'(gate) * (up * dout)

Keeps gate and up alone; act(gate) is computed again, and dgate is written over dout. act(gate) and
up * dout are rounded to the operands' type in between, as PyTorch's operations round them. Numbers
moved for each of out: forward 3 and backward 5, by PyTorch's operations 5 and 11; a dozen FLOPs
each way, in fp32. A program takes some columns of one row; gate and up may be halves of one tensor.

Shapes: M rows, I the intermediate size.
Source: Shazeer (arXiv 2002.05202).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from lowmem_dpo_kernels.triton_support import launch

ACTIVATIONS = ("silu", "gelu_tanh")  # the second is GELU's approximation by a hyperbolic tangent
BLOCK = 1024  # columns of a program: 16 bytes of a half type for each of its threads


@triton.jit
def _activated(x, IS_SILU: tl.constexpr):
    """The activation of x, fp32, and its slope: x * sigmoid(inner) in either case."""
    if IS_SILU:
        inner, inner_slope = x, 1.0
    else:
        # (1 + tanh(u)) / 2 = sigmoid(2 u), which keeps its digits where tanh(u) nears -1.
        square = x * x  # 1.5957691216 is 2 * sqrt(2 / pi)
        inner = 1.5957691216 * (x + 0.044715 * square * x)
        inner_slope = 1.5957691216 * (1.0 + 0.134145 * square)
    sigmoid = 1.0 / (1.0 + tl.exp(-inner))
    return x * sigmoid, sigmoid * (1.0 + x * (1.0 - sigmoid) * inner_slope)


@triton.jit
def _load(ptr, row, stride, column, valid):
    return tl.load(ptr + row * stride + column, mask=valid, other=0.0).to(tl.float32)


@triton.jit
def _gated_product_fwd_kernel(
    gate_ptr,  # [M, I]
    up_ptr,  # [M, I]
    out_ptr,  # [M, I], without gaps
    gate_stride,
    up_stride,
    num_columns,
    IS_SILU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = column < num_columns
    value, _ = _activated(_load(gate_ptr, row, gate_stride, column, valid), IS_SILU)
    value = value.to(out_ptr.dtype.element_ty).to(tl.float32)
    out = value * _load(up_ptr, row, up_stride, column, valid)
    tl.store(out_ptr + row * num_columns + column, out.to(out_ptr.dtype.element_ty), mask=valid)


@triton.jit
def _gated_product_bwd_kernel(
    grad_ptr,  # [M, I], without gaps; that of out on entry, that of gate on return
    gate_ptr,  # [M, I]
    up_ptr,  # [M, I]
    grad_up_ptr,  # [M, I], without gaps
    gate_stride,
    up_stride,
    num_columns,
    IS_SILU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = column < num_columns
    dtype = grad_ptr.dtype.element_ty
    value, slope = _activated(_load(gate_ptr, row, gate_stride, column, valid), IS_SILU)
    grad = _load(grad_ptr, row, num_columns, column, valid)
    grad_up = value.to(dtype).to(tl.float32) * grad
    grad = (grad * _load(up_ptr, row, up_stride, column, valid)).to(dtype).to(tl.float32)
    at = row * num_columns + column
    tl.store(grad_up_ptr + at, grad_up.to(dtype), mask=valid)
    tl.store(grad_ptr + at, (grad * slope).to(dtype), mask=valid)


def _launch(
    kernel: Any, before: tuple[Tensor, ...], gate: Tensor, up: Tensor, out: Tensor, activation: str
) -> None:
    """Run a kernel over the rows of gate and up; copies are made only of rows with gaps."""
    gates, ups = (
        part if part.stride(1) == 1 else part.contiguous()
        for part in (part.reshape(-1, part.shape[-1]) for part in (gate, up))
    )
    num_rows, num_columns = gates.shape
    launch(
        kernel,
        (num_rows, triton.cdiv(num_columns, BLOCK)),
        *(*before, gates, ups, out, gates.stride(0), ups.stride(0), num_columns),
        IS_SILU=activation == "silu",
        BLOCK=BLOCK,
        num_warps=4,
        enable_fp_fusion=True,  # Triton's default varies with its version and environment
    )


class _GatedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        _launch(_gated_product_fwd_kernel, (), gate, up, out, activation)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        grad = grad.contiguous()
        grad_up = torch.empty_like(grad)
        gate, up = ctx.saved_tensors
        _launch(_gated_product_bwd_kernel, (grad,), gate, up, grad_up, ctx.activation)
        return grad, grad_up, None


def gated_product(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Activate the gate and multiply.

    Args:
        gate: [..., I], fp32 or half, on CUDA.
        up: [..., I], alike.
        activation: One of `ACTIVATIONS`.

    Returns:
        [..., I]. The gradient that comes back to it is used up: its maker must not read it again.

    Raises:
        ValueError: If gate and up do not fit together, or there is no such activation.
    """
    if (gate.shape, gate.dtype) != (up.shape, up.dtype):
        raise ValueError(
            f"gate and up must be alike, got {list(gate.shape)} in {gate.dtype} and "
            f"{list(up.shape)} in {up.dtype}"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be of {', '.join(ACTIVATIONS)}, got {activation}")
    return _GatedProduct.apply(gate, up, activation)

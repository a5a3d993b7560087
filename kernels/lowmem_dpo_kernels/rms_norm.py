"""RMS normalisation by a frozen weight that keeps its input and one number a row.

    n = x / sqrt(mean(x^2) + eps),  y = n * (offset + weight)
    dx = (g - n * mean(g * n)) / sqrt(mean(x^2) + eps),  g = dy * (offset + weight)

in fp32. Ordinary operations keep x a second time, in fp32, and their backward pass makes five more
copies of that size: 16 KB a token each at a hidden size of 4,096. Here x, which the caller has
anyway, and 4 bytes a row wait for the backward pass, and what is fp32 is a block of rows, or on
CUDA registers.

Families differ in where they round: Llama's rounds n to x's dtype before the product with the
weight, OLMo 2's and Gemma's after it. On a CPU the bits are theirs; the kernel sums a row in
another order.

Shapes: M rows, D their length.
Source: Zhang and Sennrich (arXiv 1910.07467).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_BLOCK_NUMBERS = 2**20  # of a block of rows in PyTorch: 4 MiB in fp32, about four times alive


class NormKind(NamedTuple):
    """How a family normalises."""

    eps: float  # added to the mean square
    offset: float = 0.0  # added to the weight
    rounds_first: bool = True  # whether n is rounded to x's dtype before the product


def rms_norm(x: Tensor, weight: Tensor, kind: NormKind, *, implementation: str = "torch") -> Tensor:
    """Normalise rows.

    Args:
        x: [..., D], floating point.
        weight: [D], frozen, in x's dtype.
        kind: How.
        implementation: torch, or on CUDA triton; they differ in the last bits.

    Returns:
        [..., D] in x's dtype and memory order.

    Raises:
        ValueError: If the weight would be trained, or does not fit x.
    """
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "weight must be frozen, got requires_grad=True; call .requires_grad_(False)"
        )
    if weight.shape != x.shape[-1:] or weight.dtype != x.dtype:
        raise ValueError(
            f"weight must be [{x.shape[-1]}] in {x.dtype}, as x's rows are, "
            f"got {list(weight.shape)} in {weight.dtype}"
        )
    return _RmsNorm.apply(x, weight, kind, implementation == "triton")


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, kind: NormKind, by_kernel: bool) -> Tensor:
        out = torch.empty_like(x)
        rows, out_rows = _rows(x, out), _rows(out, out)
        block_rows = max(64, _BLOCK_NUMBERS // rows.shape[1])
        rstd = torch.empty(len(rows), dtype=torch.float32, device=x.device)
        if by_kernel:
            from lowmem_dpo_kernels import rms_norm_triton

            rms_norm_triton.forward(rows, weight, kind, out_rows, rstd)
        else:
            for start in range(0, len(rows), block_rows):
                block = slice(start, start + block_rows)
                wide = rows[block].float()
                mean = wide.pow(2).mean(-1, keepdim=True)
                scale = torch.rsqrt(mean + kind.eps)
                rstd[block] = scale[:, 0]
                if kind.rounds_first:
                    out_rows[block] = (wide * scale).to(x.dtype) * (weight + kind.offset)
                else:
                    out_rows[block] = wide * scale * (weight.float() + kind.offset)
        ctx.save_for_backward(x, weight, rstd)
        ctx.kind, ctx.by_kernel, ctx.block_rows = kind, by_kernel, block_rows
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None, None, None]:
        x, weight, rstd = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        rows, grad_rows, upstream = (_rows(t, grad_x) for t in (x, grad_x, grad_out))
        if ctx.by_kernel:
            from lowmem_dpo_kernels import rms_norm_triton

            rms_norm_triton.backward(upstream, rows, weight, ctx.kind, rstd, grad_rows)
            return grad_x, None, None, None
        factor = weight.float() + ctx.kind.offset
        for start in range(0, len(rows), ctx.block_rows):
            block = slice(start, start + ctx.block_rows)
            scale = rstd[block, None]
            normed, grad = rows[block].float() * scale, upstream[block] * factor
            grad -= normed.mul_((grad * normed).mean(-1, keepdim=True))
            grad_rows[block] = grad.mul_(scale)
        return grad_x, None, None, None


def _rows(x: Tensor, like: Tensor) -> Tensor:
    """[M, D] contiguous, in the order of `like` in memory; a copy only if x does not lie so."""
    order = sorted(range(x.dim() - 1), key=like.stride, reverse=True)
    return x.permute(*order, -1).reshape(-1, x.shape[-1]).contiguous()

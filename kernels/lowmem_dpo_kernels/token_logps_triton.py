"""The row statistics of `token_logps` as one Triton kernel between two cuBLAS products.

One program reads one row of logits once and writes its softmax weights once, in the type of the
second product: 6 bytes a logit for half operands. The PyTorch expressions that it replaces, in
`token_logps_pass.fold_slice`, go over the tile ten times. A row has its own program: no atomics.

The order in which a row is summed belongs to the compiled code: Triton lays a row out over threads
to suit the type of the weights it writes. So one kernel serves with and without gradient, and what
is compiled does not depend on which is wanted.

Shapes: B rows of a block, S width of a slice.
"""

import triton
import triton.language as tl
from torch import Tensor

from lowmem_dpo_kernels.heads import EXPONENT_HEADROOM, HeadSlice, ScoredRows
from lowmem_dpo_kernels.triton_support import launch

NUM_WARPS = 8


@triton.jit
def soft_capped(z, cap):
    """Cap * tanh(z / cap), and its slope."""
    # tanh(x) = 1 - 2 / (e^(2x) + 1), which saturates cleanly where e^(2x) overflows.
    tanh = 1.0 - 2.0 / (tl.exp(2.0 * z / cap) + 1.0)
    slope = 1.0 - tanh * tanh
    return cap * tanh, slope


@triton.jit(do_not_specialize=["width", "with_weights"])
def _fold_slice_kernel(
    logits_ptr,  # [B, S] fp32
    weights_ptr,  # [B, S] operand type, written if with_weights
    bias_ptr,  # [width] fp32
    columns_ptr,  # [B] int64
    top_ptr,  # [B] fp32, updated
    rest_ptr,  # [B] fp32, updated
    target_logit_ptr,  # [B] fp32, updated
    rescale_ptr,  # [B] fp32, written
    logits_stride,
    weights_stride,
    width,
    padded_width,
    with_weights,  # 0 or 1
    logit_scale,
    logit_softcap,
    headroom,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    valid = offsets < width
    # Padding is read too: its width is a multiple of 16, so 16 bytes come in at a time.
    z = tl.load(logits_ptr + row * logits_stride + offsets, mask=offsets < padded_width, other=0.0)
    if HAS_BIAS:
        z += tl.load(bias_ptr + offsets, mask=valid, other=0.0)
    z *= logit_scale
    slope = 1.0
    if HAS_SOFTCAP:
        z, slope = soft_capped(z, logit_softcap)
    z = tl.where(valid, z, -float("inf"))

    column = tl.load(columns_ptr + row)
    inside = (column >= 0) & (column < width)
    is_target = offsets == column
    tl.store(target_logit_ptr + row, tl.sum(tl.where(is_target, z, 0.0), axis=0), mask=inside)
    z = tl.where(is_target, -float("inf"), z)

    top = tl.load(top_ptr + row)
    new_top = tl.maximum(top, tl.max(z, axis=0) - headroom)
    rescale = tl.exp(top - new_top)
    weights = tl.exp(z - new_top)
    rest = tl.load(rest_ptr + row) * rescale + tl.sum(weights, axis=0)
    tl.store(top_ptr + row, new_top)
    tl.store(rest_ptr + row, rest)
    tl.store(rescale_ptr + row, rescale)
    # A product, not a second condition: it stays a multiple of 16, so 16 bytes go out at a time.
    written_width = padded_width * with_weights
    weights = (weights * slope).to(weights_ptr.dtype.element_ty)
    tl.store(weights_ptr + row * weights_stride + offsets, weights, mask=offsets < written_width)


def fold_slice(logits: Tensor, weights: Tensor, rows: ScoredRows, head_slice: HeadSlice) -> Tensor:
    """Fold one slice of logits into the running statistics of its rows, all in place.

    Arguments and result are those of `token_logps_pass.fold_slice`, in fp32; `logits` stays as it
    is unless it is also `weights` and they are wanted.
    """
    num_rows, padded_width = logits.shape
    bias, logit_softcap = head_slice.bias, head_slice.logit_softcap
    rescale = rows.top.new_empty(num_rows)
    launch(
        _fold_slice_kernel,
        (num_rows,),
        logits,
        weights,
        logits if bias is None else bias,
        rows.targets - head_slice.start,
        rows.top,
        rows.rest,
        rows.target_logit,
        rescale,
        logits.stride(0),
        weights.stride(0),
        head_slice.width,
        padded_width,
        int(rows.values is not None),
        head_slice.logit_scale,
        1.0 if logit_softcap is None else logit_softcap,
        EXPONENT_HEADROOM.get(weights.dtype, 0.0),
        HAS_BIAS=bias is not None,
        HAS_SOFTCAP=logit_softcap is not None,
        BLOCK=triton.next_power_of_2(padded_width),
        num_warps=NUM_WARPS,
        enable_fp_fusion=True,  # Triton's default varies with its version and environment
    )
    return rescale

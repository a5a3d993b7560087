"""NF4 weights made dense: both levels of scales in one kernel, into memory that the caller owns.

    scale[j] = code[absmax[j]] * absmax2[j // 256] + offset
    out[i]   = levels[packed[i]] * scale[i // 64]

in fp32, rounded after every step and once more to out's type: the bits of bitsandbytes given the
same state, which takes a kernel a level and fp32 scales in between. With absmax2 None, absmax are
the scales.

Bytes: 0.516 read and out's own written a number, nothing else. A program turns 4-byte words into
eight numbers each, so what it writes leaves 16 bytes at a time.

Source of the layout: Dettmers et al., QLoRA (arXiv 2305.14314); bitsandbytes. The first number of a
pair is in the high half of its byte.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowmem_dpo_kernels.triton_support import launch
from lowmem_dpo_kernels.twins import NF4_BLOCK as BLOCK

WORDS = 512  # of a program: 4,096 numbers
NUM_WARPS = 4


@triton.jit(do_not_specialize=["num_words"])
def _nf4_dequantize_kernel(
    packed_ptr,  # [numel / 8] int32
    absmax_ptr,  # [numel / 64] uint8, or fp32 scales
    absmax2_ptr,  # [numel / 64 / 256] fp32
    offset_ptr,  # [] fp32
    code_ptr,  # [256] fp32
    levels_ptr,  # [16] fp32
    out_ptr,  # [numel]
    num_words,
    IS_DOUBLE: tl.constexpr,
    WORDS: tl.constexpr,
):
    word = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    valid = word < num_words
    packed = tl.load(packed_ptr + word, mask=valid, other=0)
    block = word // 8
    scale = tl.load(absmax_ptr + block, mask=valid, other=0)
    if IS_DOUBLE:
        scale = tl.load(code_ptr + scale.to(tl.int32))
        scale = scale * tl.load(absmax2_ptr + block // 256, mask=valid, other=0.0)
        scale = scale + tl.load(offset_ptr)
    number = tl.arange(0, 8)
    shift = (number // 2) * 8 + (1 - number % 2) * 4
    level = tl.load(levels_ptr + ((packed[:, None] >> shift[None, :]) & 15))
    out = (level * scale[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + word[:, None] * 8 + number[None, :], out, mask=valid[:, None])


def nf4_dequantize(
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    code: Tensor,
    levels: Tensor,
    out: Tensor,
) -> Tensor:
    """Write the dense numbers of an NF4 weight.

    Args:
        packed: [numel / 2] uint8, contiguous, two levels a byte; numel a multiple of 8.
        absmax: [ceil(numel / 64)] uint8, codes of the blocks' scales; fp32 scales if absmax2 is
            None.
        absmax2: [ceil(numel / 64 / 256)] fp32, or None.
        offset: [] fp32, or None.
        code: [256] fp32, what absmax's codes stand for.
        levels: [16] fp32.
        out: numel numbers, contiguous, fp32 or half; written.

    Returns:
        `out`.

    Raises:
        ValueError: If the sizes do not fit together.
    """
    numel = out.numel()
    if numel % 8 or packed.numel() * 2 != numel or absmax.numel() != -(-numel // BLOCK):
        raise ValueError(
            f"NF4 needs a multiple of 8 numbers, half as many bytes and a scale for every {BLOCK}, "
            f"got {numel}, {packed.numel()} and {absmax.numel()}; use the plain twin for odd sizes"
        )
    if not (out.is_contiguous() and packed.is_contiguous()):
        raise ValueError("packed and out must be contiguous; call .contiguous()")
    num_words = numel // 8
    launch(
        _nf4_dequantize_kernel,
        (triton.cdiv(num_words, WORDS),),
        packed.view(-1).view(torch.int32),
        absmax,
        absmax if absmax2 is None else absmax2,
        absmax if offset is None else offset,
        code,
        levels,
        out,
        num_words,
        IS_DOUBLE=absmax2 is not None,
        WORDS=WORDS,
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,  # scale's product is rounded before offset is added
    )
    return out

"""Plain twins of the kernels: the same functions in a few lines of PyTorch.

They materialise what the kernels avoid and leave the gradient to autograd: to read first and to
test against.
Shapes: N packed tokens, T scored tokens, D hidden, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def token_logps(
    hidden: Tensor,
    rows: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
) -> Tensor:
    """Log-probability of each target, from materialised fp32 logits.

    Args:
        hidden: [N, D], float16, bfloat16, float32 or float64.
        rows: [T] int64, the row of `hidden` that predicts each target; rows may repeat.
        weight: [V, D], the output head.
        targets: [T] int64; -100 means "not scored".
        bias: [V], added to `hidden @ weight.T`.
        logit_scale: Factor of the logits, after the bias.
        logit_softcap: Cap c of `c * tanh(logits / c)`, after the scale.

    Returns:
        [T] fp32 (float64 for float64 inputs); 0 where the target is -100.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    logits = F.linear(
        hidden[rows].to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    )
    logits = logits * logit_scale
    if logit_softcap is not None:
        logits = logit_softcap * torch.tanh(logits / logit_softcap)
    return -F.cross_entropy(logits, targets, ignore_index=-100, reduction="none")


def nf4_dequantize(
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    code: Tensor,
    levels: Tensor,
    out: Tensor,
) -> Tensor:
    """The dense numbers of an NF4 weight, block 64 and, of the scales, block 256.

    Args:
        packed: [ceil(numel / 2)] uint8, two levels a byte, the first in the high half.
        absmax: [ceil(numel / 64)] uint8, codes of the blocks' scales; fp32 scales if absmax2 is
            None.
        absmax2: [ceil(numel / 64 / 256)] fp32, or None.
        offset: [] fp32, or None.
        code: [256] fp32, what absmax's codes stand for.
        levels: [16] fp32.
        out: numel numbers; written.

    Returns:
        `out`.
    """
    scales = absmax
    if absmax2 is not None and offset is not None:
        scales = code[absmax.int()] * absmax2.repeat_interleave(256)[: len(absmax)] + offset
    pairs = torch.stack((packed.view(-1) >> 4, packed.view(-1) & 15), 1)
    numbers = levels[pairs.view(-1).int()[: out.numel()]]
    return out.copy_((numbers * scales.repeat_interleave(64)[: out.numel()]).view(out.shape))

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

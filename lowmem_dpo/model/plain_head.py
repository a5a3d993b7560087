"""The output head by ordinary products in fp32, to check the head's kernels against.

Nothing is shared with `lowmem_dpo_kernels.token_logps` but the rule of the logits and the slices of
the head, so that a fault there cannot be in both. No [T, V] logits are held either.

Shapes: T tokens, D hidden, V vocabulary, S slice width.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from lowmem_dpo.model.language_model import LanguageModel

WIDTH = 2048  # a slice in fp32: 32 MiB at D = 4,096


@torch.no_grad()
def plain_logps(model: LanguageModel, hidden: Tensor, targets: Tensor) -> Tensor:
    """Log-prob of each target.

    Args:
        model: The model; its head in any form.
        hidden: [T, D], the rows that predict the targets.
        targets: [T] int64.

    Returns:
        [T] fp32 (float64 for float64), in nats.
    """
    top, target_logits = _sums(model, hidden, targets)
    return target_logits - top


@torch.no_grad()
def plain_gradients(model: LanguageModel, hidden: Tensor, targets: Tensor) -> Tensor:
    """Gradient of each log-prob in its row: dlogp/dz_v = [v is the target] - p_v, through z(h).

    Args:
        model: The model; its head in any form.
        hidden: [T, D], the rows that predict the targets.
        targets: [T] int64.

    Returns:
        [T, D] fp32 (float64 for float64).
    """
    top, _ = _sums(model, hidden, targets)
    gradients = torch.zeros_like(hidden, dtype=top.dtype)
    for start, part, logits in _logits(model, hidden):
        columns = torch.arange(start, start + len(part), device=targets.device)
        slopes = (columns == targets[:, None]).to(top.dtype) - (logits - top[:, None]).exp()
        if model.logit_softcap is not None:
            slopes *= 1.0 - (logits / model.logit_softcap).square()
        gradients += model.logit_scale * slopes @ part
    return gradients


def _sums(model: LanguageModel, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """[T] each: log of the sum of e^z over the vocabulary, and z of the target."""
    total = torch.full_like(targets, -torch.inf, dtype=_wide(hidden))
    target_logits = torch.zeros_like(total)
    for start, part, logits in _logits(model, hidden):
        total = torch.logaddexp(total, logits.logsumexp(1))
        columns = (targets - start).clamp(0, len(part) - 1)
        inside = columns == targets - start
        target_logits += logits.gather(1, columns[:, None])[:, 0].where(inside, 0.0)
    return total, target_logits


def _logits(model: LanguageModel, hidden: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Slice by slice: where it starts, its rows [S, D] and the logits [T, S], in fp32."""
    hidden, start = hidden.to(_wide(hidden)), 0
    for part in model.head_weight.split(WIDTH):
        part = part.to(hidden.dtype)
        logits = F.linear(hidden, part)
        if model.head_bias is not None:
            logits += model.head_bias[start : start + len(part)]
        logits *= model.logit_scale
        if model.logit_softcap is not None:
            logits = model.logit_softcap * torch.tanh(logits / model.logit_softcap)
        yield start, part, logits
        start += len(part)


def _wide(hidden: Tensor) -> torch.dtype:
    return torch.promote_types(hidden.dtype, torch.float32)

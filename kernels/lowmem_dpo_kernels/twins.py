"""Plain twins of the kernels: the same functions in a few lines of PyTorch.

They materialise what the kernels avoid and leave the gradient to autograd: to read first and to
test against. Arguments and results are those of the operation of the same name, and said where they
are not.

Shapes: N packed tokens, T scored tokens, D hidden, V vocabulary; H query heads, K key heads, E head
size; I intermediate size.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lowmem_dpo_kernels.rms_norm import NormKind

NF4_BLOCK = 64  # numbers of an NF4 weight that share a scale


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

    hidden is [N, D], rows and targets are [T] int64, weight is [V, D], a tensor; the result is [T]
    fp32 (float64 for float64 inputs).
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    logits = F.linear(
        hidden[rows].to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    )
    logits = logits * logit_scale
    if logit_softcap is not None:
        logits = logit_softcap * torch.tanh(logits / logit_softcap)
    return -F.cross_entropy(logits, targets, ignore_index=-100, reduction="none")


def rms_norm(x: Tensor, weight: Tensor, kind: NormKind) -> Tensor:
    """Rows [..., D] over their root mean square, times a weight [D], in fp32 at least."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + kind.eps)
    if kind.rounds_first:
        normed = normed.to(x.dtype)
    return (normed * (weight.to(normed.dtype) + kind.offset)).to(x.dtype)


def gated_product(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(gate) * up, act by its name; [..., I] each."""
    return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads [N, H, E] turned by the angles of their tokens, cos and sin [N, E]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]


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

    Here their number may be odd, and packed has ceil(numel / 2) bytes.
    """
    scales = absmax
    if absmax2 is not None and offset is not None:
        scales = code[absmax.int()] * absmax2.repeat_interleave(256)[: len(absmax)] + offset
    pairs = torch.stack((packed.view(-1) >> 4, packed.view(-1) & 15), 1)
    numbers = levels[pairs.view(-1).int()[: out.numel()]]
    return out.copy_((numbers * scales.repeat_interleave(NF4_BLOCK)[: out.numel()]).view(out.shape))


def tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Sequence[tuple[int, int, int, int]],
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention of every tree of a pack, by a dense mask over the pack.

    Query is [H, N, E], key and value are [K, N, E], of any floating type; in place of a plan stands
    its layout: (start, trunk, chosen, rejected) of each tree, in tokens.
    """
    dtype, group = torch.promote_types(query.dtype, torch.float32), len(query) // len(key)
    keys, values = (x.to(dtype).repeat_interleave(group, dim=0) for x in (key, value))
    scores = scale * query.to(dtype) @ keys.transpose(1, 2)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    visible = _visible(layout, query.shape[1], sliding_window).to(query.device)
    scores = scores.masked_fill(~visible, torch.finfo(dtype).min)
    # A row that sees nothing has equal weights after the softmax, and none after the mask.
    weights = scores.softmax(-1) * visible
    return (weights @ values).transpose(0, 1).to(query.dtype)


def _visible(
    layout: Sequence[tuple[int, int, int, int]], num_tokens: int, sliding_window: int | None
) -> Tensor:
    """[N, N] bool: whether the query (row) sees the key (column)."""
    visible = torch.zeros(num_tokens, num_tokens, dtype=torch.bool)
    for start, trunk, chosen, rejected in layout:
        for branch, length in ((trunk, chosen), (trunk + chosen, rejected)):
            sequence = start + torch.tensor(
                [*range(trunk), *range(branch, branch + length)], dtype=torch.int64
            )
            distance = torch.arange(len(sequence))[:, None] - torch.arange(len(sequence))
            seen = distance >= 0
            if sliding_window is not None:
                seen &= distance < sliding_window
            visible[sequence[:, None], sequence] = seen
    return visible

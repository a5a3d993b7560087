"""The one scoring path: a pack of token trees in, the log-prob of every scored token out.

Policy, reference, evaluation and the checks all call `score`; with a gradient or without, it
returns the same bits. The head runs on the rows that predict a completion token and never forms the
full logits.

`score_plain` is what the checks compare with: the model's own attention, and the head by ordinary
products in fp32. These share nothing with `lowmem_dpo_kernels.token_logps` but the rule of the
logits and the slices of the head, so that a fault there cannot be in both. No [T, V] logits are
held here either.

Shapes: N packed tokens, T scored tokens, D hidden, V vocabulary, S slice width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowmem_dpo.model.attention import TREE_ATTENTION
from lowmem_dpo.model.language_model import LanguageModel
from lowmem_dpo.packs.packing import Pack
from lowmem_dpo_kernels import token_logps

WIDTH = 2048  # a slice in fp32: 32 MiB at D = 4,096


def score(model: LanguageModel, pack: Pack, **layer_arguments: Any) -> Tensor:
    """Log-prob of every scored token of a pack under the model as it stands.

    Args:
        model: The model, its attention set to `TREE_ATTENTION`.
        pack: Token trees.
        **layer_arguments: Passed on to the attention function.

    Returns:
        [T] fp32, in nats, in the order of `pack.rows`.
    """
    device = model.device
    embeddings = model.backbone.get_input_embeddings()(pack.input_ids.to(device)[None])
    if torch.is_grad_enabled():
        embeddings.requires_grad_()  # or no layer's backward would run: all before is frozen
    hidden = model.backbone(
        inputs_embeds=embeddings,
        position_ids=pack.position_ids.to(device)[None],
        use_cache=False,
        tree_layout=pack.layout,
        **layer_arguments,
    ).last_hidden_state[0]
    return head_logps(model, hidden, pack.rows.to(device), pack.targets.to(device))


def head_logps(model: LanguageModel, hidden: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
    """`token_logps` under a model's head: the log-prob of each target, [T], from hidden [N, D]."""
    return token_logps(
        hidden,
        rows,
        model.head_weight,
        targets,
        bias=model.head_bias,
        logit_scale=model.logit_scale,
        logit_softcap=model.logit_softcap,
        implementation=model.head_implementation,
    )


@torch.no_grad()
def score_plain(model: LanguageModel, ids: tuple[int, ...]) -> Tensor:
    """Log-prob of every token but the first of one plain sequence, by plain attention and head.

    Args:
        model: The model.
        ids: L token ids.

    Returns:
        [L - 1] fp32, in nats.
    """
    input_ids = torch.tensor(ids, device=model.device)
    with attention(model, model.family.plain_attention):
        hidden = model.backbone(input_ids=input_ids[None], use_cache=False).last_hidden_state[0]
    return plain_logps(model, hidden[:-1], input_ids[1:])[0]


@contextmanager
def attention(model: LanguageModel, name: str) -> Any:
    """Run the model with another attention function for a while."""
    model.backbone.set_attn_implementation(name)
    try:
        yield
    finally:
        model.backbone.set_attn_implementation(TREE_ATTENTION)


@torch.no_grad()
def plain_logps(model: LanguageModel, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-prob of each target, and the log of the sum of e^z over the vocabulary.

    Args:
        model: The model; its head in any form.
        hidden: [T, D], the rows that predict the targets.
        targets: [T] int64.

    Returns:
        [T] each, fp32 (float64 for float64), in nats.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    log_sums = torch.full_like(targets, -torch.inf, dtype=dtype)
    target_logits = torch.zeros_like(log_sums)
    for start, part, logits in _plain_logits(model, hidden):
        log_sums = torch.logaddexp(log_sums, logits.logsumexp(1))
        columns = (targets - start).clamp(0, len(part) - 1)
        inside = columns == targets - start
        target_logits += logits.gather(1, columns[:, None])[:, 0].where(inside, 0.0)
    return target_logits - log_sums, log_sums


@torch.no_grad()
def plain_gradients(
    model: LanguageModel, hidden: Tensor, targets: Tensor, log_sums: Tensor
) -> Tensor:
    """Gradient of each log-prob in its row: dlogp/dz_v = [v is the target] - p_v, through z(h).

    Args:
        model: The model; its head in any form.
        hidden: [T, D], the rows that predict the targets.
        targets: [T] int64.
        log_sums: [T], from `plain_logps`.

    Returns:
        [T, D] fp32 (float64 for float64).
    """
    gradients = torch.zeros_like(hidden, dtype=log_sums.dtype)
    for start, part, logits in _plain_logits(model, hidden):
        columns = torch.arange(start, start + len(part), device=targets.device)
        hits = (columns == targets[:, None]).to(logits.dtype)
        slopes = hits - (logits - log_sums[:, None]).exp()
        if model.logit_softcap is not None:
            slopes *= 1.0 - (logits / model.logit_softcap).square()
        gradients += model.logit_scale * slopes @ part
    return gradients


def _plain_logits(model: LanguageModel, hidden: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Slice by slice: where it starts, its rows [S, D] and the logits [T, S], in fp32."""
    hidden, start = hidden.to(torch.promote_types(hidden.dtype, torch.float32)), 0
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

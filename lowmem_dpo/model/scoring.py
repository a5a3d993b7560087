"""The one scoring path: a pack of token trees in, the log-prob of every scored token out.

Policy, reference, evaluation and the checks all call `score`; with a gradient or without, it
returns the same bits. The head runs on the rows that predict a completion token and never forms the
full logits. `score_plain` is what the checks compare with: the model's own attention, and none of
the head's kernels.

Shapes: N packed tokens, T scored tokens, D hidden.
"""

from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lowmem_dpo.model.attention import TREE_ATTENTION
from lowmem_dpo.model.language_model import LanguageModel
from lowmem_dpo.model.plain_head import plain_logps
from lowmem_dpo.packs.packing import Pack
from lowmem_dpo_kernels import token_logps


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
    return plain_logps(model, hidden[:-1], input_ids[1:])


@contextmanager
def attention(model: LanguageModel, name: str) -> Any:
    """Run the model with another attention function for a while."""
    model.backbone.set_attn_implementation(name)
    try:
        yield
    finally:
        model.backbone.set_attn_implementation(TREE_ATTENTION)


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

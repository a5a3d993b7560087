"""The one scoring path, and the check at load that it computes this model rightly.

A pack of token trees goes in, the log-prob of every scored token comes out. Policy, reference,
evaluation and the checks all call `score`; with a gradient or without, it returns the same bits.
The head runs on the rows that predict a completion token and never forms the full logits.

Model types are an allow-list, but configurations vary. So before anything is trained, two real
pairs are scored once as one packed micro-batch and once as four plain sequences; every decoder
layer must have come to our attention function exactly once. Log-probs do not show a wrong gradient:
the head's own is compared on a few rows.

`score_plain` is what the checks compare with: the model's own attention, and the head by ordinary
products in fp32. These share nothing with `lowmem_dpo_kernels.token_logps` but the rule of the
logits and the slices of the head, so that a fault there cannot be in both. No [T, V] logits are
held here either.

Shapes: N packed tokens, T scored tokens, D hidden, V vocabulary, S slice width.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowmem_dpo.machine.device import to_device
from lowmem_dpo.machine.trial import check_error, passes_trial
from lowmem_dpo.model.embedding import HostEmbedding
from lowmem_dpo.model.language_model import LanguageModel
from lowmem_dpo.packs.packing import Pack
from lowmem_dpo_kernels import token_logps
from lowmem_dpo_kernels.token_logps import check_indices, token_logps_path

WIDTH = 2048  # a slice in fp32: 32 MiB at D = 4,096

NUM_HEAD_ROWS = 64
# Relative Frobenius errors of a right head: logits are fp32, its weights and gradients may be
# rounded to bfloat16 (2^-9).
HEAD_LOGPS_TOLERANCE, HEAD_GRADIENTS_TOLERANCE = 1e-3, 0.02

# Largest rms difference per token, in nats, between two correct ways to compute log-probs.
LOGP_TOLERANCE = {
    torch.float64: 1e-4,
    torch.float32: 1e-4,
    torch.bfloat16: 0.1,
    torch.float16: 0.1,
}


def score(model: LanguageModel, pack: Pack, **layer_arguments: Any) -> Tensor:
    """Log-prob of every scored token of a pack under the model as it stands.

    Args:
        model: The model, its attention set to that of trees.
        pack: Token trees.
        **layer_arguments: Passed on to the attention function.

    Returns:
        [T] fp32, in nats, in the order of `pack.rows`.
    """
    sent = [pack.input_ids, pack.position_ids, pack.rows, pack.targets]
    ids, positions, rows, targets = to_device(sent, model.device)
    embedding = model.backbone.get_input_embeddings()
    embeddings = embedding((pack.input_ids if isinstance(embedding, HostEmbedding) else ids)[None])
    if torch.is_grad_enabled():
        embeddings.requires_grad_()  # or no layer's backward would run: all before is frozen
    hidden = model.backbone(
        inputs_embeds=embeddings,
        position_ids=positions[None],
        use_cache=False,
        tree_layout=pack.layout,
        **layer_arguments,
    ).last_hidden_state[0]
    return head_logps(model, hidden, rows, targets)


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
def score_plain(model: LanguageModel, ids: Sequence[int]) -> Tensor:
    """Log-prob of every token but the first of one plain sequence, by plain attention and head.

    Args:
        model: The model.
        ids: L token ids.

    Returns:
        [L - 1] fp32, in nats.
    """
    input_ids = torch.tensor(list(ids), device=model.device)
    with other_attention(model, model.family.plain_attention):
        hidden = model.backbone(input_ids=input_ids[None], use_cache=False).last_hidden_state[0]
    return plain_logps(model, hidden[:-1], input_ids[1:])[0]


@contextmanager
def other_attention(model: LanguageModel, name: str) -> Any:
    """Run the model with another attention function for a while."""
    own = model.backbone.config._attn_implementation
    model.backbone.set_attn_implementation(name)
    try:
        yield
    finally:
        model.backbone.set_attn_implementation(own)


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


@torch.no_grad()
def check_packing(model: LanguageModel, pack: Pack, sequences: Sequence[Sequence[int]]) -> float:
    """Compare one packed micro-batch with the same sequences one by one.

    Args:
        model: The model.
        pack: Trees with both branches.
        sequences: Token ids: chosen and rejected of each tree in the pack, in pack order.

    Returns:
        The rms difference per token, in nats.

    Raises:
        ValueError: If the model is not computed rightly; it must not be trained then.
    """
    check_indices(pack.rows, pack.targets, len(pack.input_ids), model.head_weight.shape[0])
    callers: list[Any] = []
    packed = score(model, pack, on_tree_attention=callers.append).cpu()
    if len(callers) != len(model.layers) or len(set(map(id, callers))) != len(model.layers):
        raise ValueError(
            f"the model has {len(model.layers)} layers but attention ran {len(callers)} times; "
            "this configuration is not supported"
        )
    differences = []
    for i, (start, trunk, chosen, rejected) in enumerate(pack.layout):
        for ids, offset, length in (
            (sequences[2 * i], trunk, chosen),
            (sequences[2 * i + 1], trunk + chosen, rejected),
        ):
            plain = score_plain(model, ids).cpu()
            place = pack.rows - start  # in the tree: the trunk begins it, the branch comes later
            inside = (place >= 0) & (place < trunk)
            inside |= (place >= offset) & (place < offset + length)
            positions = pack.position_ids[pack.rows[inside]]
            right = pack.targets[inside] == torch.tensor(ids)[positions + 1]
            differences.append((packed[inside] - plain[positions])[right])
    difference = torch.cat(differences).double().pow(2).mean().sqrt().item()
    tolerance = LOGP_TOLERANCE[model.dtype]
    if math.isnan(difference):
        raise ValueError(
            "self-check failed: the model's log-probs are not numbers; its weights or the adapter "
            f"hold NaN, or overflow in {str(model.dtype).removeprefix('torch.')}"
        )
    if not difference <= tolerance:
        raise ValueError(
            f"self-check failed: packed and plain sequences differ by {difference:.2e} nat rms per "
            f"token (at most {tolerance:g} expected); this model is not computed rightly"
        )
    try:
        check_head_kernels(model)
    except ValueError as error:
        raise ValueError(
            f"self-check failed: the output head's {error}; this model is not computed rightly"
        ) from None
    return difference


def check_head_kernels(model: LanguageModel) -> None:
    """Compare values and gradients of `token_logps` with a plain head on a few rows.

    The rows point along rows of the head itself, so that a handful of tokens have most of the
    probability and all of them some: a fault in any part of the sums shows. The targets are spread
    over the vocabulary, its first and last token among them.

    Args:
        model: The model; its own head, bias, scale and soft-cap are tried.

    Raises:
        ValueError: If either is off.
    """
    weight, vocabulary = model.head_weight, model.head_weight.shape[0]
    targets = torch.linspace(0, vocabulary - 1, NUM_HEAD_ROWS).long().to(weight.device)
    tokens, start = targets.roll(1), 0
    directions = torch.empty(NUM_HEAD_ROWS, weight.shape[1], device=weight.device)
    for part in weight.split(WIDTH):
        inside = (tokens >= start) & (tokens < start + len(part))
        directions[inside] = part[tokens[inside] - start].float()
        start += len(part)
    squares = directions.square().sum(1, keepdim=True)
    length = (math.log(vocabulary) + 1.0) / model.logit_scale  # of the largest logit
    hidden = directions * (length / squares.maximum(squares.mean()))
    hidden = hidden.to(weight.dtype).requires_grad_()
    with torch.enable_grad():
        logps = head_logps(model, hidden, torch.arange(len(hidden), device=hidden.device), targets)
        (gradients,) = torch.autograd.grad(logps.sum(), hidden)
    hidden = hidden.detach()
    wanted, log_sums = plain_logps(model, hidden, targets)
    check_error(logps.detach(), wanted, HEAD_LOGPS_TOLERANCE, "log-probs")
    wanted = plain_gradients(model, hidden, targets, log_sums)
    check_error(gradients.to(wanted.dtype), wanted, HEAD_GRADIENTS_TOLERANCE, "gradients")


def with_tried_head_kernels(model: LanguageModel) -> LanguageModel:
    """The model with a head that is computed rightly here: torch's products if Triton's are not.

    Args:
        model: The model, with the implementation of `token_logps` that is wanted.
    """
    device = model.device
    path = token_logps_path(device, model.head_implementation).split(",")[0]
    kernels, trial = f"the output head's {path} kernels", partial(check_head_kernels, model)
    if path == "torch" or passes_trial(trial, "head", kernels, device, "the torch path"):
        return model
    return replace(model, head_implementation="torch")

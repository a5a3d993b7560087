"""The check at load: this model, packed as trees, computes what it computes on plain sequences.

Model types are an allow-list, but configurations vary. So before anything is trained, two real
pairs are scored once as one packed micro-batch and once as four plain sequences through the model's
own attention and a plain head; every decoder layer must have come to our attention function exactly
once. Log-probs do not show a wrong gradient: the head's own is compared on a few rows.

Shapes: T tokens, D hidden, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from lowmem_dpo.machine.trial import check_error, passes_trial
from lowmem_dpo.model.language_model import LanguageModel
from lowmem_dpo.model.scoring import (
    WIDTH,
    head_logps,
    plain_gradients,
    plain_logps,
    score,
    score_plain,
)
from lowmem_dpo.packs.packing import Pack
from lowmem_dpo_kernels.token_logps import token_logps_path

NUM_HEAD_ROWS = 64
# Relative Frobenius errors of a right head: logits are fp32, its weights and gradients may be
# rounded to bfloat16 (2^-9).
HEAD_LOGPS_TOLERANCE, HEAD_GRADIENTS_TOLERANCE = 1e-3, 0.02

UNSUITABLE_LAYERS = (nn.RNNBase, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def logp_tolerance(dtype: torch.dtype) -> float:
    """Largest rms difference per token, in nats, between two correct ways to compute log-probs."""
    return 1e-4 if dtype in (torch.float32, torch.float64) else 0.1


@torch.no_grad()
def check_packing(model: LanguageModel, pack: Pack, sequences: Sequence[tuple[int, ...]]) -> float:
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
    for name, module in model.layers.named_modules():
        if isinstance(module, UNSUITABLE_LAYERS):
            raise ValueError(
                f"layer {name} is a {type(module).__name__}: such models are not supported"
            )
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
    tolerance = logp_tolerance(model.dtype)
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


def head_that_passed_its_trial(model: LanguageModel) -> LanguageModel:
    """The model with a head that is computed rightly here: torch's products if Triton's are not.

    Args:
        model: The model, with the implementation of `token_logps` that is wanted.
    """
    device = model.device
    path = token_logps_path(device, model.head_implementation).split(",")[0]
    kernels, trial = f"the output head's {path} kernels", partial(check_head_kernels, model)
    if path == "torch" or passes_trial(trial, kernels, device, "the torch path"):
        return model
    return replace(model, head_implementation="torch")

"""The check at load: this model, packed as trees, computes what it computes on plain sequences.

Model types are an allow-list, but configurations vary. So before anything is trained, two real
pairs are scored once as one packed micro-batch and once as four plain sequences through the model's
own attention; every decoder layer must have come to our attention function exactly once.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowmem_dpo.model.loading import ModelParts
from lowmem_dpo.model.scoring import PackedTrees, score, score_plain

UNSUITABLE_LAYERS = (nn.RNNBase, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def logp_tolerance(dtype: torch.dtype) -> float:
    """Largest rms difference per token, in nats, between two correct ways to compute log-probs."""
    return 1e-4 if dtype in (torch.float32, torch.float64) else 0.1


@torch.no_grad()
def check_packing(
    parts: ModelParts, pack: PackedTrees, sequences: Sequence[tuple[int, ...]], dtype: torch.dtype
) -> float:
    """Compare one packed micro-batch with the same sequences one by one.

    Args:
        parts: The model.
        pack: Trees with both branches.
        sequences: Token ids: chosen and rejected of each tree in the pack, in pack order.
        dtype: What the model computes in.

    Returns:
        The rms difference per token, in nats.

    Raises:
        ValueError: If the model is not computed rightly; it must not be trained then.
    """
    for name, module in parts.layers.named_modules():
        if isinstance(module, UNSUITABLE_LAYERS):
            raise ValueError(
                f"layer {name} is a {type(module).__name__}: such models are not supported"
            )
    callers: list[Any] = []
    packed = score(parts, pack, on_tree_attention=callers.append).cpu()
    if len(callers) != len(parts.layers) or len(set(map(id, callers))) != len(parts.layers):
        raise ValueError(
            f"the model has {len(parts.layers)} layers but attention ran {len(callers)} times; "
            "this configuration is not supported"
        )
    differences = []
    for i, (start, trunk, chosen, rejected) in enumerate(pack.layout):
        for sequence, branch in enumerate(((trunk, chosen), (trunk + chosen, rejected))):
            plain = score_plain(parts, sequences[2 * i + sequence]).cpu()
            inside = _inside(pack.rows, start, trunk, branch)
            positions = pack.position_ids[pack.rows[inside]]
            right = pack.targets[inside] == torch.tensor(sequences[2 * i + sequence])[positions + 1]
            differences.append((packed[inside] - plain[positions])[right])
    difference = torch.cat(differences).double().pow(2).mean().sqrt().item()
    tolerance = logp_tolerance(dtype)
    if math.isnan(difference):
        raise ValueError(
            "self-check failed: the model's log-probs are not numbers; its weights or the adapter "
            f"hold NaN, or overflow in {str(dtype).removeprefix('torch.')}"
        )
    if not difference <= tolerance:
        raise ValueError(
            f"self-check failed: packed and plain sequences differ by {difference:.2e} nat rms per "
            f"token (at most {tolerance:g} expected); this model is not computed rightly"
        )
    return difference


def _inside(rows: Tensor, start: int, trunk: int, branch: tuple[int, int]) -> Tensor:
    """Which rows lie in a tree's trunk or in its branch (offset, length)."""
    offset, length = branch
    in_trunk = (rows >= start) & (rows < start + trunk)
    return in_trunk | ((rows >= start + offset) & (rows < start + offset + length))

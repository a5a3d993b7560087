"""A causal language model in memory, and what is read off its config.json."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from lowmem_dpo.memory.weight_slots import WeightSlots
from lowmem_dpo.model.families import FAMILIES, Family
from lowmem_dpo_kernels.heads import Weight

LAYER_TYPES = {"full_attention", "sliding_attention"}


@dataclass(frozen=True)
class StorageRow:
    """How one kind of tensor is stored."""

    kind: str
    count: int
    format: str
    nbytes: int


@dataclass(frozen=True)
class LanguageModel:
    """A model of a supported type.

    Attributes:
        network: The modules, in eval mode, everything but adapters frozen; the linears of the
            decoder layers are LoraLinear.
        identity: Digest of the files it came from and of how they were quantised.
        config: The content of config.json.
        family: What sets it apart from models of other types.
        backbone: Token ids or embeddings to hidden states, final norm included.
        layers: The decoder layers.
        device: Where it computes.
        dtype: In what it computes.
        head_weight: [V, D], or what hands out its slices (`head`, which puts it here and into the
            network).
        head_bias: [V] or None.
        logit_scale: Factor on the logits.
        logit_softcap: The c of c * tanh(logits / c), or None.
        storage: What is stored how, and how large.
        head_implementation: Of `token_logps`.
        slots: Through which the layers' weights pass, if they are in host memory.
    """

    network: PreTrainedModel
    identity: str
    config: PretrainedConfig
    family: Family
    backbone: PreTrainedModel
    layers: nn.ModuleList
    device: torch.device
    dtype: torch.dtype
    head_weight: Weight
    head_bias: Tensor | None
    logit_scale: float
    logit_softcap: float | None
    storage: list[StorageRow] = field(default_factory=list)
    head_implementation: str = "auto"
    slots: WeightSlots | None = None

    @classmethod
    def of(
        cls, network: PreTrainedModel, identity: str, storage: list[StorageRow] | None = None
    ) -> "LanguageModel":
        """What is known of a network whose head is a dense one."""
        config, head = network.config, network.lm_head
        family = FAMILIES[config.model_type]
        return cls(
            network=network,
            identity=identity,
            config=config,
            family=family,
            backbone=network.model,
            layers=network.model.layers,
            device=head.weight.device,
            dtype=head.weight.dtype,
            head_weight=head.weight,
            head_bias=head.bias,
            logit_scale=family.logit_scale(config),
            logit_softcap=family.logit_softcap(config),
            storage=storage or [],
        )


class HeadSizes(NamedTuple):
    """Of attention: query heads, the key heads that they share, and the size of each."""

    num_heads: int
    num_key_heads: int
    head_size: int


def head_sizes(config: PretrainedConfig) -> HeadSizes:
    """The heads of a model's attention."""
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    return HeadSizes(
        heads, key_heads, getattr(config, "head_dim", None) or config.hidden_size // heads
    )


def rope_limit(config: PretrainedConfig) -> int | None:
    """Longest sequence, in tokens, whose position encoding is that of every shorter one.

    Longrope has two sets of frequencies. Which one a batch gets depends on its longest sequence, so
    up to this length all get the first.
    """
    limits = [
        rope["original_max_position_embeddings"]
        for rope in rope_settings(config)
        if rope.get("rope_type") == "longrope"
    ]
    return min(limits, default=None)


def rope_settings(config: PretrainedConfig) -> list[dict[str, Any]]:
    """The position encodings of a model: one, or one for each type of layer."""
    rope = config.rope_parameters or {}
    by_layer_type = [rope[name] for name in LAYER_TYPES if rope.get(name)]
    return by_layer_type or [rope]

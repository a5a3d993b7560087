"""A causal language model in memory, and what is known of it."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from lowmem_dpo.model.families import Family, family_of
from lowmem_dpo_kernels.heads import Weight


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
        storage: What is stored how, and how large.
        head_implementation: Of `token_logps`.
    """

    network: PreTrainedModel
    identity: str
    storage: list[StorageRow] = field(default_factory=list)
    head_implementation: str = "auto"

    @property
    def config(self) -> PretrainedConfig:
        """The content of config.json."""
        return self.network.config

    @property
    def backbone(self) -> PreTrainedModel:
        """Token ids or embeddings to hidden states, final norm included."""
        return self.network.model

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers."""
        return self.network.model.layers

    @property
    def head_weight(self) -> Weight:
        """[V, D], or what hands out its slices (`head`)."""
        return self.network.lm_head.weight

    @property
    def head_bias(self) -> Tensor | None:
        """[V] or None."""
        return self.network.lm_head.bias

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.head_weight.device

    @property
    def dtype(self) -> torch.dtype:
        """In what it computes."""
        return self.head_weight.dtype

    @property
    def family(self) -> Family:
        """What sets it apart from models of other types."""
        return family_of(self.config)

    @property
    def logit_scale(self) -> float:
        """Factor on the logits."""
        return self.family.logit_scale(self.config)

    @property
    def logit_softcap(self) -> float | None:
        """The c of c * tanh(logits / c), or None."""
        return self.family.logit_softcap(self.config)

"""How large a model is, from config.json alone."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

LARGE_FOR_A_CPU = 1_000_000_000
# Half a byte a code, and the scales of its block, rounded up.
NF4_BYTES, _HALF_BYTES = 0.55, 2


@dataclass(frozen=True)
class ModelSize:
    """Numbers of parameters.

    Attributes:
        total: All of them; a tied head counts once.
        linears: Those of the linear layers, the head left out.
        head: The output head's.
    """

    total: int
    linears: int
    head: int

    @classmethod
    def of(cls, config: PretrainedConfig) -> "ModelSize":
        """Count the parameters of a model that is never given memory."""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        head = model.get_output_embeddings()
        linears = (m for m in model.modules() if isinstance(m, nn.Linear) and m is not head)
        return cls(
            total=sum(parameter.numel() for parameter in model.parameters()),
            linears=sum(linear.weight.numel() for linear in linears),
            head=head.weight.numel(),
        )

    @property
    def is_large_for_a_cpu(self) -> bool:
        """Whether training it on a CPU is a matter of days."""
        return self.total > LARGE_FOR_A_CPU

    @property
    def nf4_bytes(self) -> int:
        """About what the quantised model takes: linears in 4 bits, the rest in 16."""
        return int(NF4_BYTES * self.linears + _HALF_BYTES * (self.total - self.linears))

    def forward_flops(self, num_tokens: int) -> float:
        """Of the matrix products of a forward pass, every token through the head."""
        return 2.0 * (self.linears + self.head) * num_tokens

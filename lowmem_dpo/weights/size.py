"""How large a model is: by config.json alone, and in memory, by kind and format of its tensors."""

from dataclasses import dataclass

import torch
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from lowmem_dpo.linears.lora import LoraLinear
from lowmem_dpo.linears.nf4 import Nf4Weight
from lowmem_dpo.model.language_model import StorageRow

LARGE_FOR_A_CPU = 1_000_000_000
# Half a byte a code, and the scales of its block, rounded up.
NF4_BYTES, _HALF_BYTES = 0.55, 2

_LINEAR_KINDS = {"self_attn": "attention linears", "mlp": "mlp linears"}


def storage_table(rows: list[StorageRow]) -> Table:
    """What is stored how, and how large."""
    table = Table("tensors", "count", "stored as", "MiB")
    for row in rows:
        table.add_row(row.kind, str(row.count), row.format, f"{row.nbytes / 2**20:,.1f}")
    table.add_row("total", "", "", f"{sum(row.nbytes for row in rows) / 2**20:,.1f}")
    return table


def storage_rows(model: PreTrainedModel) -> list[StorageRow]:
    """Every tensor, counted by kind and format; a tied head takes no memory of its own."""
    embedding, head, rotary = model.model.embed_tokens, model.lm_head, model.model.rotary_emb
    sizes: dict[tuple[str, str], list[int]] = {}
    for path, module in model.named_modules():
        if isinstance(module, Nf4Weight):
            kind = _LINEAR_KINDS.get(path.split(".")[-3], "other linears")
            text = "nf4, double quantised" if module.offset is not None else "nf4"
            sizes.setdefault((kind, text), []).append(module.nbytes)
            continue
        for leaf, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None:
                continue
            text, nbytes = str(tensor.dtype).removeprefix("torch."), tensor.nbytes
            if module is head:
                kind = "head"
                if tensor is embedding.weight:
                    text, nbytes = "tied to the embedding", 0
            elif module is embedding:
                kind = "embedding" if leaf == "weight" else "embedding scale"
            elif module is rotary:
                kind = "rotary tables"
            elif leaf == "bias":
                kind = "biases"
            elif isinstance(module, LoraLinear):
                kind = _LINEAR_KINDS.get(path.split(".")[-2], "other linears")
            else:
                kind = "norms"
            sizes.setdefault((kind, text), []).append(nbytes)
    return [StorageRow(kind, len(each), text, sum(each)) for (kind, text), each in sizes.items()]


@dataclass(frozen=True)
class ModelSize:
    """Numbers of parameters.

    Attributes:
        total: All of them; a tied head counts once.
        linears: Those of the linear layers, the head left out.
        head: The output head's.
        is_large_for_a_cpu: Whether training it on a CPU is a matter of days.
        nf4_bytes: About what the quantised model takes: linears in 4 bits, the rest in 16.
    """

    total: int
    linears: int
    head: int
    is_large_for_a_cpu: bool
    nf4_bytes: int

    @classmethod
    def of(cls, config: PretrainedConfig) -> "ModelSize":
        """Count the parameters of a model that is never given memory."""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        head = model.get_output_embeddings()
        layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
        linears = sum(layer.weight.numel() for layer in layers)
        total = sum(parameter.numel() for parameter in model.parameters())
        return cls(
            total=total,
            linears=linears,
            head=head.weight.numel(),
            is_large_for_a_cpu=total > LARGE_FOR_A_CPU,
            nf4_bytes=int(NF4_BYTES * linears + _HALF_BYTES * (total - linears)),
        )

    def forward_flops(self, num_tokens: int) -> float:
        """Of the matrix products of a forward pass, every token through the head."""
        return 2.0 * (self.linears + self.head) * num_tokens

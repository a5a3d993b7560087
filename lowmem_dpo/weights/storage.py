"""How a loaded model is stored: which tensors, in what format, and how large."""

from rich.table import Table
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowmem_dpo.model.language_model import StorageRow
from lowmem_dpo.model.lora import LoraLinear
from lowmem_dpo.model.nf4 import Nf4Weight

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
    sizes: dict[tuple[str, str], list[int]] = {}
    for path, module in model.named_modules():
        if isinstance(module, Nf4Weight):
            kind = _LINEAR_KINDS.get(path.split(".")[-3], "other linears")
            text = "nf4, double quantised" if module.absmax2 is not None else "nf4"
            sizes.setdefault((kind, text), []).append(module.nbytes)
            continue
        for leaf, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                kind, text, nbytes = _describe(model, path, module, leaf, tensor)
                sizes.setdefault((kind, text), []).append(nbytes)
    return [StorageRow(kind, len(each), text, sum(each)) for (kind, text), each in sizes.items()]


def _describe(
    model: PreTrainedModel, path: str, module: nn.Module, leaf: str, tensor: Tensor
) -> tuple[str, str, int]:
    """Kind, format and bytes of a tensor that is not quantised."""
    text = str(tensor.dtype).removeprefix("torch.")
    if module is model.lm_head and tensor is model.model.embed_tokens.weight:
        return "head", "tied to the embedding", 0
    if module is model.lm_head:
        return "head", text, tensor.nbytes
    if module is model.model.embed_tokens:
        return "embedding" if leaf == "weight" else "embedding scale", text, tensor.nbytes
    if module is model.model.rotary_emb:
        return "rotary tables", text, tensor.nbytes
    if leaf == "bias":
        return "biases", text, tensor.nbytes
    if isinstance(module, LoraLinear):
        return _LINEAR_KINDS.get(path.split(".")[-2], "other linears"), text, tensor.nbytes
    return "norms", text, tensor.nbytes

"""Loading a base model: built empty, filled tensor by tensor, quantised on the way.

The model is built on the meta device, where tensors have a shape and no memory. Each tensor of the
checkpoint is then read into one buffer, moved to the device, cast, quantised if it is a linear
layer of a decoder layer, and put in its place before the next one is read. So the memory needed is
that of the model as it is stored here, plus about two of its largest tensors. Names and shapes are
all checked before the first tensor is read.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from lowmem_dpo.model.checkpoint import StoredTensor, file_digest, read_headers, weight_files
from lowmem_dpo.model.lora import LoraLinear, wrap_linears
from lowmem_dpo.model.nf4 import QUANTISER_VERSION, Nf4Weight, quantize_nf4
from lowmem_dpo.model.source import answer_ends, model_folder
from lowmem_dpo_kernels.heads import Weight

Quantization = Literal["nf4", "none"]

_LAYERS_PATH = "model.layers"
_TABLE_SUFFIX = "rotary_emb.inv_freq"  # stored by old releases; computed from config.json instead
_LINEAR_KINDS = {"self_attn": "attention linears", "mlp": "mlp linears"}


@dataclass(frozen=True)
class StorageRow:
    """How one kind of tensor is stored."""

    kind: str
    count: int
    format: str
    nbytes: int


@dataclass(frozen=True)
class LoadedModel:
    """A base model in memory.

    Attributes:
        model: In eval mode, everything frozen; the linears of its decoder layers are LoraLinear
            without an adapter.
        storage: What is stored how, and how large.
        identity: Digest of the files it came from and of how they were quantised.
    """

    model: PreTrainedModel
    storage: list[StorageRow]
    identity: str


@dataclass(frozen=True)
class ModelParts:
    """What scoring needs of a model.

    Attributes:
        backbone: Token ids or embeddings to hidden states, final norm included.
        layers: The decoder layers.
        lm_head_weight: [V, D], or what hands out its slices (`head`).
        lm_head_bias: [V] or None.
        logit_scale: Factor on the logits.
        logit_softcap: c of c * tanh(logits / c), or None.
        plain_attention: The attention function of transformers that computes this model.
        head_implementation: Of `token_logps`.
    """

    backbone: PreTrainedModel
    layers: nn.ModuleList
    lm_head_weight: Weight
    lm_head_bias: Tensor | None
    logit_scale: float
    logit_softcap: float | None
    plain_attention: str = "sdpa"
    head_implementation: str = "auto"


def model_parts(model: PreTrainedModel) -> ModelParts:
    """The parts of a model of a supported type."""
    head = model.lm_head
    logit_scale, logit_softcap = _logit_rule(model.config)
    # sdpa has no soft-cap: transformers 5.17 leaves it out without a word, later ones refuse.
    is_capped = model.config.model_type == "gemma2"
    return ModelParts(
        backbone=model.model,
        layers=model.model.layers,
        lm_head_weight=head.weight,
        lm_head_bias=head.bias,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        plain_attention="eager" if is_capped else "sdpa",
    )


def _logit_rule(config: PretrainedConfig) -> tuple[float, float | None]:
    """Factor and soft-cap of the logits; what a config says for another type has no effect."""
    match config.model_type:
        case "cohere" | "cohere2":
            return float(config.logit_scale), None
        case "granite":
            return 1 / config.logits_scaling, None
        case "gemma2" | "gemma3_text":
            return 1.0, config.final_logit_softcapping
    return 1.0, None


def load_model(
    source: str,
    *,
    config: PretrainedConfig,
    quantization: Quantization,
    dtype: torch.dtype,
    device: torch.device | str,
    cache_dir: Path | None = None,
) -> LoadedModel:
    """Load a base model.

    Args:
        source: Folder or Hugging Face id.
        config: From `load_config`, which has said that the model can be loaded.
        quantization: nf4 or none, for the linears of the decoder layers.
        dtype: Of everything else, and of computation.
        device: Where the model goes.
        cache_dir: Where digests of files are remembered; None remembers nothing.

    Raises:
        ValueError: If the files are missing, damaged, or do not fit config.json.
    """
    folder = model_folder(source)
    files = weight_files(folder)
    model = _empty_model(config, dtype)
    if ends := answer_ends(folder):
        model.generation_config.eos_token_id = ends
    tensors = _matched(source, model, read_headers(files))
    buffer = torch.empty(max(stored.nbytes for stored in tensors.values()), dtype=torch.uint8)
    for name, stored in tensors.items():
        quantised = quantization == "nf4" and _is_linear(model, name)
        tensor = stored.read(buffer)
        # Codes come from the stored numbers, so that they do not depend on the compute type.
        kind = tensor.dtype if quantised else dtype
        _put(model, name, tensor.to(device=device, dtype=kind, copy=not quantised), quantised)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    _rebuild_buffers(model, config, device)
    _check_complete(source, model)
    identity = _identity([folder / "config.json", *files], quantization, cache_dir)
    return LoadedModel(model.eval(), _storage_rows(model), identity)


def storage_table(rows: list[StorageRow]) -> Table:
    """What is stored how, and how large."""
    table = Table("tensors", "count", "stored as", "MiB")
    for row in rows:
        table.add_row(row.kind, str(row.count), row.format, f"{row.nbytes / 2**20:,.1f}")
    table.add_row("total", "", "", f"{sum(row.nbytes for row in rows) / 2**20:,.1f}")
    return table


def _empty_model(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model without memory, frozen, its decoder layers' linears replaced."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        wrap_linears(model.model.layers, _LAYERS_PATH)
    return model.requires_grad_(False)


def _rebuild_buffers(
    model: PreTrainedModel, config: PretrainedConfig, device: torch.device | str
) -> None:
    """Make what no file holds, because it follows from config.json."""
    rotary, embedding = model.model.rotary_emb, model.model.embed_tokens
    model.model.rotary_emb = type(rotary)(config=config).to(device)
    if hasattr(embedding, "embed_scale"):  # Gemma's
        embedding.embed_scale = torch.tensor(embedding.scalar_embed_scale, device=device)


def _matched(
    source: str, model: PreTrainedModel, stored: Mapping[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """The stored tensors that the model wants, all of them, in the order they lie in the files."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    harmless = {name for name in stored if name.endswith(_TABLE_SUFFIX)}
    if model.config.tie_word_embeddings:
        expected.pop("lm_head.weight")
        harmless.add("lm_head.weight")
    wanted = {name: tensor for name, tensor in stored.items() if name not in harmless}
    for problem, names in (
        ("lack", expected.keys() - wanted.keys()),
        ("hold unexpected", wanted.keys() - expected.keys()),
    ):
        if names:
            raise ValueError(
                f"the weights of {source} {problem} {_some(names)}; "
                "they do not belong to its config.json"
            )
    for name, tensor in wanted.items():
        if tensor.shape != expected[name]:
            raise ValueError(
                f"{name} of {source} has shape {list(tensor.shape)}, config.json says "
                f"{list(expected[name])}; they do not belong together"
            )
    return wanted


def _some(names: set[str]) -> str:
    first, *others = sorted(names)
    return first + (f" and {len(others)} more" if others else "")


def _is_linear(model: PreTrainedModel, name: str) -> bool:
    """Whether a tensor is the weight of a decoder layer's linear."""
    path, _, leaf = name.rpartition(".")
    return leaf == "weight" and isinstance(model.get_submodule(path), LoraLinear)


def _put(model: PreTrainedModel, name: str, tensor: Tensor, quantised: bool) -> None:
    """Put a tensor in its place; to be quantised it may lie in the buffer, else it must not."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if quantised:
        del module.weight  # torch puts no module where a parameter is registered
        try:
            module.weight = quantize_nf4(tensor)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    else:
        setattr(module, leaf, nn.Parameter(tensor, requires_grad=False))


def _check_complete(source: str, model: PreTrainedModel) -> None:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    empty = {name for name, tensor in tensors if tensor.is_meta}
    if empty:
        raise ValueError(f"{source} cannot be loaded: {_some(empty)} is not filled from its files")


def _identity(files: list[Path], quantization: Quantization, cache_dir: Path | None) -> str:
    lines = [f"{path.name} {file_digest(path, cache_dir)}" for path in files]
    lines.append(f"quantization {quantization}")
    if quantization == "nf4":
        lines.append(f"quantiser {QUANTISER_VERSION}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _storage_rows(model: PreTrainedModel) -> list[StorageRow]:
    """Every tensor, counted by kind and format; a tied head takes no memory of its own."""
    sizes: dict[tuple[str, str], list[int]] = {}
    for path, module in model.named_modules():
        if isinstance(module, Nf4Weight):
            kind = _LINEAR_KINDS.get(path.split(".")[-3], "other linears")
            sizes.setdefault((kind, "nf4, double quantised"), []).append(module.nbytes)
            continue
        for leaf, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                kind, text, nbytes = _describe(model, path, module, leaf, tensor)
                sizes.setdefault((kind, text), []).append(nbytes)
    return [StorageRow(kind, len(each), text, sum(each)) for (kind, text), each in sizes.items()]


def _describe(
    model: PreTrainedModel, path: str, module: nn.Module, leaf: str, tensor: Tensor
) -> tuple[str, str, int]:
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

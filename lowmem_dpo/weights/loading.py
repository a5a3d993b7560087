"""Loading a base model: built empty, filled tensor by tensor, quantised on the way.

The model is built on the meta device, where tensors have a shape and no memory. Each tensor of the
checkpoint is then read, moved to the device, cast, quantised if it is a linear layer of a decoder
layer, and put in its place before the next one is read. What cannot be read to where it stays goes
through one buffer. So the memory needed is that of the model as it is stored here, plus about two
of its largest tensors. Names and shapes are all checked before the first tensor is read.

What was quantised goes to disk at the same time, in the format of bitsandbytes' checkpoints
(`quantized_copy`). So the next start, and a model that comes quantised, are read in the same way.
"""

import copy
import functools
import hashlib
import math
import weakref
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from lowmem_dpo.console import say, size
from lowmem_dpo.files import in_use
from lowmem_dpo.linears.lora import linear_layers, wrap_linears
from lowmem_dpo.linears.nf4 import BLOCK, BLOCK2, QUANTISER_VERSION, Nf4Weight, quantize_nf4
from lowmem_dpo.memory.levers import Levers
from lowmem_dpo.memory.limits import give_back_freed_memory
from lowmem_dpo.memory.weight_files import WeightFile
from lowmem_dpo.model.language_model import LanguageModel
from lowmem_dpo.weights.bitsandbytes_files import (
    StoredNf4,
    check_kept_quantised,
    group_nf4,
    nf4_tensors,
)
from lowmem_dpo.weights.folders import answer_ends
from lowmem_dpo.weights.hub import download_model
from lowmem_dpo.weights.quantized_copy import (
    COPIES_FOLDER,
    CopyWriter,
    find_copies,
    read_copy,
    remove_copy,
)
from lowmem_dpo.weights.safetensors_files import (
    HashedFile,
    StoredTensor,
    hash_file,
    read_headers,
    weight_files,
)
from lowmem_dpo.weights.size import NF4_BYTES, storage_rows

Quantization = Literal["nf4", "none"]
Weights = Mapping[str, StoredTensor | StoredNf4]

_LAYERS_PATH = "model.layers"
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_TABLE_SUFFIX = "rotary_emb.inv_freq"  # stored by old releases; computed from config.json instead


def load_model(
    source: str,
    *,
    config: PretrainedConfig,
    quantization: Quantization,
    dtype: torch.dtype,
    device: torch.device | str,
    cache_dir: Path | None = None,
    quantized_copy: bool = True,
    levers: Levers | None = None,
) -> LanguageModel:
    """Load a base model.

    Args:
        source: Folder or Hugging Face id.
        config: From `load_config`, which has said that the model can be loaded.
        quantization: nf4 or none, for the linears of the decoder layers. A model that is stored
            quantised is taken as it is, with what was left in 16 bit.
        dtype: Of everything else, and of computation.
        device: Where the model goes.
        cache_dir: Where digests of files are remembered and quantised copies lie; None for neither.
        quantized_copy: Whether to keep what is quantised here, and to read it the next time.
        levers: Places in memory, of which those of layers and embedding count here; by default all
            is on the device. Of layers on the disk what is quantised stays in its files, those of
            the quantised copy or the model's own; no more than a layer of it is ever in memory.

    Raises:
        ValueError: If files are missing, damaged, being changed, or do not fit config.json, or if
            layers are to stay in a copy that cannot be made.
    """
    folder = Path(source) if Path(source).is_dir() else download_model(source)
    device = torch.device(device)
    levers = levers or Levers()
    if levers.layers_on_disk:
        give_back_freed_memory()
    sources = [folder / "config.json", *weight_files(folder)]
    hashed = [hash_file(path, cache_dir) for path in sources]
    stored = _stored_weights(folder, config)
    comes_quantised = any(isinstance(weight, StoredNf4) for weight in stored.values())
    if comes_quantised:
        check_kept_quantised(source, quantization)
    quantise = quantization == "nf4" and not comes_quantised
    own_head = config.tie_word_embeddings and _holds_own_head(stored)
    if own_head:  # transformers decides in the same way
        say(
            f"model: {source} stores a head of its own, which is used, although its "
            "config.json says that it is the embedding (tie_word_embeddings)"
        )
        config = copy.deepcopy(config)
        config.tie_word_embeddings = False
    identity = _identity(hashed, quantization, quantise, own_head)
    placing = _Placing(dtype, device, levers)
    copies, network = None, None
    if quantise and quantized_copy and cache_dir:
        copies = cache_dir / COPIES_FOLDER
        network = _read_copied(copies, identity, source, config, placing)
    if network is None:
        network = _empty_model(config, dtype)
        weights = _matched(source, network, stored)
        with _copy_writer(copies, identity, source, folder, network, weights) as writer:
            _fill(network, weights, source, placing, quantise, writer)
            if not all(file.is_unchanged() for file in hashed):
                raise ValueError(
                    f"the files of {source} changed while they were read; "
                    "start again once nothing writes to them"
                )
        if quantise and levers.layers_on_disk:  # so far there is nothing but the copy
            assert copies, "read_source refuses that"
            network = _read_copied(copies, identity, source, config, placing)
            if network is None:
                raise ValueError(
                    "layer_weights disk: the disk does not give back what it was given"
                )
    if comes_quantised:
        _say_as_stored(source, network, quantized_copy)
    if ends := answer_ends(folder):
        network.generation_config.eos_token_id = ends
    return LanguageModel.of(network.eval(), identity, storage_rows(network))


def unfilled_model(
    config: PretrainedConfig,
    *,
    quantization: Quantization,
    dtype: torch.dtype,
    device: torch.device,
    mode: AbstractContextManager[Any],
    levers: Levers | None = None,
) -> LanguageModel:
    """The model that `load_model` would make, its tensors of the same sizes and of any content.

    Args:
        config: From config.json.
        quantization: As for `load_model`.
        dtype: As for `load_model`.
        device: As for `load_model`.
        mode: Entered where tensors are given memory; it may give them none.
        levers: As for `load_model`.
    """
    network = _empty_model(config, dtype)
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    if config.tie_word_embeddings:
        expected.pop(_HEAD)
    linears = _linear_weights(network) if quantization == "nf4" else set()
    levers, host = levers or Levers(), torch.device("cpu")
    layers_wait = levers.num_slots is not None and not levers.layers_on_disk
    with mode:
        for name, shape in expected.items():
            if name in linears:
                place = host if layers_wait else device
                weight = _unfilled_nf4((shape[0], shape[1]), place)
                if levers.layers_on_disk:
                    weight.leave_on_disk(dict.fromkeys(("packed", "absmax", "absmax2"), (None, 0)))
                _put(network, name, weight)
            else:
                place = host if name == _EMBEDDING and levers.embedding_on_host else device
                _put(network, name, torch.empty(shape, dtype=dtype, device=place))
        _complete("config.json", network, device)
        return LanguageModel.of(network.eval(), "unfilled", storage_rows(network))


def _unfilled_nf4(shape: tuple[int, int], device: torch.device) -> Nf4Weight:
    """A weight of shape (out, in), of the sizes that `quantize_nf4` gives and of any content."""
    blocks = -(-shape[0] * shape[1] // BLOCK)
    return Nf4Weight(
        torch.empty(shape[0] * shape[1] // 2, dtype=torch.uint8, device=device),
        torch.empty(blocks, dtype=torch.uint8, device=device),
        torch.empty(-(-blocks // BLOCK2), dtype=torch.float32, device=device),
        torch.empty((), dtype=torch.float32, device=device),
        shape,
    )


@dataclass(frozen=True)
class _Placing:
    """Where a model's tensors go, and in what type; the arguments are those of `load_model`."""

    dtype: torch.dtype
    device: torch.device
    levers: Levers


def _read_copied(
    copies: Path, identity: str, source: str, config: PretrainedConfig, placing: _Placing
) -> PreTrainedModel | None:
    """The model from its quantised copy; None if there is none that can be believed."""
    for folder in find_copies(copies, identity):
        try:
            model = _empty_model(config, placing.dtype)
            with ExitStack() as held:
                held.enter_context(in_use(folder))
                weights = _matched(source, model, group_nf4(read_copy(folder, identity)))
                _fill(model, weights, source, placing, False, None)
                if placing.levers.layers_on_disk:  # as long as there is a model that reads from it
                    weakref.finalize(model, held.pop_all().close)
            taken = size(sum(path.stat().st_size for path in folder.iterdir()))
        except (OSError, ValueError) as error:
            say(f"model: quantised again; its copy cannot be used and is removed: {error}")
            remove_copy(folder)
            continue
        stays = ", where its layers stay" if placing.levers.layers_on_disk else ""
        say(f"model: read from its quantised copy {folder} ({taken}){stays}")
        return model
    return None


@contextmanager
def _copy_writer(
    copies: Path | None,
    identity: str,
    source: str,
    source_folder: Path,
    model: PreTrainedModel,
    weights: Weights,
) -> Iterator[CopyWriter | None]:
    """Make the quantised copy while the model is filled, and say what came of it."""
    if copies is None:
        yield None
        return
    linears = _linear_weights(model)
    num_bytes = sum(
        NF4_BYTES * math.prod(weight.shape) if name in linears else weight.nbytes
        for name, weight in weights.items()
    )
    with closing(CopyWriter(copies, identity, weights, int(num_bytes))) as writer:
        yield writer
        if folder := writer.finish(source, source_folder):
            place = f"{folder} ({size(writer.num_bytes)})"
            say(f"model: quantised; the next start reads the copy {place}")
        elif writer.note:
            say(f"model: {writer.note}")


def _say_as_stored(source: str, model: PreTrainedModel, quantized_copy: bool) -> None:
    """Say that a model came quantised, and what of it did not."""
    layers = linear_layers(model).values()
    dense = sum(not isinstance(layer.weight, Nf4Weight) for layer in layers)
    left = f"; {dense} of its {len(layers)} linears are not, and stay so" if dense else ""
    unused = "" if quantized_copy else "; quantized_copy has no effect"
    say(f"model: {source} is quantised already and taken as it is{left}{unused}")


def _empty_model(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model without memory, frozen, its decoder layers' linears replaced."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        wrap_linears(model.model.layers, _LAYERS_PATH)
    return model.requires_grad_(False)


def _matched(
    source: str, model: PreTrainedModel, stored: Weights
) -> dict[str, StoredTensor | StoredNf4]:
    """The stored tensors that the model wants, all of them, in the order they lie in the files."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    harmless = {name for name in stored if name.endswith(_TABLE_SUFFIX)}
    if model.config.tie_word_embeddings:
        expected.pop(_HEAD)
        harmless.add(_HEAD)
    wanted = {name: tensor for name, tensor in stored.items() if name not in harmless}
    for problem, names in (
        ("lack", expected.keys() - wanted.keys()),
        ("hold unexpected", wanted.keys() - expected.keys()),
    ):
        if names:
            raise ValueError(
                f"the weights of {source} {problem} {_first_and_count(names)}; "
                "they do not belong to its config.json"
            )
    for name, tensor in wanted.items():
        if isinstance(tensor, StoredTensor) and not tensor.dtype.is_floating_point:
            raise ValueError(
                f"{name} of {source} is stored as {tensor.dtype} and has no scales beside it; "
                "use the original 16-bit model"
            )
        if tensor.shape != expected[name]:
            raise ValueError(
                f"{name} of {source} has shape {list(tensor.shape)}, config.json says "
                f"{list(expected[name])}; they do not belong together"
            )
    return wanted


def has_own_head(folder: Path, config: PretrainedConfig) -> bool:
    """Whether a model's head is no embedding, by its files rather than by config.json alone.

    Raises:
        ValueError: If its weights are missing or damaged.
    """
    return not config.tie_word_embeddings or _holds_own_head(_stored_weights(folder, config))


def _stored_weights(folder: Path, config: PretrainedConfig) -> dict[str, StoredTensor | StoredNf4]:
    """What a model's files hold; a tied weight may stand there under the head's name alone."""
    stored = group_nf4(read_headers(weight_files(folder)))
    if config.tie_word_embeddings and _HEAD in stored and _EMBEDDING not in stored:
        stored[_EMBEDDING] = stored.pop(_HEAD)
    return stored


def _holds_own_head(stored: Weights) -> bool:
    """Whether a head is stored whose numbers are not the embedding's."""
    head, embedding = stored.get(_HEAD), stored.get(_EMBEDDING)
    if isinstance(head, StoredTensor) and isinstance(embedding, StoredTensor):
        same_kind = (head.dtype, head.shape) == (embedding.dtype, embedding.shape)
        return not same_kind or head.content_digest() != embedding.content_digest()
    return isinstance(head, StoredNf4)


def _first_and_count(names: set[str]) -> str:
    """Names for a message: the first, and how many more there are."""
    first, *others = sorted(names)
    return first + (f" and {len(others)} more" if others else "")


def _linear_weights(model: PreTrainedModel) -> set[str]:
    """Names of the weights of the decoder layers' linears."""
    return {f"{name}.weight" for name in linear_layers(model)}


def _fill(
    model: PreTrainedModel,
    weights: Weights,
    source: str,
    placing: _Placing,
    quantise: bool,
    writer: CopyWriter | None,
) -> None:
    """Read every tensor to its place.

    Args:
        model: From `_empty_model`; stays so if layers are to be read from the copy that is made.
        weights: From `_matched`.
        source: For messages.
        placing: Where it goes.
        quantise: Whether to quantise the linears of the decoder layers.
        writer: Gets everything, what is not quantised in the source's own numbers; or None.
    """
    linears, dtype, host = _linear_weights(model), placing.dtype, torch.device("cpu")
    levers = placing.levers
    layers_wait = levers.num_slots is not None and not levers.layers_on_disk
    waits = {"layers": layers_wait, "embedding": levers.embedding_on_host}
    copies_alone = quantise and levers.layers_on_disk
    open_file = functools.cache(WeightFile)
    # Only the part of the buffer that something goes through takes memory.
    size_of_largest = max((stored.nbytes for stored in weights.values()), default=0)
    buffer = torch.empty(size_of_largest, dtype=torch.uint8)
    for name, stored in weights.items():
        is_linear = name in linears
        is_layers = is_linear and (quantise or isinstance(stored, StoredNf4))
        part = "layers" if is_layers else "embedding" if name == _EMBEDDING else ""
        place = host if waits.get(part) else placing.device
        tensors: dict[str, Tensor] = {}
        value: Tensor | Nf4Weight
        if isinstance(stored, StoredNf4) and is_linear and levers.layers_on_disk:
            value = stored.left_on_disk(placing.device, open_file)
        elif isinstance(stored, StoredNf4):
            value = stored.read(place, buffer)
            value = value if is_linear else value.dequantize(dtype)
        elif quantise and is_linear:
            # Codes come from the stored numbers, so that they do not depend on the compute type.
            try:
                value = quantize_nf4(stored.read(buffer).to(placing.device)).to(place)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            if writer is not None:
                tensors = nf4_tensors(name, value, stored.dtype)
        else:
            stays = place.type == "cpu" and stored.dtype == dtype
            tensor = stored.read(None if stays else buffer)
            value = tensor.to(device=place, dtype=dtype, copy=not stays)
            # The writer keeps it until its layer is whole; the buffer's content will not last.
            tensors = {name: tensor if stays or writer is None else tensor.clone()}
        if writer is not None:
            writer.add(name, tensors)
        if not copies_alone:
            _put(model, name, value)
        elif writer is not None and writer.note:
            why = f"{writer.note}; mend that, or leave it out"
            raise ValueError(f"layer_weights disk needs the quantised copy, but {why}")
    if not copies_alone:
        _complete(source, model, placing.device)


def _put(model: PreTrainedModel, name: str, value: Tensor | Nf4Weight) -> None:
    """Give a parameter of that name its value."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if isinstance(value, Nf4Weight):
        del module.weight  # torch puts no module where a parameter is registered
        module.weight = value
    else:
        setattr(module, leaf, nn.Parameter(value, requires_grad=False))


def _complete(source: str, model: PreTrainedModel, device: torch.device) -> None:
    """Make what no file holds, because it follows from config.json; nothing is left empty."""
    rotary, embedding = model.model.rotary_emb, model.model.embed_tokens
    if model.config.tie_word_embeddings:
        model.lm_head.weight = embedding.weight
    model.model.rotary_emb = type(rotary)(config=model.config).to(device)
    if hasattr(embedding, "embed_scale"):  # Gemma's
        embedding.embed_scale = torch.tensor(embedding.scalar_embed_scale, device=device)
    tensors = [*model.named_parameters(), *model.named_buffers()]
    empty = {name for name, tensor in tensors if tensor.device.type == "meta"}
    if empty:
        raise ValueError(
            f"{source} cannot be loaded: {_first_and_count(empty)} is not filled from its files"
        )


def _identity(
    files: list[HashedFile], quantization: Quantization, quantise: bool, own_head: bool
) -> str:
    lines = [f"{file.path.name} {file.digest}" for file in files]
    lines.append(f"quantization {quantization}")
    if quantise:
        lines.append(f"quantiser {QUANTISER_VERSION}")
    if own_head:
        lines.append("head not tied")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()

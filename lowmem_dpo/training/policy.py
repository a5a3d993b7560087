"""The policy: a base in memory with its adapter, ready to score, to train or to answer.

`load_policy` makes it, for every verb alike. Who needs to know the model before its weights are
read calls `read_source` first.
"""

import contextlib
import copy
import importlib.metadata
import os
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

import lowmem_dpo_kernels
from lowmem_dpo.console import say, warn
from lowmem_dpo.files import cache_folder
from lowmem_dpo.linears.lora import AdapterSpec, linear_layers, lora_layers, match_targets
from lowmem_dpo.machine.device import matmul_settings, resolve_device, resolve_dtype
from lowmem_dpo.machine.products import joins_products
from lowmem_dpo.memory.levers import Levers
from lowmem_dpo.memory.limits import limit_memory
from lowmem_dpo.model.attention import attention_path
from lowmem_dpo.model.head import check_tied_head
from lowmem_dpo.model.language_model import LanguageModel
from lowmem_dpo.model.layer import TILE_ROWS, mlp_path
from lowmem_dpo.model.surgery import norm_path, prepare_model
from lowmem_dpo.reference.cache import Fingerprint
from lowmem_dpo.settings.groups import (
    AdapterSettings,
    MemorySettings,
    ModelSettings,
    PlaceSettings,
    parse_bytes,
)
from lowmem_dpo.weights.adapters import (
    adapter_digest,
    load_adapter,
    other_base_storage,
    read_adapter_config,
    save_adapter,
    save_base_storage,
)
from lowmem_dpo.weights.bitsandbytes_files import check_kept_quantised
from lowmem_dpo.weights.folders import load_config, load_tokenizer, resolve_source
from lowmem_dpo.weights.hub import check_download
from lowmem_dpo.weights.loading import has_own_head, load_model
from lowmem_dpo.weights.safetensors_files import weight_files
from lowmem_dpo.weights.size import ModelSize
from lowmem_dpo_kernels.token_logps import resolve_implementation

LORA_SHAPE = ("lora_r", "lora_alpha", "use_rslora")


@dataclass(frozen=True)
class Source:
    """What settings name, read and checked as far as that needs no weights.

    Attributes:
        base: Folder or id of the base.
        init_adapter: Adapter folder to start from, or None.
        config: The base's config.json.
        tokenizer: The base's, or the starting adapter's own.
        device: Where the run computes.
        dtype: In what it computes.
        base_storage: The settings that say how the base is stored: with others it is another base.
        cache_dir: The folder of caches.
    """

    base: str
    init_adapter: str | None
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    dtype: torch.dtype
    base_storage: dict[str, str]
    cache_dir: Path


def check_quantised_files(
    base: str, config: PretrainedConfig, settings: ModelSettings, memory: PlaceSettings
) -> None:
    """Hold the settings against whether a base comes quantised.

    Raises:
        ValueError: If it does and should not stay so, or layers on the disk would have no files.
    """
    if getattr(config, "quantization_config", None):
        check_kept_quantised(base, settings.quantization)
    elif memory.layer_weights == "disk" and not settings.quantized_copy:
        raise ValueError(
            "layer_weights disk reads layers from the model's quantised copy; leave it or "
            "quantized_copy false out"
        )


def read_source(
    settings: ModelSettings,
    memory: PlaceSettings | None = None,
    *,
    init_adapter: str | None = None,
    adapter_setting: str = "init_adapter",
    max_length: int | None = None,
) -> Source:
    """Find base, tokenizer and starting adapter, and refuse what cannot work before any download.

    Args:
        settings: The model.
        memory: What the user decided of memory; by default nothing.
        init_adapter: PEFT adapter folder to start from, or None.
        adapter_setting: The user's name of `init_adapter`, for messages.
        max_length: Longest sequence, in tokens; None where that is checked later.

    Raises:
        ValueError: If a setting does not fit the machine, or the model is not supported.
    """
    memory = memory or MemorySettings()
    if settings.model is None:
        raise ValueError("no model given; set --model to a folder or a Hugging Face id")
    base, init_adapter, note = resolve_source(settings.model, init_adapter, adapter_setting)
    device, notes = resolve_device(settings.device)
    for line in ([note] if note else []) + notes:
        say(line)
    places = "layer_inputs", "layer_weights", "embedding_weight", "head_weight", "optimizer_state"
    for name in places:
        if getattr(memory, name, "auto") == "host" and device.type != "cuda":
            raise ValueError(f"{name} host has no effect on {device.type}; leave it out")
    if memory.memory_limit is not None:
        limit_memory(parse_bytes(memory.memory_limit), device)
    if device.type != "cuda":
        for name in ("host_memory_limit", "memory_check"):
            usual = getattr(MemorySettings, name)
            if getattr(memory, name, usual) != usual:
                raise ValueError(f"{name} has no effect on {device.type}; leave it out")
    if settings.kernels != "auto" and device.type != "cuda":
        raise ValueError(f"kernels {settings.kernels} has no effect on {device}; leave it out")
    try:
        # What only answers takes all logits of a token, and tries no kernel for that.
        resolve_implementation(getattr(memory, "head_kernel", "torch"), device)
    except ValueError as error:
        raise ValueError(f"head_kernel: {error}") from None
    config = load_config(base, max_length)
    comes_quantised = bool(getattr(config, "quantization_config", None))
    if comes_quantised or memory.layer_weights == "disk":
        check_quantised_files(base, config, settings, memory)
    if settings.head_quantization != "none" or "host" in (
        memory.head_weight,
        memory.embedding_weight,
    ):
        _check_head(base, config, settings, memory)
    cache_dir = cache_folder(settings.cache_dir)
    if Path(base).is_dir():
        weight_files(Path(base))  # that they are there, before the data is read
    else:
        copies = settings.quantization == "nf4" and settings.quantized_copy and not comes_quantised
        copy_bytes = ModelSize.of(config).nf4_bytes if copies else 0
        check_download(base, cache_dir, copy_bytes)
    dtype = resolve_dtype(settings.dtype, device, (config.hidden_size, config.intermediate_size))
    storage = {name: str(getattr(settings, name)) for name in ("quantization", "head_quantization")}
    storage["dtype"] = str(dtype).removeprefix("torch.")
    if init_adapter is not None:
        _warn_of_other_storage(Path(init_adapter), storage)
    tokenizer = load_tokenizer(base, init_adapter, config)
    return Source(base, init_adapter, config, tokenizer, device, dtype, storage, cache_dir)


def stored_config(base: str, config: PretrainedConfig) -> PretrainedConfig:
    """A config.json that tells of a head of its own where a model's files hold one.

    Raises:
        ValueError: If the model is a folder whose weights are missing or damaged.
    """
    folder = Path(base)
    if not config.tie_word_embeddings or not folder.is_dir() or not has_own_head(folder, config):
        return config
    config = copy.deepcopy(config)
    config.tie_word_embeddings = False
    return config


def _check_head(
    base: str, config: PretrainedConfig, settings: ModelSettings, memory: PlaceSettings
) -> None:
    """Refuse settings of the head that do not fit one which is the embedding."""
    if not stored_config(base, config).tie_word_embeddings:
        return
    try:
        check_tied_head(settings.head_quantization, memory.head_weight, memory.embedding_weight)
    except ValueError as error:
        if Path(base).is_dir():
            raise
        hint = f"; where {base} stores one of its own, download and name a folder"
        raise ValueError(f"{error}{hint}") from None


@dataclass(frozen=True)
class Policy:
    """The model that is trained, or that answers.

    Attributes:
        model: The base with its adapter.
        identity: What the reference's numbers depend on, but the pair.
        tokenizer: Of the same source.
        adapter: What kind of adapter; None for a base alone.
        base: Folder or id of the base.
        init_adapter: The adapter folder it starts from.
        base_storage: As in `Source`.
        chat_template: To save with the adapter: Jinja text, several by name, or None.
    """

    model: LanguageModel
    identity: dict[str, Any]
    tokenizer: PreTrainedTokenizerBase
    adapter: AdapterSpec | None
    base: str
    init_adapter: str | None
    base_storage: dict[str, str]
    chat_template: str | dict[str, str] | None = None

    def save(self, directory: Path) -> None:
        """Write the adapter in PEFT's format, with the tokenizer and template it trained under."""
        assert self.adapter is not None, "a base alone has no adapter to save"
        save_adapter(directory, self.model.network, base_model=self.base, settings=self.adapter)
        save_base_storage(directory, self.base_storage)
        own = self.tokenizer.chat_template
        self.tokenizer.chat_template = self.chat_template
        try:
            self.tokenizer.save_pretrained(directory)
        except Exception as error:  # tokenizers has no type for what the system refused
            if code := re.search(r"\(os error (\d+)\)", str(error)):
                raise OSError(int(code[1]), os.strerror(int(code[1])), str(directory)) from None
            raise
        finally:
            self.tokenizer.chat_template = own

    def fingerprint(self, pack_tokens: int) -> Fingerprint:
        """Everything beside the identity that can move the last bits of a log-prob."""
        model, device = self.model, self.model.device
        on_cuda = device.type == "cuda"
        if on_cuda:
            name = torch.cuda.get_device_name(device)
        else:
            name = platform.processor() or platform.machine()
            with contextlib.suppress(OSError):
                text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
                found = re.search(r"^model name[^:]*:([^:\n]*)", text, re.MULTILINE)
                name = found[1] if found else name
            name = f"{name.strip()} {torch.backends.cpu.get_cpu_capability()}"
        return {
            "device": name,
            "threads": None if on_cuda else torch.get_num_threads(),
            "dtype": str(model.dtype).removeprefix("torch."),
            "pack_tokens": pack_tokens,
            "head": lowmem_dpo_kernels.token_logps_path(device, model.head_implementation),
            "kernels": lowmem_dpo_kernels.NUMERICS_VERSION,
            "attention": attention_path(model.config, device, model.dtype),
            "norms": norm_path(model.backbone),
            "tile_rows": TILE_ROWS,
            "matmul_precision": torch.get_float32_matmul_precision(),
            **({"mlp": mlp_path(model.backbone)} | matmul_settings() if on_cuda else {}),
            **({"joined_products": True} if joins_products(device, model.dtype) else {}),
            "torch": torch.__version__,
            "triton": _triton_version() if on_cuda else None,
            "transformers": importlib.metadata.version("transformers"),
            "bitsandbytes": importlib.metadata.version("bitsandbytes"),
        }


def _triton_version() -> str | None:
    return import_module("triton").__version__ if find_spec("triton") else None


def load_policy(
    settings: ModelSettings,
    adapter: AdapterSettings | None = None,
    memory: PlaceSettings | None = None,
    *,
    levers: Levers | None = None,
    source: Source | None = None,
    init_adapter: str | None = None,
    seed: int = 0,
    chat_template: str | dict[str, str] | None = None,
) -> Policy:
    """Load the base and give it its adapter.

    Args:
        settings: The model.
        adapter: The adapter to train; None for what only answers, with the starting adapter if
            there is one.
        memory: What the user decided of memory; by default nothing.
        levers: Places in memory; by default those that the user decided, the rest as usual.
        source: From `read_source`, where that was called before.
        init_adapter: PEFT adapter folder to start from, where it was not.
        seed: Of a new adapter's A matrices.
        chat_template: To save with the adapter.

    Raises:
        ValueError: If the model cannot be read or trained.
    """
    memory = memory or MemorySettings()
    source = source or read_source(settings, memory, init_adapter=init_adapter)
    spec = None
    if adapter is not None or source.init_adapter is not None:
        spec = adapter_spec(adapter or AdapterSettings(), source.init_adapter)
    levers = levers or Levers.of(memory, source.config.num_hidden_layers)
    model = prepare_model(
        load_model(  # without a name here, which would hold a dense head while kernels are tried
            source.base,
            config=source.config,
            quantization=settings.quantization,
            dtype=source.dtype,
            device=source.device,
            cache_dir=source.cache_dir,
            quantized_copy=settings.quantized_copy,
            levers=levers,
        ),
        spec,
        levers,
        seed=seed,
        head_quantization=settings.head_quantization,
        head_kernel=getattr(memory, "head_kernel", "torch"),
        kernels=settings.allowed_kernels,
    )
    if source.init_adapter:
        load_adapter(model.network, Path(source.init_adapter))
        if adapter is not None:
            _warn_of_other_targets(model.network, adapter.lora_target_modules, source.init_adapter)
    base, start, storage = source.base, source.init_adapter, source.base_storage
    identity = {
        "base": model.identity,
        "init_adapter": adapter_digest(Path(start)) if start else None,
        "logit_scale": model.logit_scale,
        "logit_softcap": model.logit_softcap,
    }
    return Policy(model, identity, source.tokenizer, spec, base, start, storage, chat_template)


def adapter_spec(
    settings: AdapterSettings, init_adapter: str | None, *, warns: bool = True
) -> AdapterSpec:
    """The adapter as the settings say, or as the starting adapter is; `warns` of what is unused."""
    wanted = AdapterSpec(
        rank=settings.lora_r,
        alpha=settings.lora_alpha,
        dropout=settings.lora_dropout,
        targets=settings.lora_target_modules,
        rank_stabilised=settings.use_rslora,
    )
    if init_adapter is None:
        return wanted
    given = replace(read_adapter_config(Path(init_adapter)), dropout=wanted.dropout)
    usual = AdapterSettings()
    asked = [name for name in LORA_SHAPE if getattr(settings, name) != getattr(usual, name)]
    if warns and asked and replace(given, targets=wanted.targets) != wanted:
        warn(
            f"{', '.join(asked)}: no effect, the run starts from {init_adapter}, which has rank "
            f"{given.rank} and alpha {given.alpha:g}"
        )
    return given


def _warn_of_other_storage(adapter: Path, storage: dict[str, str]) -> None:
    """Say where an adapter was trained on a base that was stored otherwise."""
    if other := other_base_storage(adapter, storage):
        trained = ", ".join(f"{name} {value}" for name, value in other.items())
        here = ", ".join(f"{name} {storage[name]}" for name in other)
        warn(
            f"adapter {adapter} was trained with {trained}, this run has {here}; "
            "its answers differ, set it as it was to have the same"
        )


def _warn_of_other_targets(
    network: nn.Module, targets: str | Sequence[str], init_adapter: str
) -> None:
    """Say that lora_target_modules has no effect, if it was set to other layers."""
    if targets == AdapterSettings().lora_target_modules:
        return
    ours = lora_layers(network).keys()
    if set(match_targets(linear_layers(network), targets)) != ours:
        warn(
            f"lora_target_modules: no effect, the run starts from {init_adapter}, which is on "
            f"{len(ours)} layers of its own"
        )

"""The policy: the base in memory, its adapter, its layers wrapped, ready to be trained."""

import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

import lowmem_dpo_kernels
from lowmem_dpo.console import say, warn
from lowmem_dpo.data.rendering import build_renderer
from lowmem_dpo.machine.device import resolve_device, resolve_dtype
from lowmem_dpo.memory.limits import limit_memory
from lowmem_dpo.model.attention import TREE_ATTENTION, attention_path
from lowmem_dpo.model.fused import fuse_mlps, fuse_norms, norm_implementation, tile_layers
from lowmem_dpo.model.head import check_head, head_to_host, quantize_head
from lowmem_dpo.model.language_model import LanguageModel
from lowmem_dpo.model.lora import add_lora, linear_layers, lora_layers, match_targets
from lowmem_dpo.model.runner import wrap_layers
from lowmem_dpo.model.selfcheck import tried_head
from lowmem_dpo.model.tiles import TILE_ROWS
from lowmem_dpo.reference.cache import Fingerprint
from lowmem_dpo.settings.configs import TrainConfig
from lowmem_dpo.weights.adapters import (
    AdapterSpec,
    adapter_digest,
    load_adapter,
    other_base_storage,
    read_adapter_config,
    save_adapter,
    save_base_storage,
)
from lowmem_dpo.weights.bitsandbytes_files import check_kept_quantised
from lowmem_dpo.weights.folders import load_config, load_tokenizer, resolve_source, tokenizer_source
from lowmem_dpo.weights.hub import check_download
from lowmem_dpo.weights.loading import load_model
from lowmem_dpo.weights.size import ModelSize
from lowmem_dpo_kernels.token_logps import check_implementation

LORA_SHAPE = ("lora_r", "lora_alpha", "use_rslora")


def cache_directory(setting: str | None) -> Path:
    """The folder of caches: the setting, else $LOWMEM_DPO_CACHE, else ~/.cache/lowmem_dpo."""
    return Path(
        setting or os.environ.get("LOWMEM_DPO_CACHE") or Path.home() / ".cache" / "lowmem_dpo"
    )


@dataclass
class Policy:
    """The model that is trained.

    Attributes:
        model: The base with its adapter.
        tokenizer: Of the same source.
        adapter: Settings of the adapter.
        source: The base's folder or id.
        init_adapter: The adapter folder it starts from.
        chat_template: Jinja text in use, or None for plain text.
        base_storage: The settings that say how the base is stored.
    """

    model: LanguageModel
    tokenizer: PreTrainedTokenizerBase
    adapter: AdapterSpec
    source: str = ""
    init_adapter: str | None = None
    chat_template: str | None = None
    base_storage: dict[str, str] = field(default_factory=dict)

    @property
    def identity(self) -> dict[str, Any]:
        """What the reference's numbers depend on, but the pair."""
        return {
            "base": self.model.identity,
            "init_adapter": adapter_digest(Path(self.init_adapter)) if self.init_adapter else None,
            "logit_scale": self.model.logit_scale,
            "logit_softcap": self.model.logit_softcap,
        }

    @property
    def digest(self) -> str:
        """Digest of the base and of the adapter it starts from."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()

    def save(self, directory: Path) -> None:
        """Write the adapter in PEFT's format, with the tokenizer and template it trained under."""
        save_adapter(directory, self.model.network, base_model=self.source, settings=self.adapter)
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
        """Everything else that can move the last bits of a log-prob."""
        on_cuda = self.model.device.type == "cuda"
        return {
            "device": torch.cuda.get_device_name(self.model.device) if on_cuda else _cpu_name(),
            "threads": None if on_cuda else torch.get_num_threads(),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "pack_tokens": pack_tokens,
            "head": lowmem_dpo_kernels.token_logps_path(
                self.model.device, self.model.head_implementation
            ),
            "kernels": lowmem_dpo_kernels.NUMERICS_VERSION,
            "attention": attention_path(self.model.config, self.model.device, self.model.dtype),
            "norms": norm_implementation(self.model.device, self.model.dtype),
            "tile_rows": TILE_ROWS,
            "matmul_precision": torch.get_float32_matmul_precision(),
            "torch": torch.__version__,
            "triton": _triton_version() if on_cuda else None,
            "transformers": transformers.__version__,
            "bitsandbytes": bitsandbytes.__version__,
        }


def _triton_version() -> str | None:
    return import_module("triton").__version__ if find_spec("triton") else None


def _cpu_name() -> str:
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.split(":")[1] for line in lines if line.startswith("model name")), name)
    return f"{name.strip()} {torch.backends.cpu.get_cpu_capability()}"


@dataclass(frozen=True)
class Source:
    """What a config names, read and checked as far as that needs no weights.

    Attributes:
        base: Folder or id of the base.
        init_adapter: Adapter folder to start from, or None.
        model_config: The base's config.json.
        tokenizer: The base's, or the starting adapter's own.
        adapter: What kind of adapter the run trains.
        device: Where the run computes.
        dtype: In what it computes.
    """

    base: str
    init_adapter: str | None
    model_config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    adapter: AdapterSpec
    device: torch.device
    dtype: torch.dtype


def read_source(config: TrainConfig, adapter_setting: str = "init_adapter") -> Source:
    """Find base, tokenizer and starting adapter, and refuse what cannot work before any download.

    Args:
        config: The settings.
        adapter_setting: The user's name of `init_adapter`, for messages.

    Raises:
        ValueError: If a setting does not fit the machine, or the model is not supported.
    """
    if config.model is None:
        raise ValueError("no model given; set --model to a folder or a Hugging Face id")
    base, init_adapter, note = resolve_source(config.model, config.init_adapter, adapter_setting)
    device, notes = resolve_device(config.device)
    for line in ([note] if note else []) + notes:
        say(line)
    if config.layer_inputs == "host" and device.type != "cuda":
        raise ValueError(f"layer_inputs host has no effect on {device.type}; leave it out")
    if config.optim == "paged_adamw_8bit" and device.type != "cuda":
        raise ValueError(f"optim paged_adamw_8bit cannot page on {device.type}; use adamw_8bit")
    if config.memory_limit_bytes is not None:
        limit_memory(config.memory_limit_bytes, device)
    if config.head_weight == "host" and device.type != "cuda":
        raise ValueError(f"head_weight host has no effect on {device.type}; leave it out")
    try:
        check_implementation(config.head_kernel, device)
    except ValueError as error:
        raise ValueError(f"head_kernel: {error}") from None
    model_config = load_config(base, max_length=config.max_length)
    comes_quantised = bool(getattr(model_config, "quantization_config", None))
    if comes_quantised:
        check_kept_quantised(base, config.quantization)
    check_head(model_config.tie_word_embeddings, config.head_quantization, config.head_weight)
    if not Path(base).is_dir():
        copies = config.quantization == "nf4" and config.quantized_copy and not comes_quantised
        copy_bytes = ModelSize.of(model_config).nf4_bytes if copies else 0
        check_download(base, cache_directory(config.cache_dir), copy_bytes)
    dtype = resolve_dtype(config.dtype, device)
    if init_adapter is not None:
        _warn_of_other_storage(Path(init_adapter), _base_storage(config, dtype))
    return Source(
        base=base,
        init_adapter=init_adapter,
        model_config=model_config,
        tokenizer=load_tokenizer(tokenizer_source(base, init_adapter)),
        adapter=_adapter_settings(config, init_adapter),
        device=device,
        dtype=dtype,
    )


def load_policy(config: TrainConfig, source: Source | None = None) -> Policy:
    """Load the base and give it its adapter.

    Args:
        config: The settings.
        source: From `read_source`, if that was done already.

    Raises:
        ValueError: If the model cannot be read or trained.
    """
    source = source or read_source(config)
    loaded = load_model(
        source.base,
        config=source.model_config,
        quantization=config.quantization,
        dtype=source.dtype,
        device=source.device,
        cache_dir=cache_directory(config.cache_dir),
        quantized_copy=config.quantized_copy,
    )
    loaded = quantize_head(loaded, config.head_quantization)
    if config.head_weight == "host":
        loaded = head_to_host(loaded, source.device)
    policy = make_policy(
        loaded,
        source.tokenizer,
        source.adapter,
        seed=config.seed,
        layer_inputs=config.layer_inputs,
        head_kernel=config.head_kernel,
    )
    policy.source, policy.init_adapter = source.base, source.init_adapter
    policy.base_storage = _base_storage(config, source.dtype)
    policy.chat_template = build_renderer(source.tokenizer, config).template
    if source.init_adapter:
        load_adapter(loaded.network, Path(source.init_adapter))
        _warn_of_other_targets(loaded.network, config.lora_target_modules, source.init_adapter)
    return policy


def _warn_of_other_targets(
    model: nn.Module, targets: str | Sequence[str], init_adapter: str
) -> None:
    """Say that lora_target_modules has no effect, if it was set to other layers."""
    if targets == TrainConfig().lora_target_modules:
        return
    ours = lora_layers(model).keys()
    if set(match_targets(linear_layers(model), targets)) != ours:
        warn(
            f"lora_target_modules: no effect, the run starts from {init_adapter}, which is on "
            f"{len(ours)} layers of its own"
        )


def make_policy(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    adapter: AdapterSpec,
    *,
    seed: int,
    layer_inputs: str,
    head_kernel: str = "auto",
) -> Policy:
    """Give a loaded base a new adapter, layer runners and attention over trees.

    Args:
        model: The base; changed in place.
        tokenizer: Its tokenizer.
        adapter: What kind of adapter.
        seed: Of the adapter's A matrices.
        layer_inputs: device or host.
        head_kernel: Implementation of `token_logps`; torch takes its place where it is wrong.
    """
    add_lora(
        model.network,
        targets=adapter.targets,
        rank=adapter.rank,
        alpha=adapter.alpha,
        dropout=adapter.dropout,
        rank_stabilised=adapter.rank_stabilised,
        seed=seed,
    )
    model = tried_head(dataclasses.replace(model, head_implementation=head_kernel))
    fuse_norms(model.backbone)
    fuse_mlps(model.layers)
    tile_layers(model.layers, has_randomness=adapter.dropout > 0)
    wrap_layers(
        model.layers, inputs_on_host=layer_inputs == "host", has_randomness=adapter.dropout > 0
    )
    model.backbone.set_attn_implementation(TREE_ATTENTION)
    return Policy(model, tokenizer, adapter)


def _base_storage(config: TrainConfig, dtype: torch.dtype) -> dict[str, str]:
    """The settings that say how the base is stored: with others it is another base."""
    return {
        "quantization": config.quantization,
        "head_quantization": config.head_quantization,
        "dtype": str(dtype).removeprefix("torch."),
    }


def _warn_of_other_storage(adapter: Path, storage: dict[str, str]) -> None:
    """Say where an adapter was trained on a base that was stored otherwise."""
    if other := other_base_storage(adapter, storage):
        trained = ", ".join(f"{name} {value}" for name, value in other.items())
        here = ", ".join(f"{name} {storage[name]}" for name in other)
        warn(
            f"adapter {adapter} was trained with {trained}, this run has {here}; "
            "its answers differ, set it as it was to have the same"
        )


def _adapter_settings(config: TrainConfig, init_adapter: str | None) -> AdapterSpec:
    """The run's adapter: as the settings say, or as the starting adapter is."""
    wanted = AdapterSpec(
        rank=config.lora_r,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        targets=config.lora_target_modules,
        rank_stabilised=config.use_rslora,
    )
    if init_adapter is None:
        return wanted
    given = dataclasses.replace(
        read_adapter_config(Path(init_adapter)), dropout=config.lora_dropout
    )
    usual = TrainConfig()
    asked = [name for name in LORA_SHAPE if getattr(config, name) != getattr(usual, name)]
    if asked and (given.rank, given.alpha, given.rank_stabilised) != (
        wanted.rank,
        wanted.alpha,
        wanted.rank_stabilised,
    ):
        warn(
            f"{', '.join(asked)}: no effect, the run starts from {init_adapter}, which has rank "
            f"{given.rank} and alpha {given.alpha:g}"
        )
    return given

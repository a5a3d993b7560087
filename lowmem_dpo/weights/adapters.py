"""LoRA adapters on disk, in PEFT's format: adapter_config.json and adapter_model.safetensors.

What is written here loads with `peft.PeftModel.from_pretrained`, and adapters of PEFT load here.
Variants of LoRA that compute something else, or that change more than the linears of the decoder
layers, are refused by name: running them as plain LoRA would give another model without a word.

Source: PEFT, https://github.com/huggingface/peft, `LoraConfig` and `save_pretrained`.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from lowmem_dpo.files import replace_file
from lowmem_dpo.linears.lora import AdapterSpec, lora_layers, lora_parameters
from lowmem_dpo.weights.folders import ADAPTER_CONFIG_FILE, absolute, read_json
from lowmem_dpo.weights.safetensors_files import StoredTensor, file_digest, read_header

ADAPTER_WEIGHTS_FILE = "adapter_model.safetensors"
# Not PEFT's, which passes it over: how the base was stored that the adapter was trained on.
BASE_STORAGE_FILE = "lowmem_dpo.json"

_PREFIX = "base_model.model."
_SUFFIXES = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}

# Fields of PEFT's LoraConfig that are read here, or that do not change what the adapter computes.
_KNOWN_FIELDS = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "megatron_core", "peft_version"),
    *("revision", "runtime_config", "task_type", "ensure_weight_tying", "qalora_group_size"),
    *("peft_type", "bias", "init_lora_weights", "eva_config"),
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
}
# Fields of it that, once they are set, make another adapter of it or change more than linears.
_VARIANTS = {
    *("alora_invocation_tokens", "arrow_config", "corda_config", "fan_in_fan_out", "kasa_config"),
    *("layer_replication", "loftq_config", "lora_bias", "lora_ga_config", "megatron_config"),
    *("modules_to_save", "monteclora_config", "target_parameters", "trainable_token_indices"),
    *("use_bdlora", "use_dora", "use_qalora", "velora_config"),
}
# The others (PiSSA, OLoRA, LoftQ, CorDA, ...) come with a base of their own.
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")


def save_adapter(
    directory: Path, model: nn.Module, *, base_model: str, settings: AdapterSpec
) -> None:
    """Write the adapter of a model as PEFT does, in fp32.

    Args:
        directory: Folder to write to; it is made if it is not there.
        model: A model with adapters.
        base_model: The base's folder, written as an absolute path, or its Hugging Face id.
        settings: Those the adapter was made with.
    """
    parameters = lora_parameters(model)
    tensors = {_stored_name(name): p.detach().cpu().contiguous() for name, p in parameters.items()}
    targets = set(settings.targets)
    if settings.targets == "all":
        targets = {name.rpartition(".")[2] for name in lora_layers(model)}
    config = {
        "alpha_pattern": dict(settings.alpha_pattern),
        "base_model_name_or_path": absolute(base_model),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(settings.alpha)
        if settings.alpha == int(settings.alpha)
        else settings.alpha,
        "lora_dropout": settings.dropout,
        "peft_type": "LORA",
        "r": settings.rank,
        "rank_pattern": dict(settings.rank_pattern),
        "target_modules": sorted(targets),
        "task_type": "CAUSAL_LM",
        "use_rslora": settings.rank_stabilised,
    }
    directory.mkdir(parents=True, exist_ok=True)
    replace_file(
        directory / ADAPTER_WEIGHTS_FILE, safetensors.torch.save(tensors, {"format": "pt"})
    )
    replace_file(directory / ADAPTER_CONFIG_FILE, json.dumps(config, indent=2).encode())


def save_base_storage(directory: Path, storage: Mapping[str, str]) -> None:
    """Write beside an adapter which settings made the base that it was trained on."""
    replace_file(directory / BASE_STORAGE_FILE, json.dumps(storage, indent=2).encode())


def other_base_storage(directory: Path, storage: Mapping[str, str]) -> dict[str, str]:
    """The settings of the base an adapter was trained on, where they are not those of `storage`.

    Empty for an adapter that does not say, such as one of PEFT's own.
    """
    path = directory / BASE_STORAGE_FILE
    recorded = read_json(path) if path.is_file() else {}
    return {
        name: recorded[name]
        for name, value in storage.items()
        if recorded.get(name, value) != value
    }


def read_adapter_config(directory: Path) -> AdapterSpec:
    """What kind of adapter a folder holds, once it is known to be plain LoRA.

    Raises:
        ValueError: If there is no adapter, or one that is not supported.
    """
    if not (directory / ADAPTER_CONFIG_FILE).is_file():
        raise ValueError(f"{directory} is no adapter folder: no {ADAPTER_CONFIG_FILE} in it")
    config = read_json(directory / ADAPTER_CONFIG_FILE)
    _refuse_variants(directory, config)
    targets = _targets(directory, config)
    try:
        settings = AdapterSpec(
            rank=int(config["r"]),
            alpha=float(config["lora_alpha"]),
            dropout=float(config.get("lora_dropout") or 0.0),
            targets=targets,
            rank_stabilised=bool(config.get("use_rslora", False)),
            rank_pattern={k: int(v) for k, v in (config.get("rank_pattern") or {}).items()},
            alpha_pattern={k: float(v) for k, v in (config.get("alpha_pattern") or {}).items()},
        )
        for pattern in [*settings.rank_pattern, *settings.alpha_pattern]:
            re.compile(pattern)
    except (KeyError, TypeError, ValueError, AttributeError, re.error) as error:
        raise ValueError(
            f"{directory / ADAPTER_CONFIG_FILE}: r and lora_alpha must be numbers, rank_pattern "
            f"and alpha_pattern regular expressions with a number each ({error!r})"
        ) from None
    if (rank := min([settings.rank, *settings.rank_pattern.values()])) < 1:
        raise ValueError(f"{directory / ADAPTER_CONFIG_FILE}: r must be at least 1, got {rank}")
    return settings


@torch.no_grad()
def load_adapter(model: nn.Module, directory: Path) -> None:
    """Copy an adapter's values into the adapters that the model carries.

    Args:
        model: A model to which `add_lora` gave adapters with the settings of this one.
        directory: A PEFT adapter folder.

    Raises:
        ValueError: If the tensors in the folder are not exactly those of the model.
    """
    parameters = {_stored_name(name): p for name, p in lora_parameters(model).items()}
    stored = _read_tensors(directory)
    for problem, names in (
        ("lacks", parameters.keys() - stored.keys()),
        ("holds what the model has no place for:", stored.keys() - parameters.keys()),
    ):
        if names:
            raise ValueError(
                f"adapter {directory} {problem} {min(names)} ({len(names)} in all); "
                "it does not belong to this base or is damaged"
            )
    for name, parameter in parameters.items():
        if stored[name].shape != tuple(parameter.shape):
            raise ValueError(
                f"{name} of adapter {directory} has shape {list(stored[name].shape)}, the "
                f"model needs {list(parameter.shape)}; it was made for another base or rank"
            )
    for name, parameter in parameters.items():
        parameter.copy_(stored[name].read())


def adapter_digest(directory: Path) -> str:
    """SHA-256, in hex, of what an adapter computes: its tensors and its scaling."""
    settings = read_adapter_config(directory)
    scaling: list[Any] = [settings.rank, settings.alpha, settings.rank_stabilised]
    if settings.rank_pattern or settings.alpha_pattern:
        scaling += [list(settings.rank_pattern.items()), list(settings.alpha_pattern.items())]
    weights = file_digest(directory / ADAPTER_WEIGHTS_FILE)
    return hashlib.sha256(json.dumps([scaling, weights]).encode()).hexdigest()


def _stored_name(parameter_name: str) -> str:
    layer, _, leaf = parameter_name.rpartition(".")
    return f"{_PREFIX}{layer}.{_SUFFIXES[leaf]}"


def _read_tensors(directory: Path) -> dict[str, StoredTensor]:
    path = directory / ADAPTER_WEIGHTS_FILE
    if not path.is_file() and (directory / "adapter_model.bin").is_file():
        raise ValueError(
            f"adapter {directory} is pickled (adapter_model.bin), which can run code; load it "
            "with PEFT and save it again with safe_serialization=True"
        )
    return read_header(path)


def _stored_layers(directory: Path) -> list[str]:
    """The names of the layers that an adapter's file holds tensors for."""
    pattern = re.compile(re.escape(_PREFIX) + r"(.+)\.lora_[AB]\.weight")
    matches = {name: pattern.fullmatch(name) for name in _read_tensors(directory)}
    foreign = [name for name, match in matches.items() if match is None]
    if not matches:
        raise ValueError(f"adapter {directory} holds no tensors; it is damaged")
    if foreign:
        raise ValueError(
            f"adapter {directory} holds {min(foreign)}, which is no LoRA matrix of a linear layer; "
            "only plain LoRA adapters are supported"
        )
    return list(dict.fromkeys(match[1] for match in matches.values() if match))


def _targets(directory: Path, config: dict[str, Any]) -> str | list[str]:
    """The layers that PEFT would adapt, as `add_lora` takes them.

    For a regular expression, or where some layers are left out, they are the layers in the file,
    each held against PEFT's rules.
    """
    layers = _stored_layers(directory)
    given = config.get("target_modules")
    if not given or not isinstance(given, str | list):
        raise ValueError(f"adapter {directory}: target_modules must name layers, got {given!r}")
    names = [] if isinstance(given, str) else [str(name) for name in given]
    outside = [name for name in layers if ".layers." not in name]
    outside += [name for name in names if re.search(r"(^|\.)(lm_head|embed_tokens)$", name)]
    if outside:
        raise ValueError(
            f"adapter {directory} adapts {outside[0]}; "
            "only linears of the decoder layers are supported"
        )
    try:
        foreign = [name for name in layers if not _is_adapted(name, config)]
    except re.error as error:
        raise ValueError(
            f"{directory / ADAPTER_CONFIG_FILE}: no regular expression ({error})"
        ) from None
    if foreign:
        raise ValueError(
            f"adapter {directory} holds a LoRA matrix of {foreign[0]}, which its own "
            f"{ADAPTER_CONFIG_FILE} leaves out; it is damaged, or of two adapters"
        )
    some_are_left_out = config.get("exclude_modules") or _layer_numbers(config)
    if given == "all-linear" and not some_are_left_out:
        return "all"
    return layers if isinstance(given, str) or some_are_left_out else sorted(names)


def _is_adapted(layer: str, config: dict[str, Any]) -> bool:
    """Whether PEFT's rules give the linear of that name an adapter.

    Raises:
        re.error: If a pattern is none.
    """
    targets, excluded = config["target_modules"], config.get("exclude_modules")
    if excluded and _is_named(layer, excluded):
        return False
    if isinstance(targets, str):  # layer numbers count beside a list only
        return targets == "all-linear" or _is_named(layer, targets)
    numbers = _layer_numbers(config)
    if not numbers or layer in targets:
        return _is_named(layer, targets)
    patterns = config.get("layers_pattern") or [r"[^.]*"]
    patterns = [patterns] if isinstance(patterns, str) else patterns
    found = (re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", layer) for pattern in patterns)
    number = next((int(match[1]) for match in found if match), None)
    return number in numbers and _is_named(layer, targets)


def _is_named(layer: str, names: str | list[str]) -> bool:
    """Whether a regular expression is all of a layer's path, or one of some names its end."""
    if isinstance(names, str):
        return re.fullmatch(names, layer) is not None
    return any(f".{layer}".endswith(f".{name}") for name in names)


def _layer_numbers(config: dict[str, Any]) -> list[int]:
    """`layers_to_transform` as a list, empty for all."""
    given = config.get("layers_to_transform")
    return [given] if isinstance(given, int) else given or []


def _refuse_variants(directory: Path, config: dict[str, Any]) -> None:
    """Refuse by name whatever is not plain LoRA, and fields that no one here knows."""
    is_set = {name: value for name, value in config.items() if not _is_off(value)}
    refused = [f"{name}={is_set[name]!r}" for name in is_set.keys() & _VARIANTS]
    refused.sort()
    if config.get("peft_type") != "LORA":
        refused.insert(0, f"peft_type={config.get('peft_type')!r}")
    if config.get("bias", "none") != "none":
        refused.append(f"bias={config['bias']!r}")
    if config.get("init_lora_weights") not in _PLAIN_STARTS:
        refused.append(f"init_lora_weights={config['init_lora_weights']!r}")
    if refused:
        raise ValueError(
            f"adapter {directory} has {', '.join(refused)}, which is not supported; only plain "
            "LoRA on linear layers is: merge it into its base with PEFT (merge_and_unload), and "
            "give the merged model"
        )
    unknown = [f"{name}={is_set[name]!r}" for name in is_set.keys() - _KNOWN_FIELDS]
    if unknown:
        version = config.get("peft_version") or "another version"
        raise ValueError(
            f"adapter {directory} has {', '.join(sorted(unknown))}, which is not known here "
            f"(written by PEFT {version}); where that is PEFT's default and the adapter is plain "
            f"LoRA, take it out of {ADAPTER_CONFIG_FILE}"
        )


def _is_off(value: Any) -> bool:
    """Whether a field's value says that a feature is not used."""
    if isinstance(value, dict):
        return all(map(_is_off, value.values()))
    return value in (None, False, "", "none", [])

"""Where a model comes from: a folder, a Hugging Face id, or an adapter that names its base.

Everything that can be refused is refused here, from config.json alone, before a weight is read or
downloaded. Code that comes with a model is never run.
"""

import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from lowmem_dpo.data.hub_errors import one_line
from lowmem_dpo.model.families import FAMILIES
from lowmem_dpo.model.language_model import LAYER_TYPES, rope_limit, rope_settings
from lowmem_dpo.weights.bitsandbytes_files import check_quantization_config
from lowmem_dpo.weights.hub import download_config, download_small_files

SUPPORTED_MODEL_TYPES = tuple(FAMILIES)

# Frequencies that depend on the longest sequence of a batch (dynamic) are left out: a sequence's
# result would depend on its neighbours. Those of longrope do so beyond `rope_limit` only.
SUPPORTED_ROPE_TYPES = ("default", "linear", "llama3", "longrope", "yarn")

_ADVICE = {
    "gemma3": "it reads images too; take a text-only Gemma 3, such as google/gemma-3-1b-it",
}

ADAPTER_CONFIG_FILE = "adapter_config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def resolve_source(
    model: str, init_adapter: str | None, setting: str = "init_adapter"
) -> tuple[str, str | None, str | None]:
    """Tell the base from the adapter, where `model` may be either.

    Args:
        model: Folder or Hugging Face id of a model, or folder of a PEFT adapter.
        init_adapter: Folder of the PEFT adapter to start from, or None.
        setting: The user's name of `init_adapter`, for messages.

    Returns:
        The base's folder or id, the adapter's folder or None, and a line to tell the user or None.

    Raises:
        ValueError: If an adapter folder holds none, two are given, or one does not name its base.
    """
    folder = Path(model)
    if init_adapter is not None and not (Path(init_adapter) / ADAPTER_CONFIG_FILE).is_file():
        raise ValueError(
            f"adapter folder {init_adapter} is not one: "
            f"no {ADAPTER_CONFIG_FILE} in it{_nearby_adapter(Path(init_adapter))}"
        )
    if not (folder / ADAPTER_CONFIG_FILE).is_file():
        return model, init_adapter, _other_base(model, init_adapter) if init_adapter else None
    if init_adapter is not None and Path(init_adapter).resolve() != folder.resolve():
        raise ValueError(
            f"model {model} is an adapter and {setting} is {init_adapter}; "
            f"give the base as model, or leave {setting} out"
        )
    base = read_json(folder / ADAPTER_CONFIG_FILE).get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        raise ValueError(
            f"adapter {model} does not name its base; "
            f"give the base as model and {model} as {setting}"
        )
    base = _found_base(folder, base)
    return base, model, f"{model} is an adapter: starting from it, on its base {base}"


def _found_base(adapter: Path, base: str) -> str:
    """A relative base is looked for from here first, as PEFT does, then beside the adapter."""
    for candidate in (Path(base), adapter / base, adapter.parent / base):
        if (candidate / "config.json").is_file():
            return str(candidate)
    return base


def _other_base(model: str, init_adapter: str) -> str | None:
    """A line for the user where an adapter names another base than the one it is put on."""
    named = read_json(Path(init_adapter) / ADAPTER_CONFIG_FILE).get("base_model_name_or_path")
    if not named or not isinstance(named, str):
        return None
    base = _found_base(Path(init_adapter), named)
    if base == model or Path(base).resolve() == Path(model).resolve():
        return None
    return f"adapter {init_adapter} names {named} as its base; it is put on {model}"


def absolute(source: str) -> str:
    """A folder by its whole path; a Hugging Face id as it is."""
    return str(Path(source).resolve()) if Path(source).is_dir() else source


def _nearby_adapter(folder: Path) -> str:
    """A hint at the adapter that a run's folder holds."""
    for name in ("best", "adapter"):
        if (folder / name / ADAPTER_CONFIG_FILE).is_file():
            return f"; did you mean {folder / name}?"
    return ""


# Of a config.json, what must be there at least once.
_SIZES: tuple[str, ...] = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
_SIZES += ("num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings")


def load_config(source: str, max_length: int | None = None) -> PretrainedConfig:
    """Read a model's config.json and refuse what cannot be trained rightly.

    Args:
        source: Folder or Hugging Face id. Of the latter, only config.json is downloaded.
        max_length: Longest sequence of the run, in tokens; None where that is checked later.

    Raises:
        ValueError: If there is no such model, or it is one of those that are not supported.
    """
    folder = Path(source)
    path = folder / "config.json" if folder.is_dir() else _downloaded_config(source)
    if not path.is_file():
        raise ValueError(
            f"{source} is no model folder: no config.json in it{_nearby_adapter(folder)}"
        )
    raw = read_json(path)
    _check_raw_config(source, raw)
    try:
        autos = {name for name in ("dtype", "torch_dtype") if raw.get(name) == "auto"}
        if autos:  # which transformers looks up in torch; the run has a setting for it
            config = AutoConfig.for_model(**{k: v for k, v in raw.items() if k not in autos})
        else:
            config = AutoConfig.from_pretrained(path.parent, trust_remote_code=False)
    except (
        *(ValueError, TypeError, KeyError, AttributeError, OSError),
        StrictDataclassError,
    ) as error:
        raise ValueError(f"config.json of {source} is not valid: {one_line(error)}") from None
    unknown = set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES
    if unknown:
        raise ValueError(
            f"{source} has layers of type {', '.join(sorted(unknown))}; "
            f"supported: {', '.join(sorted(LAYER_TYPES))}"
        )
    for rope in rope_settings(config):
        rope_type = rope.get("rope_type", "default")
        if rope_type not in SUPPORTED_ROPE_TYPES:
            raise ValueError(
                f"{source} has position encoding {rope_type!r}; "
                f"supported: {', '.join(SUPPORTED_ROPE_TYPES)}"
            )
    limit = rope_limit(config)
    if limit is not None and max_length is not None and max_length > limit:
        raise ValueError(
            f"{source} has position encoding 'longrope', which changes beyond {limit} tokens and "
            f"is supported up to that length only; max_length is {max_length}, set it to {limit} "
            "or less"
        )
    return config


def load_tokenizer(
    source: str, init_adapter: str | None = None, config: PretrainedConfig | None = None
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model, or the one that an adapter brings.

    Args:
        source: Folder or Hugging Face id of the model.
        init_adapter: Folder of the adapter it starts from, whose tokenizer comes first; or None.
        config: The model's; by default its config.json is read again.

    Raises:
        ValueError: If there is none that can be read.
    """
    if init_adapter is not None and _holds_tokenizer(Path(init_adapter)):
        source = init_adapter
    folder = Path(source) if Path(source).is_dir() else download_small_files(source)
    if not _holds_tokenizer(folder):
        raise ValueError(
            f"{source} holds no tokenizer; copy tokenizer.json and tokenizer_config.json "
            "of the original model into it"
        )
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, config=config)
    except Exception as error:  # tokenizers raises Exception itself, transformers what it meets
        raise ValueError(f"cannot load the tokenizer of {source}: {one_line(error)}") from None


def _holds_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


def answer_ends(folder: Path) -> list[int]:
    """The tokens that end an answer by generation_config.json; none where there is no such file.

    Raises:
        ValueError: If the file is damaged.
    """
    path = folder / GENERATION_CONFIG_FILE
    ids = read_json(path).get("eos_token_id") if path.is_file() else None
    ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
    if not all(type(i) is int for i in ids):
        raise ValueError(f"eos_token_id in {path} must be a token id or a list of them, got {ids}")
    return ids


def _downloaded_config(source: str) -> Path:
    """The config.json of a Hugging Face id, in the cache of downloads."""
    if Path(source).exists():
        raise ValueError(
            f"{source} is a file; give the folder that holds config.json and the weights"
        )
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) or source.startswith("."):
        raise ValueError(
            f"there is no folder {source}; give a model's folder or its Hugging Face id"
        )
    return download_config(source)


def _check_raw_config(source: str, raw: dict[str, Any]) -> None:
    """Refuse by name what the file itself says, before transformers interprets it."""
    model_type = raw.get("model_type")
    if model_type not in SUPPORTED_MODEL_TYPES:
        advice = _ADVICE.get(str(model_type), f"supported: {', '.join(SUPPORTED_MODEL_TYPES)}")
        raise ValueError(f"{source} is of model type {model_type!r}; {advice}")
    if raw.get("use_bidirectional_attention") or raw.get("is_causal") is False:
        raise ValueError(
            f"{source} attends in both directions (use_bidirectional_attention or is_causal in "
            "config.json); only causal language models are supported"
        )
    code = raw.get("auto_map") or {}
    adopted = FAMILIES[model_type].adopted_code
    if adopted and isinstance(code, dict):  # transformers has it itself, under the same names
        names = {kind: str(path).rpartition(".")[2] for kind, path in code.items()}
        code = any(names.get(kind, name) != name for kind, name in adopted.items())
    if code:
        raise ValueError(
            f"{source} comes with code of its own (auto_map in config.json), which is never run; "
            "use a release of the model that transformers supports by itself"
        )
    check_quantization_config(source, raw)
    for name in _SIZES:
        value = raw.get(name)
        if isinstance(value, int) and value < 1:
            raise ValueError(f"config.json of {source} is not valid: {name} is {value}")
    kinds = raw.get("architectures") or []
    if kinds and not any(str(kind).endswith("ForCausalLM") for kind in kinds):
        raise ValueError(
            f"{source} is a {', '.join(map(str, kinds))}; only causal language models are supported"
        )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: If the file cannot be read or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(content).__name__}")
    return content

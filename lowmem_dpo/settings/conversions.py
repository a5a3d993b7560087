"""Other trainers' settings that a function turns into ours, because a value has to be read.

Each function takes the value, all that is given in file and flags, and the list of lines to tell
the user; it returns our settings, and raises ValueError where the value cannot be had here.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Values = dict[str, Any]
Conversion = Callable[[Any, Mapping[str, Any], list[str]], Values]

_PER_DEVICE = ("per_device_train_batch_size", "micro_batch_size")
_ALGORITHM = ("beta", "reference_free", "label_smoothing", "loss_type")
_SWIFT = ("rlhf_type", "train_type", "tuner_type")  # ms-swift's own, by which its files are known
# Of an entry of `datasets`: the names of ours, in TRL, alignment-handbook and axolotl.
_ENTRY = {
    **{"path": "data", "id": "data", "data_files": "data"},
    **{"name": "dataset_config", "config": "dataset_config", "split": "dataset_train_split"},
}
# axolotl's names of columns, and those that are read as what they name without a word.
_FIELDS = {
    "field_messages": ("messages", "prompt", "conversation", "conversations"),
    "field_chosen": ("chosen",),
    "field_rejected": ("rejected",),
}
_ENTRY_NO_EFFECT = (
    *("type", "ds_type", "columns", "chat_template", "trust_remote_code", "streaming"),
    *("message_property_mappings", "roles", "message_field_role", "message_field_content"),
)
ROW_FILES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")  # that are read here
_READERS = ("json", "csv", "parquet")  # generic readers of datasets; data_files names the file
_REGISTRY = "dataset_info.json"
# LLaMA-Factory's names of what a column holds, and ours.
_COLUMNS = {
    **{"messages": "conversations", "prompt": "instruction", "query": "input"},
    **{name: name for name in ("history", "system", "tools", "chosen", "rejected")},
}


def _batch_size(value: Any, given: Mapping[str, Any], notes: list[str]) -> Values:
    per_device = next((given[n] for n in _PER_DEVICE if given.get(n) is not None), None)
    if per_device is None:
        raise ValueError(
            "gradient_accumulation_steps needs per_device_train_batch_size: their product is the "
            "number of pairs a step; or set batch_size"
        )
    steps = given.get("gradient_accumulation_steps")
    counts = (per_device, 1 if steps is None else steps)
    for count in counts:
        if type(count) is not int or count < 1:
            raise ValueError(
                f"per_device_train_batch_size and gradient_accumulation_steps must be whole "
                f"numbers from 1 on, got {count!r}; or set batch_size"
            )
    return {"batch_size": counts[0] * counts[1]}


def _precision(value: Any, given: Mapping[str, Any], notes: list[str]) -> Values:
    flags = {n: given[n] for n in ("bf16", "fp16") if given.get(n) not in (None, "auto", "")}
    for name, flag in flags.items():
        if type(flag) is not bool:
            raise ValueError(f"{name} must be true or false, got {flag!r}; or set dtype")
    if flags.get("bf16") and flags.get("fp16"):
        raise ValueError("bf16 and fp16 are both true; leave one out, or set dtype")
    if flags.get("bf16"):
        return {"dtype": "bfloat16"}
    if flags.get("fp16"):
        return {"dtype": "float16"}
    return {"dtype": "float32"} if len(flags) == 2 else {}


def _four_bits(value: Any, given: Mapping[str, Any], notes: list[str]) -> Values:
    if type(value) is not bool:
        raise ValueError(f"load_in_4bit must be true or false, got {value!r}; or set quantization")
    return {"quantization": "nf4" if value else "none"}


def _adapter(value: Any, given: Mapping[str, Any], notes: list[str]) -> Values:
    if value not in ("lora", "qlora"):
        raise ValueError(
            f"adapter={value!r}: set lora or qlora; init_adapter starts from an adapter"
        )
    return {"quantization": "nf4"} if value == "qlora" else {}


def _lora_rank(value: Any, given: Mapping[str, Any], notes: list[str]) -> Values:
    if given.get("lora_alpha") is not None or type(value) is not int:
        return {"lora_r": value}
    is_swift = any(name in given for name in _SWIFT)
    alpha, why = (32, "ms-swift's default") if is_swift else (2 * value, "twice lora_rank")
    notes.append(f"lora_alpha {alpha}: not in the file, so {why}, as its trainer has it")
    return {"lora_r": value, "lora_alpha": alpha}


def _data_files(value: Any, given: Mapping[str, Any], notes: list[str]) -> Values:
    files = value if isinstance(value, dict) else {"train": value}
    result: Values = {}
    for split, paths in files.items():
        setting = {"train": "data", "test": "eval_data", "validation": "eval_data"}.get(split)
        paths = paths if isinstance(paths, list) else [paths]
        if setting is None or len(paths) != 1:
            raise ValueError(
                f"data_files={value!r}: give one file for train, and one for test if there is one"
            )
        result[setting] = paths[0]
    return result


def evaluates(given: Mapping[str, Any]) -> bool:
    """Whether a file of the transformers manner asks for evaluations."""
    strategy = given.get("eval_strategy", given.get("evaluation_strategy"))
    return strategy in ("steps", "epoch") or (strategy is None and given.get("do_eval") is True)


def _dataset_name(value: Any, given: Mapping[str, Any], notes: list[str]) -> Values:
    if value in (None, *_READERS):
        return {}
    named = any(given.get(name) for name in ("eval_data", "eval_fraction", "validation_file"))
    if given.get("dataset_test_split") and evaluates(given) and not named:
        return {"data": value, "eval_data": value}
    return {"data": value}


def _registered(setting: str) -> Conversion:
    """Of `dataset` and `eval_dataset`: a file or an id is taken, a name in a registry is not."""

    def convert(value: Any, given: Mapping[str, Any], notes: list[str]) -> Values:
        theirs = "dataset" if setting == "data" else "eval_dataset"
        if value in (None, "", []):
            return {}
        if given.get(setting) is not None:
            notes.append(f"{theirs}: no effect, {setting} is given")
            return {}
        names = value if isinstance(value, list) else str(value).split(",")
        if len(names) != 1:
            raise ValueError(
                f"{theirs} names {len(names)} sets, a run reads one; join them in a file and set "
                f"{setting} to it"
            )
        source, _, count = str(names[0]).strip().partition("#")
        if "/" not in source and "\\" not in source and "." not in source:
            return _look_up(theirs, source, setting, given, notes)
        if count and setting == "data":
            notes.append(f"dataset: the first {count} rows are taken, not {count} at random")
            return {setting: source, "max_samples": int(count) if count.isdigit() else count}
        return {setting: source}

    return convert


def _look_up(
    theirs: str, name: str, setting: str, given: Mapping[str, Any], notes: list[str]
) -> Values:
    """Our settings for a name in LLaMA-Factory's registry, where that lies in its folder."""
    registry = Path(given.get("dataset_dir") or "data") / _REGISTRY
    try:
        entry = json.loads(registry.read_text(encoding="utf-8"))[name]
        source = entry.get("hf_hub_url") or (registry.parent / entry["file_name"]).as_posix()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(
            f"{theirs}={name!r} is a name for LLaMA-Factory's {_REGISTRY}, and {registry} has no "
            f"such entry; set {setting} to the file or id behind it"
        ) from None
    notes.append(f"{theirs} {name}: {setting} is {source}, after {registry}")
    if setting != "data":
        return {setting: source}
    columns = {_COLUMNS[k]: v for k, v in (entry.get("columns") or {}).items() if k in _COLUMNS}
    columns = {ours: column for ours, column in columns.items() if ours != column}
    result = {"columns": columns or None, "dataset_train_split": entry.get("split")}
    result["dataset_config"] = entry.get("subset")
    return {setting: source} | {name: value for name, value in result.items() if value}


def _dataset_dir(value: Any, given: Mapping[str, Any], notes: list[str]) -> Values:
    if given.get("dataset") is None:
        notes.append("dataset_dir: no effect without dataset")
    return {}


def _mixer(value: Any, given: Mapping[str, Any], notes: list[str]) -> Values:
    if not isinstance(value, dict):
        return _entries("dataset_mixer", value, notes)
    entries = [{"id": name, "weight": share} for name, share in value.items()]
    return _entries("dataset_mixer", entries, notes)


def _splits(value: Any, given: Mapping[str, Any], notes: list[str]) -> Values:
    if value is None:
        return {}
    names = [str(name) for name in (value if isinstance(value, list) else [value])]
    train = [name for name in names if "test" not in name and "val" not in name]
    held_out = [name for name in names if name not in train]
    if len(train) != 1 or len(held_out) > 1:
        raise ValueError(
            f"dataset_splits={value!r}: give one to train on, and one with test in its name if "
            "there is one"
        )
    mixer = given.get("dataset_mixer")
    if not held_out or not evaluates(given) or not isinstance(mixer, dict):
        return {"dataset_train_split": train[0]}
    return {
        "dataset_train_split": train[0],
        "dataset_test_split": held_out[0],
        "eval_data": next(iter(mixer), None),
    }


def _mixture(value: Any, given: Mapping[str, Any], notes: list[str]) -> Values:
    section = _section(
        "dataset_mixture", value, ("datasets", "test_split_size", "seed", "streaming")
    )
    result = _entries("dataset_mixture", section.get("datasets"), notes)
    size = section.get("test_split_size")
    if size is not None and type(size) is not float:
        raise ValueError(
            f"dataset_mixture.test_split_size={size!r}: set eval_fraction, a share of the pairs"
        )
    return result if size is None else {**result, "eval_fraction": size}


def _datasets(value: Any, given: Mapping[str, Any], notes: list[str]) -> Values:
    return _entries("datasets", value, notes)


def _test_datasets(value: Any, given: Mapping[str, Any], notes: list[str]) -> Values:
    result = _entries("test_datasets", value, notes)
    result.pop("dataset_config", None)
    result.pop("columns", None)
    held_out = {"data": "eval_data", "dataset_train_split": "dataset_test_split"}
    return {held_out[name]: value for name, value in result.items()}


def _entries(name: str, entries: Any, notes: list[str]) -> Values:
    """Our settings for a list of sets that holds one."""
    if entries is None:
        return {}
    if not isinstance(entries, list) or len(entries) != 1 or not isinstance(entries[0], dict):
        number = len(entries) if isinstance(entries, list) else "no"
        raise ValueError(
            f"{name} names {number} sets, a run reads one; join them in a file and set data to it"
        )
    result: Values = {}
    columns: dict[str, str] = {}
    unread = []
    for key, value in entries[0].items():
        if value is None or (key == "weight" and value == 1):
            continue
        if key == "type" and isinstance(value, dict):
            raise ValueError(f"{name}.type has a format of its own; set columns, and chat_template")
        if key == "weight":
            raise ValueError(
                f"{name}: weight={value}: a set is read as a whole; leave weight out, or set "
                "max_samples"
            )
        if key in _ENTRY_NO_EFFECT:
            unread.append(key)
        elif key in _FIELDS:
            columns |= {} if value in _FIELDS[key] else {_FIELDS[key][0]: value}
        elif key not in _ENTRY:
            raise ValueError(f"unknown setting '{name}.{key}'; set columns where it names a column")
        elif value not in _READERS:
            is_list_of_one = isinstance(value, list) and len(value) == 1
            result[_ENTRY[key]] = value[0] if is_list_of_one else value
    is_file = str(result.get("data")).removesuffix(".gz").endswith(ROW_FILES)
    if is_file and result.get("dataset_train_split") == "train":
        del result["dataset_train_split"]  # a file is read as a whole, and they call that train
    if unread:
        notes.append(
            f"{name}: {', '.join(unread)}: no effect, rows are recognised by their columns"
        )
    return result | ({"columns": columns} if columns else {})


def _template(value: Any, given: Mapping[str, Any], notes: list[str]) -> Values:
    if value not in (None, "", "default"):
        notes.append(
            f"template {value}: no effect, the chat template is the tokenizer's own; "
            "chat_template takes another"
        )
    return {}


def _special_tokens(value: Any, given: Mapping[str, Any], notes: list[str]) -> Values:
    section = value if isinstance(value, dict) else _section("special_tokens", value, ())
    others = [name for name in section if name != "pad_token"]
    if others:
        raise ValueError(
            f"special_tokens.{others[0]} is not supported: tokens are the tokenizer's own; save a "
            "tokenizer with it beside the model"
        )
    return {}


def _rl(value: Any, given: Mapping[str, Any], notes: list[str]) -> Values:
    if value not in ("dpo", "ipo", "simpo", "orpo"):
        raise ValueError(f"rl is {value!r}; this is a DPO trainer: set dpo, or loss_type")
    return {} if value == "dpo" else {"loss_type": value}


def _algorithm(value: Any, given: Mapping[str, Any], notes: list[str]) -> Values:
    section = _section("algorithm", value, ("name", *_ALGORITHM))
    name = section.pop("name", "dpo")
    if name != "dpo":
        raise ValueError(f"algorithm.name is {name!r}; this is a DPO trainer: set dpo")
    return section


def _checkpoint(value: Any, given: Mapping[str, Any], notes: list[str]) -> Values:
    section = _section("checkpoint", value, ("save_steps",))
    return {"save_strategy": "steps", **section} if section else {}


def _adaptive_async(value: Any, given: Mapping[str, Any], notes: list[str]) -> Values:
    section = _section("adaptive_async", value, ("enabled",))
    if section.get("enabled", False) is not False:
        raise ValueError("adaptive_async cannot be enabled: DPO has no rollouts; set enabled false")
    return {}


def _sglang(value: Any, given: Mapping[str, Any], notes: list[str]) -> Values:
    section = _section("sglang", value, ("base_url",))
    if section:
        notes.append("sglang.base_url: no effect on training, it is for sampling answers")
    return {}


def _section(name: str, value: Any, keys: tuple[str, ...]) -> Values:
    """The entries of a section, its names checked."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{name} must hold `name: value` lines, got {value!r}")
    for key in value:
        if key not in keys:
            raise ValueError(f"unknown setting '{name}.{key}'; known there: {', '.join(keys)}")
    return dict(value)


def _resume(value: Any, given: Mapping[str, Any], notes: list[str]) -> Values:
    if value in (None, False):
        return {}
    return {"resume": "auto" if value is True else value}


def _eval_strategy(value: Any, given: Mapping[str, Any], notes: list[str]) -> Values:
    steps = given.get("eval_steps")
    if value in (False, "no", None):
        for name in ("eval_steps", "eval_data", "eval_fraction", "validation_file"):
            if given.get(name):
                raise ValueError(
                    f"{name}={given[name]} has no effect without evaluation (eval_strategy no); "
                    "leave one out"
                )
        return {}
    if value == "steps" and steps is None and given.get("logging_steps") is not None:
        return {"eval_steps": given["logging_steps"]}  # as in transformers
    if (value == "epoch" and steps is None) or (value == "steps" and steps is not None):
        return {}
    raise ValueError(
        f"eval_strategy={value!r} with eval_steps={steps}: set eval_steps to evaluate by steps, "
        "leave it out to evaluate at the end of each epoch"
    )


def _per_epoch(name: str, meaning: str) -> Conversion:
    """Of axolotl's counts: once an epoch, or not."""

    def convert(value: Any, given: Mapping[str, Any], notes: list[str]) -> Values:
        if value not in (None, 0, 1):
            raise ValueError(f"{name}={value!r}: once an epoch, or set {meaning}_steps")
        return {"save_strategy": "epoch" if value else "no"} if meaning == "save" else {}

    return convert


def _prompt_length(value: Any, given: Mapping[str, Any], notes: list[str]) -> Values:
    if value is None:
        return {}
    names = ("max_length", "max_seq_length", "cutoff_len", "sequence_len")
    longest = next((given[name] for name in names if given.get(name)), 1024)
    if isinstance(value, int) and isinstance(longest, int) and value * 2 == longest:
        return {"truncate_prompt": True}
    raise ValueError(
        f"max_prompt_length={value!r} is not supported: prompts are cut to half of max_length with "
        "truncate_prompt true, or not at all; leave max_prompt_length out"
    )


_PRODUCT = "`batch_size` = per_device_train_batch_size x gradient_accumulation_steps"
_EVALUATION = (
    "by steps where `eval_steps` is set (`logging_steps` without it), else by epoch; no: nothing "
    "to evaluate on"
)
_FILE = "`data`: a file, an id, or a name in dataset_info.json of `dataset_dir`"
_ONE_SET = "`data` and its split, where it names one set"
CONVERTED: dict[str, tuple[str, Conversion]] = {
    "per_device_train_batch_size": (_PRODUCT, _batch_size),
    "micro_batch_size": (_PRODUCT, _batch_size),
    "gradient_accumulation_steps": (_PRODUCT, _batch_size),
    "bf16": ("`dtype` bfloat16; float32 where bf16 and fp16 are both false", _precision),
    "fp16": ("`dtype` float16; float32 where bf16 and fp16 are both false", _precision),
    "load_in_4bit": ("`quantization` nf4, or none where false", _four_bits),
    "adapter": ("lora, or qlora: `quantization` nf4", _adapter),
    "lora_rank": ("`lora_r`; without lora_alpha that too, as its trainer has it", _lora_rank),
    "data_files": ("`data`, and `eval_data` for test or validation", _data_files),
    "dataset_name": ("`data`; with a test split and evaluation `eval_data` too", _dataset_name),
    "dataset": (
        "`data` where it is a file or an id; a registered name is refused",
        _registered("data"),
    ),
    "eval_dataset": ("`eval_data`, likewise", _registered("eval_data")),
    "dataset_dir": ("where dataset_info.json is; by default data", _dataset_dir),
    "datasets": (_ONE_SET, _datasets),
    "test_datasets": ("`eval_data` and its split, where it names one set", _test_datasets),
    "dataset_mixture": (_ONE_SET, _mixture),
    "dataset_mixer": (_ONE_SET, _mixer),
    "dataset_splits": ("`dataset_train_split`, `dataset_test_split`, `eval_data`", _splits),
    "template": ("said: the chat template is the tokenizer's own", _template),
    "special_tokens": ("{pad_token}: pairs are not padded; others are refused", _special_tokens),
    "rl": ("dpo, or ipo, simpo, orpo: `loss_type`", _rl),
    "algorithm": ("{name: dpo, beta, reference_free, label_smoothing, loss_type}", _algorithm),
    "checkpoint": ("{save_steps}: `save_strategy` steps", _checkpoint),
    "adaptive_async": ("{enabled: false}; true is refused: DPO has no rollouts", _adaptive_async),
    "sglang": ("{base_url}: for sampling, said", _sglang),
    "resume_from_checkpoint": ("`resume`; true is auto", _resume),
    "auto_resume_from_checkpoints": ("`resume` auto where true", _resume),
    "eval_strategy": (_EVALUATION, _eval_strategy),
    "evaluation_strategy": (_EVALUATION, _eval_strategy),
    "saves_per_epoch": ("1: `save_strategy` epoch; 0: no", _per_epoch("saves_per_epoch", "save")),
    "evals_per_epoch": ("1 or 0: at the end of each epoch", _per_epoch("evals_per_epoch", "eval")),
    "max_prompt_length": ("`truncate_prompt` where it is half of max_length", _prompt_length),
}

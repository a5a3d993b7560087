"""Settings files written for other trainers, as settings of ours.

`to_our_settings` turns the names of TRL, Unsloth, transformers, PEFT, LLaMA-Factory, axolotl,
ms-swift and of files with `algorithm:` sections into those of the config. A foreign name is
renamed, has no effect and is said, or is accepted with some values only (`other_names`), or its
value is converted by a function (`conversions`). What is in none of these tables is left as it is
and fails by name.

The tables of docs/other-trainers.md are made of these (`python docs/generate.py`).
"""

import re
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import Any

from lowmem_dpo.settings.conversions import CONVERTED, Values, evaluates
from lowmem_dpo.settings.other_names import FIXED, NO_EFFECT, RENAMED

# Names of transformers for optimizers that have another one here.
_OPTIMIZERS = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_hf": "adamw",
    "paged_adamw": "adamw",
    "paged_adamw_32bit": "adamw",
    "adamw_bnb_8bit": "adamw_8bit",
    "paged_adamw_bnb_8bit": "paged_adamw_8bit",
}
# Names that we share with other trainers; some values of theirs are spelt otherwise here.
NAMES_WITH_THEIR_VALUES = {
    *("save_strategy", "report_to", "optim", "lora_target_modules", "dtype", "chat_template"),
    *("save_steps", "eval_steps", "logging_steps"),
}
# Files that name two of a kind, of which the later counts where they differ: what a model is loaded
# in before what a run computes in, what a model could read before what the trainer reads.
_YIELDING = ("bnb_4bit_compute_dtype", "torch_dtype", "dtype", "random_state", "max_seq_length")
_OVERRULING = {"torch_dtype", "dtype", "bf16", "fp16", "seed", "max_length"}
# What shapes a run so much that a file that leaves it out is told what holds here.
_TELLING = (
    *("lora_r", "lora_alpha", "quantization", "learning_rate", "lr_scheduler_type"),
    *("warmup_ratio", "num_train_epochs", "batch_size", "max_length"),
)
_LORA_NAMES = {
    *("use_peft", "finetuning_type", "adapter", "train_type", "tuner_type", "peft_type", "r"),
    *("lora_r", "lora_rank", "lora_alpha", "lora_target_modules", "lora_target", "target_modules"),
    *("init_adapter", "adapter_name_or_path"),
}


@dataclass
class Translation:
    """What became of some settings.

    Attributes:
        values: Our settings, with those left over as they were.
        origin: The name that each of them was given under.
        notes: Lines to tell the user.
        faults: What cannot be had here, a line each.
    """

    values: Values = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def put(self, theirs: str, ours: str, value: Any) -> None:
        """Take a value for a setting of ours, unless another name gave it another one."""
        twin = self.origin.get(ours)
        if twin is None or self.values[ours] == value:
            self.values[ours], self.origin[ours] = value, theirs
            return
        loser, winner = sorted((twin, theirs), key=lambda n: [*_YIELDING, n].index(n))
        if loser not in _YIELDING or winner not in _OVERRULING:
            self.faults.append(f"{twin} and {theirs} are both given for {ours}; leave one out")
            return
        winning = value if winner == theirs else self.values[ours]
        self.values[ours], self.origin[ours] = winning, winner
        self.notes.append(f"{loser}: no effect beside {winner}, {ours} is {winning}")


def to_our_settings(
    mapping: Mapping[str, Any],
    fields: set[str],
    context: Mapping[str, Any],
    overridden: Set[str] = frozenset(),
) -> Translation:
    """Turn the settings of another trainer's file, or of its flags, into ours.

    Args:
        mapping: Names and values as they are given.
        fields: The names of our own settings.
        context: All that is given in file and flags, where a conversion reads several settings.
        overridden: Settings of ours that flags give: what a file has for them does not matter.
    """
    result = Translation()
    mapping = {n: v for n, v in mapping.items() if not _is_left_out(n, v, context)}
    without_effect: dict[str, list[str]] = {}
    for name, value in mapping.items():
        if (name if name in fields else RENAMED.get(name)) in overridden:
            continue
        try:
            if name in fields or not is_foreign(name):
                ours = our_name(name, value)
                result.put(name, ours, to_our_value(ours, value))
            elif name in NO_EFFECT:
                without_effect.setdefault(NO_EFFECT[name], []).append(name)
            elif name in FIXED:
                _check_fixed(name, value)
            elif name in RENAMED:
                result.put(name, RENAMED[name], to_our_value(RENAMED[name], value))
            else:
                converted = CONVERTED[name][1](value, context, result.notes)
                for setting, our_value in converted.items():
                    result.put(name, setting, to_our_value(setting, our_value))
        except ValueError as error:
            described = CONVERTED.get(name, ("",))[0]
            if not overridden & set(re.findall(r"`(\w+)`", described)):
                result.faults.append(str(error))
    if mapping.get("optim", mapping.get("optimizer")) in ("paged_adamw", "paged_adamw_32bit"):
        result.notes.append("optim adamw: not paged, an adapter's states are small")
    result.notes += [f"{', '.join(n)}: no effect, {why}" for why, n in without_effect.items()]
    result.faults = list(dict.fromkeys(result.faults))
    return result


def left_to_defaults(file: Mapping[str, Any], values: Mapping[str, Any], config: Any) -> list[str]:
    """What another trainer's file leaves out and shapes the run, in a line for the user.

    Args:
        file: The file's names and values.
        values: Our settings, as file and flags give them.
        config: The settings as they are.
    """
    names = [name for name in _TELLING if hasattr(config, name) and name not in values]
    if values.get("init_adapter"):  # its shape is its own
        names = [name for name in names if not name.startswith("lora_")]
    for ours, stands_for in (("max_steps", "num_train_epochs"), ("warmup_steps", "warmup_ratio")):
        if values.get(ours) is not None:
            names = [name for name in names if name != stands_for]
    if not any(map(is_foreign, file)) or not names or not hasattr(config, "lora_r"):
        return []
    told = ", ".join(f"{name} {_plain(getattr(config, name))}" for name in names)
    lines = [f"not in the file, so as usual here: {told}; set what should be otherwise"]
    if not _LORA_NAMES & file.keys():
        lines.insert(0, "LoRA is not named in the file: an adapter is trained, not the whole model")
    return lines


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _is_left_out(name: str, value: Any, context: Mapping[str, Any]) -> bool:
    """Whether a value is another trainer's way to say that a setting is not set."""
    if value is None:
        return name not in FIXED and name not in CONVERTED
    if name == "max_steps":
        return value == -1
    if name == "dataset_test_split" and "dataset_name" in context:
        return not evaluates(context) and not context.get("eval_data")
    return name == "warmup_steps" and value == 0 and context.get("warmup_ratio") is not None


def is_foreign(name: str) -> bool:
    """Whether a name is one of another trainer's."""
    return name in RENAMED or name in CONVERTED or name in NO_EFFECT or name in FIXED


def our_name(name: str, value: Any) -> str:
    """The setting that is meant by one of our names: a share of the steps is a warmup_ratio."""
    return "warmup_ratio" if name == "warmup_steps" and _is_share(value) else name


def to_our_value(name: str, value: Any) -> Any:
    """Our value of a setting whose name we share with other trainers and whose value we do not.

    Raises:
        ValueError: If it cannot be had here.
    """
    if name == "save_strategy" and value is False:
        return "no"  # as YAML reads a bare `no`
    if name == "report_to" and value is False:
        return "none"
    if name == "optim":
        return _OPTIMIZERS.get(value, value) if isinstance(value, str) else value
    if name == "lora_target_modules" and value in ("all-linear", ["all-linear"], ["all"]):
        return "all"
    if name == "dtype" and isinstance(value, str):
        return {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}.get(
            value, value.removeprefix("torch.")
        )
    if name == "chat_template" and value == "tokenizer_default":
        return "auto"
    if name in ("save_steps", "eval_steps", "logging_steps") and _is_share(value):
        raise ValueError(f"{name}={value} is a share of the run; give a number of steps")
    return value


def _is_share(value: Any) -> bool:
    return isinstance(value, float) and 0 < value < 1


def _check_fixed(name: str, value: Any) -> None:
    allowed, why = FIXED[name]
    if any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in allowed):
        return
    mend = "" if re.search(r"; |\b(set|use) ", why) else "; leave it out"
    text = repr(value)
    text = text if len(text) <= 60 else text[:57] + "..."
    raise ValueError(f"{name}={text} is not supported: {why}{mend}")

"""Settings files written for other trainers, as settings of ours.

`to_our_settings` turns the names of TRL, Unsloth, transformers, PEFT, LLaMA-Factory and of files
with `algorithm:` sections into those of the config. Each foreign name is in one of four tables
below: it is renamed, or its value is converted by a function, or it has no effect here and is said,
or it is accepted with some values only. What is in none of them is left as it is and fails by name.

The tables of docs/other-trainers.md are made of these (`python docs/generate.py`).
"""

from collections.abc import Callable, Mapping
from typing import Any

Values = dict[str, Any]

RENAMED = {
    "model_name_or_path": "model",
    "model_name": "model",
    "model_path": "model",
    "dataset_name": "data",
    "dataset_path": "data",
    "train_file": "data",
    "validation_file": "eval_data",
    "adapter_name_or_path": "init_adapter",
    "num_steps": "max_steps",
    "max_seq_length": "max_length",
    "cutoff_len": "max_length",
    "r": "lora_r",
    "lora_rank": "lora_r",
    "target_modules": "lora_target_modules",
    "lora_target": "lora_target_modules",
    "torch_dtype": "dtype",
    "bnb_4bit_compute_dtype": "dtype",
    "random_state": "seed",
    "save_total_limit": "keep_checkpoints",
    "pref_beta": "beta",
    "pref_loss": "loss_type",
    "pref_ftx": "rpo_alpha",
    "cpo_alpha": "rpo_alpha",
    "dpo_label_smoothing": "label_smoothing",
}

_PLAN = "how a step is split and what is recomputed is the plan's business"
_HEAD = "the logits are never formed here"
NO_EFFECT = {
    "gradient_checkpointing": _PLAN,
    "use_gradient_checkpointing": _PLAN,
    "gradient_checkpointing_kwargs": _PLAN,
    "activation_offloading": _PLAN,
    "per_device_eval_batch_size": _PLAN,
    "precompute_ref_batch_size": _PLAN,
    "padding_free": "pairs are always packed as trees",
    "group_by_length": "pairs are always packed as trees",
    "precompute_ref_log_probs": "the reference is always computed once and cached",
    "use_liger_kernel": _HEAD,
    "use_liger_loss": _HEAD,
    "use_logits_to_keep": _HEAD,
    "attn_implementation": "trees have an attention of their own",
    "flash_attn": "trees have an attention of their own",
    "dataset_num_proc": "pairs are read by one process",
    "preprocessing_num_workers": "pairs are read by one process",
    "dataloader_num_workers": "pairs are read by one process",
    "overwrite_cache": "the cache notices by itself what changed",
    "remove_unused_columns": "columns that are not read are named",
    "logging_first_step": "the first step is always checked and recorded",
    "plot_loss": "plots are always drawn",
    "load_best_model_at_end": "best/ holds the best, adapter/ the last",
}

# Value(s) that say what happens here anyway; every other value is refused, with the reason.
FIXED: dict[str, tuple[tuple[Any, ...], str]] = {
    "bias": (("none", None), "only bias none is supported"),
    "task_type": (("CAUSAL_LM", None), "only causal language models are supported"),
    "peft_type": (("LORA", None), "only LoRA is supported"),
    "use_peft": ((True,), "full fine-tuning is not supported; an adapter is trained"),
    "finetuning_type": (("lora",), "only lora is supported"),
    "stage": (("dpo",), "this is a DPO trainer"),
    "do_train": ((True,), "train trains"),
    "full_finetuning": ((False, None), "full fine-tuning is not supported"),
    "modules_to_save": ((None, []), "only LoRA matrices are trained"),
    "use_dora": ((False, None), "DoRA is not supported"),
    "loftq_config": ((None, {}), "LoftQ is not supported"),
    "layers_to_transform": ((None, []), "every decoder layer gets an adapter"),
    "use_weighting": ((False, None), "WPO's weights are not supported"),
    "ref_model": ((None,), "the reference is the policy at the start of the run: leave it out"),
    "sync_ref_model": ((False, None), "the reference stays what it was at the start"),
    "load_in_8bit": ((False, None), "the base is stored in 4 bits or 16; set quantization"),
    "bnb_4bit_quant_type": (("nf4", None), "4-bit storage is nf4"),
    "bnb_4bit_use_double_quant": ((True, None), "nf4 is always doubly quantised here"),
    "quantization_bit": ((4, None), "4-bit storage is nf4; set quantization none for 16"),
    "trust_remote_code": ((False, None), "code that comes with a model is never run"),
    "push_to_hub": ((False, None), "nothing is sent anywhere"),
    "deepspeed": ((None,), "one process uses one GPU"),
    "fsdp": ((None, "", []), "one process uses one GPU"),
    "disable_dropout": ((True, None), "the base's own dropout is always off; set lora_dropout"),
    "generate_during_eval": ((False, None), "use generate with the finished adapter"),
    "logging_strategy": (("steps", None), "metrics are written by steps; set logging_steps"),
    "truncation_mode": (("keep_start", None), "completions are cut at their end"),
    "kl_coef": ((), "beta is the weight of the KL term; set beta"),
    "max_completion_length": ((None,), "completions are cut at max_length"),
    "metric_for_best_model": (("eval_loss", "loss", None), "best/ is chosen by eval_loss"),
    "greater_is_better": ((False, None), "best/ is chosen by the lowest eval_loss"),
    "overwrite_output_dir": ((False, None), "a run's folder is never overwritten; choose another"),
}

# Names of transformers for optimizers that have another one here.
_OPTIMIZERS = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_hf": "adamw",
    "adamw_bnb_8bit": "adamw_8bit",
    "paged_adamw_bnb_8bit": "paged_adamw_8bit",
}
# Names that we share with other trainers; some values of theirs are spelt otherwise here.
NAMES_WITH_THEIR_VALUES = {"save_strategy", "report_to", "optim", "lora_target_modules", "dtype"}
_ALGORITHM = ("beta", "reference_free", "label_smoothing", "loss_type")


def to_our_settings(
    mapping: Mapping[str, Any], fields: set[str], context: Mapping[str, Any]
) -> tuple[Values, list[str]]:
    """Turn the settings of another trainer's file, or of its flags, into ours.

    Args:
        mapping: Names and values as they are given.
        fields: The names of our own settings.
        context: All that is given in file and flags, where a conversion reads several settings.

    Returns:
        Our settings, with those left over as they were, and lines to tell the user.

    Raises:
        ValueError: If a value cannot be had here, or one setting is given under two names.
    """
    mapping = {n: v for n, v in mapping.items() if not _is_left_out(n, v, context)}
    result = {n: value for n, value in mapping.items() if n in fields or not is_foreign(n)}
    origin = {name: name for name in result}
    without_effect: dict[str, list[str]] = {}
    for name in sorted(mapping.keys() & NO_EFFECT.keys()):
        without_effect.setdefault(NO_EFFECT[name], []).append(name)
    notes = [f"{', '.join(n)}: no effect, {why}" for why, n in sorted(without_effect.items())]
    for name, value in mapping.items():
        if name in result or name in NO_EFFECT:
            continue
        if name in FIXED:
            _check_fixed(name, value)
            continue
        if name in RENAMED:
            ours = _rename(name, value)
        else:
            ours = CONVERTED[name][1](value, context, notes)
        for setting, our_value in ours.items():
            twin = origin.get(setting)
            if twin is not None and result[setting] != our_value:
                raise ValueError(f"{twin} and {name} are both given for {setting}; leave one out")
            result[setting], origin[setting] = our_value, name
    return {name: to_our_value(name, value) for name, value in result.items()}, notes


def _is_left_out(name: str, value: Any, context: Mapping[str, Any]) -> bool:
    """Whether a value is another trainer's way to say that a setting is not set."""
    if value is None:
        return name not in FIXED and name not in CONVERTED
    if name == "max_steps":
        return value == -1
    return name == "warmup_steps" and value == 0 and context.get("warmup_ratio") is not None


def is_foreign(name: str) -> bool:
    """Whether a name is one of another trainer's."""
    return name in RENAMED or name in CONVERTED or name in NO_EFFECT or name in FIXED


def _check_fixed(name: str, value: Any) -> None:
    allowed, why = FIXED[name]
    if not any(value == each and type(value) is type(each) for each in allowed):
        raise ValueError(f"{name}={value!r} is not supported: {why}")


def _rename(name: str, value: Any) -> Values:
    if name == "dataset_name" and value in ("json", "csv", "parquet"):
        return {}  # datasets' generic readers; data_files names the file
    return {RENAMED[name]: value}


def to_our_value(name: str, value: Any) -> Any:
    """Our value of a setting whose name we share with other trainers and whose value we do not."""
    if name in ("save_strategy", "report_to") and value in (False, None, []):
        return "no" if name == "save_strategy" else "none"  # YAML reads a bare `no` as false
    if name == "optim":
        return _OPTIMIZERS.get(value, value) if isinstance(value, str) else value
    if name == "lora_target_modules" and value in ("all-linear", ["all-linear"]):
        return "all"
    if name == "dtype" and isinstance(value, str):
        return value.removeprefix("torch.")
    return value


def _batch_size(value: Any, mapping: Mapping[str, Any], notes: list[str]) -> Values:
    per_device = mapping.get("per_device_train_batch_size")
    if per_device is None:
        raise ValueError(
            "gradient_accumulation_steps needs per_device_train_batch_size: their product is the "
            "number of pairs a step; or set batch_size"
        )
    counts = (per_device, mapping.get("gradient_accumulation_steps", 1))
    for count in counts:
        if type(count) is not int or count < 1:
            raise ValueError(
                f"per_device_train_batch_size and gradient_accumulation_steps must be whole "
                f"numbers from 1 on, got {count!r}; or set batch_size"
            )
    return {"batch_size": counts[0] * counts[1]}


def _precision(value: Any, mapping: Mapping[str, Any], notes: list[str]) -> Values:
    flags = {name: mapping[name] for name in ("bf16", "fp16") if mapping.get(name) is not None}
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


def _four_bits(value: Any, mapping: Mapping[str, Any], notes: list[str]) -> Values:
    if type(value) is not bool:
        raise ValueError(f"load_in_4bit must be true or false, got {value!r}; or set quantization")
    return {"quantization": "nf4" if value else "none"}


def _data_files(value: Any, mapping: Mapping[str, Any], notes: list[str]) -> Values:
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


def _algorithm(value: Any, mapping: Mapping[str, Any], notes: list[str]) -> Values:
    section = _section("algorithm", value, ("name", *_ALGORITHM))
    name = section.pop("name", "dpo")
    if name != "dpo":
        raise ValueError(f"algorithm.name is {name!r}; this is a DPO trainer: set dpo")
    return section


def _checkpoint(value: Any, mapping: Mapping[str, Any], notes: list[str]) -> Values:
    section = _section("checkpoint", value, ("save_steps",))
    return {"save_strategy": "steps", **section} if section else {}


def _adaptive_async(value: Any, mapping: Mapping[str, Any], notes: list[str]) -> Values:
    section = _section("adaptive_async", value, ("enabled",))
    if section.get("enabled", False) is not False:
        raise ValueError("adaptive_async cannot be enabled: DPO has no rollouts; set enabled false")
    return {}


def _sglang(value: Any, mapping: Mapping[str, Any], notes: list[str]) -> Values:
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


def _resume(value: Any, mapping: Mapping[str, Any], notes: list[str]) -> Values:
    if value in (None, False):
        return {}
    return {"resume": "auto" if value is True else value}


def _eval_strategy(value: Any, mapping: Mapping[str, Any], notes: list[str]) -> Values:
    if value in (False, "no", None):
        for name in ("eval_steps", "eval_data", "eval_fraction", "validation_file"):
            if mapping.get(name):
                raise ValueError(
                    f"{name}={mapping[name]} has no effect without evaluation (eval_strategy no); "
                    "leave one out"
                )
        return {}
    if value == "epoch" and mapping.get("eval_steps") is None:
        return {}
    if value == "steps" and mapping.get("eval_steps") is not None:
        return {}
    raise ValueError(
        f"eval_strategy={value!r} with eval_steps={mapping.get('eval_steps')}: set eval_steps to "
        "evaluate by steps, leave it out to evaluate at the end of each epoch"
    )


def _prompt_length(value: Any, mapping: Mapping[str, Any], notes: list[str]) -> Values:
    if value is None:
        return {}
    longest = next(
        (mapping[n] for n in ("max_length", "max_seq_length", "cutoff_len") if mapping.get(n)), 1024
    )
    if isinstance(value, int) and isinstance(longest, int) and value * 2 == longest:
        return {"truncate_prompt": True}
    raise ValueError(
        f"max_prompt_length={value!r} is not supported: prompts are cut to half of max_length with "
        "truncate_prompt true, or not at all; leave max_prompt_length out"
    )


Conversion = Callable[[Any, Mapping[str, Any], list[str]], Values]
_PRODUCT = "`batch_size` = per_device_train_batch_size x gradient_accumulation_steps"
_EVALUATION = "by steps where `eval_steps` is set, else by epoch; no: nothing to evaluate on"
CONVERTED: dict[str, tuple[str, Conversion]] = {
    "per_device_train_batch_size": (_PRODUCT, _batch_size),
    "gradient_accumulation_steps": (_PRODUCT, _batch_size),
    "bf16": ("`dtype` bfloat16; float32 where bf16 and fp16 are both false", _precision),
    "fp16": ("`dtype` float16; float32 where bf16 and fp16 are both false", _precision),
    "load_in_4bit": ("`quantization` nf4, or none where false", _four_bits),
    "data_files": ("`data`, and `eval_data` for test or validation", _data_files),
    "algorithm": ("{name: dpo, beta, reference_free, label_smoothing, loss_type}", _algorithm),
    "checkpoint": ("{save_steps}: `save_strategy` steps", _checkpoint),
    "adaptive_async": ("{enabled: false}; true is refused: DPO has no rollouts", _adaptive_async),
    "sglang": ("{base_url}: for sampling, said", _sglang),
    "resume_from_checkpoint": ("`resume`; true is auto", _resume),
    "eval_strategy": (_EVALUATION, _eval_strategy),
    "evaluation_strategy": (_EVALUATION, _eval_strategy),
    "max_prompt_length": ("`truncate_prompt` where it is half of max_length", _prompt_length),
}

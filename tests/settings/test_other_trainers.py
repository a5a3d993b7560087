from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from lowmem_dpo.cli import main
from lowmem_dpo.settings.configs import TrainConfig
from lowmem_dpo.settings.conversions import CONVERTED
from lowmem_dpo.settings.fields import parse_config
from lowmem_dpo.settings.other_names import FIXED, NO_EFFECT, RENAMED
from lowmem_dpo.settings.other_trainers import to_our_settings

EXAMPLES = Path(__file__).parents[2] / "examples"
FIELDS = {f.name for f in fields(TrainConfig)}
MEANT = {
    "native": {"batch_size": 4, "eval_fraction": 0.25},
    "trl": {"batch_size": 16, "dtype": "bfloat16", "optim": "adamw", "quantization": "nf4"}
    | {"lora_target_modules": "all", "keep_checkpoints": 2, "save_steps": 100, "lora_alpha": 32.0},
    "unsloth": {"batch_size": 8, "lora_r": 64, "seed": 3407, "optim": "adamw_8bit"}
    | {"truncate_prompt": True, "dtype": "bfloat16", "max_length": 1024},
    "sections": {"max_steps": 10, "save_strategy": "steps", "save_steps": 5, "beta": 0.1},
    "axolotl": {"lora_r": 32, "batch_size": 8, "optim": "adamw_8bit", "warmup_ratio": 0.1},
    "llama_factory": {
        "lora_r": 8,
        "max_samples": 1000,
        "batch_size": 8,
        "save_steps": 500,
        "quantization": "nf4",
    },
}


def parse(text: str, tmp_path: Path, *words: str) -> TrainConfig:
    path = tmp_path / "theirs.yaml"
    path.write_text(text, encoding="utf-8")
    return parse_config(TrainConfig, ["--config", str(path), *words])


def all_said(capsys) -> list[str]:
    """The lines on stderr, each in the program's name, which is left out."""
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("lowmem_dpo: ") for line in lines)
    return [line.removeprefix("lowmem_dpo: ") for line in lines]


def said(capsys) -> list[str]:
    """The lines on stderr, but for what a file leaves out."""
    starts = ("not in the file, so", "LoRA is not named in the file")
    return [line for line in all_said(capsys) if not line.startswith(starts)]


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_examples_resolve_to_what_they_mean(path, capsys):
    assert main(["train", "--config", str(path), "--print_config"]) == 0
    resolved = yaml.safe_load(capsys.readouterr().out)
    for name, value in MEANT[path.stem].items():
        assert resolved[name] == value, name
    assert resolved["model"] == "Qwen/Qwen3-0.6B"
    assert Path(EXAMPLES.parent / resolved["data"]).is_file()
    assert resolved["output_dir"] == f"outputs/{path.stem}"


@pytest.mark.parametrize("name", ["trl", "sections"])
def test_examples_train(name, llama_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(EXAMPLES.parent)
    words = ["--model", str(llama_dir), "--output_dir", str(tmp_path / "run"), "--max_steps", "1"]
    words += ["--dtype", "float32", "--save_strategy", "epoch", "--save_steps", "null"]
    assert main(["train", "--config", str(EXAMPLES / f"{name}.yaml"), *words]) == 0
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_every_name_is_in_one_table_and_leads_to_a_setting():
    tables = [set(RENAMED), set(NO_EFFECT), set(FIXED), set(CONVERTED)]
    assert sum(map(len, tables)) == len(set().union(*tables))
    assert not set().union(*tables) & FIELDS
    assert set(RENAMED.values()) <= FIELDS


@pytest.mark.parametrize("name", sorted(FIXED))
def test_every_refusal_of_a_value_says_how_to_mend_it(name):
    (fault,) = to_our_settings({name: "something"}, FIELDS, {}).faults
    assert fault.startswith(f"{name}='something' is not supported: ")
    assert any(word in fault for word in ("leave it out", "set ", "use ", "give ", "name parts"))


@pytest.mark.parametrize(
    "text, setting, value",
    [
        ("model_path: m", "model", "m"),
        ("num_steps: 7", "max_steps", 7),
        ("algorithm: {name: dpo, beta: 0.3, reference_free: true}", "beta", 0.3),
        ("algorithm: {label_smoothing: 0.1}", "label_smoothing", 0.1),
        ("algorithm:", "beta", 0.1),
        ("checkpoint: {save_steps: 9}", "save_steps", 9),
        ("checkpoint: {save_steps: 9}", "save_strategy", "steps"),
        ("save_strategy: no", "save_strategy", "no"),
        ("report_to: []", "report_to", "none"),
        ("per_device_train_batch_size: 3", "batch_size", 3),
        ("per_device_train_batch_size: 3\ngradient_accumulation_steps: 4", "batch_size", 12),
        ("fp16: true", "dtype", "float16"),
        ("fp16: false\nbf16: false", "dtype", "float32"),
        ("bf16: false", "dtype", "auto"),
        ("torch_dtype: torch.bfloat16", "dtype", "bfloat16"),
        ("load_in_4bit: false", "quantization", "none"),
        ("target_modules: all-linear", "lora_target_modules", "all"),
        ("target_modules: [q_proj]", "lora_target_modules", ["q_proj"]),
        ("dataset_name: json\ndata_files: a.jsonl", "data", "a.jsonl"),
        ("data_files: {train: [a.jsonl], test: b.jsonl}", "eval_data", "b.jsonl"),
        ("resume_from_checkpoint: true", "resume", "auto"),
        ("resume_from_checkpoint: x/step-000001", "resume", "x/step-000001"),
        ("max_seq_length: 600\nmax_prompt_length: 300", "truncate_prompt", True),
        ("model_name: a\nmodel: a", "model", "a"),
        ("max_steps: -1", "max_steps", None),
        ("rpo_alpha: null\nbeta: null", "rpo_alpha", 0.0),
        ("warmup_steps: 0\nwarmup_ratio: 0.2", "warmup_ratio", 0.2),
        ("eval_strategy: no", "eval_fraction", 0.0),
        ("eval_strategy: epoch\neval_fraction: 0.1", "eval_steps", None),
    ],
)
def test_to_our_settings_gives_the_setting_that_is_meant(text, setting, value, tmp_path, capsys):
    assert getattr(parse(text, tmp_path), setting) == value
    assert said(capsys) == []


@pytest.mark.parametrize(
    "text, message",
    [
        ("algorithm: {name: grpo}", "algorithm.name is 'grpo'; this is a DPO trainer"),
        ("algorithm: {name: dpo, clip: 0.2}", "unknown setting 'algorithm.clip'"),
        ("algorithm: dpo", "algorithm must hold `name: value` lines, got 'dpo'"),
        ("adaptive_async: {enabled: true}", "DPO has no rollouts"),
        ("adaptive_async: {enabled: 1}", "DPO has no rollouts"),
        ("bias: all", "bias='all' is not supported: only bias none"),
        ("kl_coef: 0.1", "beta is the weight of the KL term; set beta"),
        ("ref_model: some/model", "the reference is the policy at the start"),
        ("gradient_accumulation_steps: 4", "needs per_device_train_batch_size"),
        ("per_device_train_batch_size: two", "must be whole numbers from 1 on, got 'two'"),
        ("bf16: true\nfp16: true", "bf16 and fp16 are both true"),
        ("bf16: 1", "bf16 must be true or false, got 1"),
        ("load_in_4bit: nf4", "load_in_4bit must be true or false"),
        ("model: a\nmodel_name: b", "model and model_name are both given for model"),
        ("model_name: a\nmodel_path: b", "model_name and model_path are both given for model"),
        ("max_prompt_length: 100", "truncate_prompt"),
        ("eval_strategy: no\neval_steps: 5", "eval_steps=5 has no effect"),
        ("eval_strategy: no\neval_fraction: 0.2", "eval_fraction=0.2 has no effect"),
        ("metric_for_best_model: accuracy", "best/ is chosen by eval_loss"),
        ("data_files: [a, b]", "give one file for train"),
        ("push_to_hub: true", "nothing is sent anywhere"),
        ("num_generations: 4", "unknown setting 'num_generations'"),
    ],
)
def test_to_our_settings_refuses_in_one_line_with_the_file(text, message, tmp_path):
    with pytest.raises(ValueError) as error:
        parse(text, tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).startswith(str(tmp_path / "theirs.yaml"))


def test_to_our_settings_says_once_what_has_no_effect(tmp_path, capsys):
    text = "gradient_checkpointing: true\nuse_gradient_checkpointing: unsloth\npadding_free: true"
    parse(text, tmp_path, "--padding_free")
    assert said(capsys) == [
        "gradient_checkpointing, use_gradient_checkpointing: no effect, layers run again in the "
        "backward pass as keep_activations says",
        "padding_free: no effect, pairs are always packed as trees",
    ]
    parse("sglang: {base_url: 'http://x'}", tmp_path)
    assert said(capsys) == ["sglang.base_url: no effect on training, it is for sampling answers"]


def test_foreign_flags_are_understood_and_override_the_file(tmp_path):
    config = parse("batch_size: 2\nnum_steps: 3", tmp_path, "--num_steps", "5", "--bf16")
    assert (config.max_steps, config.dtype, config.batch_size) == (5, "bfloat16", 2)
    words = ["--per-device-train-batch-size=2", "--gradient_accumulation_steps", "8"]
    assert parse_config(TrainConfig, [*words, "--optim", "adamw_torch"]).batch_size == 16
    assert parse_config(TrainConfig, ["--optim", "adamw_torch"]).optim == "adamw"
    config = parse("per_device_train_batch_size: 4", tmp_path, "--batch_size", "6")
    assert config.batch_size == 6


def test_foreign_flags_override_the_file_whatever_its_names(tmp_path):
    text = "dtype: float32\nbatch_size: 8\nmax_length: 512"
    words = ["--bf16", "--per_device_train_batch_size", "4", "--cutoff_len", "1024"]
    config = parse(text, tmp_path, *words)
    assert (config.dtype, config.batch_size, config.max_length) == ("bfloat16", 4, 1024)
    text = "per_device_train_batch_size: 2\ngradient_accumulation_steps: 8"
    config = parse(text, tmp_path, "--per_device_train_batch_size", "4")
    assert config.batch_size == 32
    with pytest.raises(ValueError, match="are both given"):
        parse_config(TrainConfig, ["--batch_size", "4", "--per_device_train_batch_size", "2"])


def test_rules_see_what_file_and_flags_say_together(tmp_path):
    words = ["--max_length", "2048", "--max_prompt_length"]
    assert parse_config(TrainConfig, [*words, "1024"]).truncate_prompt
    with pytest.raises(ValueError, match="max_prompt_length=512 is not supported"):
        parse_config(TrainConfig, [*words, "512"])
    text = "max_length: 1024\nmax_prompt_length: 512"
    with pytest.raises(ValueError, match="max_prompt_length=512 is not supported"):
        parse(text, tmp_path, "--max_length", "4096")
    words = ["--eval_fraction", "0.1", "--eval_steps", "50", "--eval_strategy"]
    assert parse_config(TrainConfig, [*words, "steps"]).eval_steps == 50
    with pytest.raises(ValueError, match="eval_strategy='epoch' with eval_steps=50"):
        parse_config(TrainConfig, [*words, "epoch"])


def test_notes_go_to_stderr_alone(tmp_path, capsys):
    path = tmp_path / "theirs.yaml"
    path.write_text("padding_free: true", encoding="utf-8")
    main(["train", "--config", str(path), "--print_config"])
    captured = capsys.readouterr()
    assert "padding_free: no effect" in captured.err and "padding" not in captured.out
    TrainConfig.from_yaml(path)
    assert said(capsys) == ["padding_free: no effect, pairs are always packed as trees"]


def test_to_our_settings_leaves_our_own_names_alone():
    ours = {"model": "m", "beta": 0.1, "chat_template_kwargs": {"algorithm": 1}}
    translation = to_our_settings(ours, FIELDS, ours)
    assert (translation.values, translation.notes, translation.faults) == (ours, [], [])

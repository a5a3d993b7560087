"""Settings files of other trainers (`recipes`), and single settings of them."""

import json
import random
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from lowmem_dpo.cli import main
from lowmem_dpo.data.rows import READERS
from lowmem_dpo.losses.types import LOSS_TYPES
from lowmem_dpo.settings.configs import GenerateConfig, TrainConfig
from lowmem_dpo.settings.conversions import CONVERTED
from lowmem_dpo.settings.fields import Faults, parse_config, to_yaml
from lowmem_dpo.settings.other_names import FIXED, NO_EFFECT, RENAMED
from tests.settings.recipes import AXOLOTL, LLAMA_FACTORY, MEANT, RECIPES


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "theirs.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def said(capsys) -> list[str]:
    return [line.removeprefix("lowmem_dpo: ") for line in capsys.readouterr().err.splitlines()]


def faults_of(path: Path, *words: str) -> list[str]:
    with pytest.raises(Faults) as caught:
        parse_config(TrainConfig, ["--config", str(path), *words])
    return [fault.removeprefix(f"{path}: ") for fault in caught.value.faults]


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_mean_here_what_they_mean_there(name, tmp_path, capsys):
    config = parse_config(TrainConfig, ["--config", str(write(tmp_path, RECIPES[name]))])
    for setting, value in MEANT[name].items():
        assert getattr(config, setting) == value, setting
    lines = " ".join(said(capsys))
    untold = {
        key
        for key, value in yaml.safe_load(RECIPES[name]).items()
        if key
        in ("ddp_timeout", "do_eval", "log_level", "overwrite_output_dir", "hub_model_id")
        + ("trust_remote_code", "dataset_num_proc", "template", "strict", "attn_impl")
        and key not in lines
    }
    assert untold == set()


@pytest.mark.parametrize("name", RECIPES)
def test_resolved_recipes_are_repeatable_and_say_nothing_more(name, tmp_path, capsys):
    config = parse_config(TrainConfig, ["--config", str(write(tmp_path, RECIPES[name]))])
    said(capsys)
    again = parse_config(TrainConfig, ["--config", str(write(tmp_path, to_yaml(config)))])
    assert again == config and said(capsys) == []
    assert to_yaml(again) == to_yaml(config)


@pytest.mark.parametrize(
    "settings",
    [
        {"warmup_steps": 0},
        {"warmup_steps": 0, "lr_scheduler_type": "constant_with_warmup"},
        {"warmup_steps": 5},
        {"warmup_ratio": 0.0},
        {"save_strategy": "no"},
        {"save_strategy": "steps", "save_steps": 3},
        {"lora_target_modules": ["all"]},
        {"lora_target_modules": "all-linear"},
        {"report_to": []},
        {"report_to": False},
        {"report_to": ["none"]},
        {"max_steps": -1},
    ],
    ids=str,
)
def test_resolved_settings_are_repeatable(settings, tmp_path):
    config = parse_config(TrainConfig, ["--config", str(write(tmp_path, yaml.dump(settings)))])
    again = parse_config(TrainConfig, ["--config", str(write(tmp_path, to_yaml(config)))])
    assert again == config
    if settings.get("warmup_steps") == 0:
        assert (again.warmup_steps, again.warmup_ratio) == (None, 0.0)


def test_any_value_under_any_foreign_name_is_refused_in_words_or_repeatable(tmp_path):
    rng = random.Random(0)
    values = [None, True, 0, -1, 0.5, "", "x", "a/b.json", [], [1], {"a": 1}, [{"path": None}]]
    for name in rng.sample(sorted(RENAMED | CONVERTED | FIXED | NO_EFFECT), 120):
        path = write(tmp_path, yaml.safe_dump({name: rng.choice(values), "eval_fraction": 0.1}))
        try:
            config = parse_config(TrainConfig, ["--config", str(path)])
        except Faults as error:
            assert all(error.faults)
            continue
        again = parse_config(TrainConfig, ["--config", str(write(tmp_path, to_yaml(config)))])
        assert again == config, name


def test_no_warm_up_in_python_is_none_after_its_config_is_read_back(tmp_path):
    config = TrainConfig(warmup_steps=0)
    again = TrainConfig.from_yaml(write(tmp_path, to_yaml(config)))
    assert again == config and again.warmup_ratio == 0.0


def test_all_faults_of_a_file_are_said_at_once_each_with_its_remedy(tmp_path, capsys):
    text = """
model_name_or_path: org/model
model_revision: it-SFT
deepspeed: examples/deepspeed/ds_z3_config.json
dataset: dpo_en_demo
max_prompt_length: 600
learning_rate: fast
beta: 0
optim: rmsprop
pref_loss: kto_pair
lr_scheduler_type: cosine_with_min_lr
lr_scheduler_kwargs: {min_lr_rate: 0.1}
push_to_hub: true
save_steps: 0.5
num_generations: 4
betta: 0.1
vllm_mode: colocate
eval_steps: 5
"""
    path = write(tmp_path, text)
    assert faults_of(path) == [
        "model_revision='it-SFT' is not supported: the newest is read; give a folder of another",
        "deepspeed='examples/deepspeed/ds_z3_config.json' is not supported: one process uses one "
        "GPU; leave it out",
        "dataset='dpo_en_demo' is a name for LLaMA-Factory's dataset_info.json, and "
        f"{Path('data/dataset_info.json')} has no such entry; set data to the file or id behind it",
        "max_prompt_length=600 is not supported: prompts are cut to half of max_length with "
        "truncate_prompt true, or not at all; leave max_prompt_length out",
        "lr_scheduler_kwargs={'min_lr_rate': 0.1} is not supported: the schedules have no settings "
        "of their own; leave it out",
        "push_to_hub=True is not supported: nothing is sent anywhere; leave it out, and upload "
        "adapter/ in the end",
        "save_steps=0.5 is a share of the run; give a number of steps",
        "learning_rate must be a number, got fast",
        "beta must be > 0, got 0.0; the usual value is 0.1",
        "optim must be one of adamw, adamw_8bit, paged_adamw_8bit, sgd, got rmsprop",
        "lr_scheduler_type must be one of cosine, linear, constant, constant_with_warmup, got "
        "cosine_with_min_lr",
        "unknown setting 'betta'; did you mean beta?",
        "unknown settings 'num_generations', 'vllm_mode'; leave them out; --help_all shows all "
        "there are",
        "loss_type must be one of " + ", ".join(LOSS_TYPES) + ", got kto_pair "
        "(loss_type is pref_loss there)",
    ]
    assert main(["train", "--config", str(path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 14
    assert all(line.startswith(f"lowmem_dpo: error: {path}: ") for line in lines)


def test_faults_of_several_groups_are_said_together_under_the_file_s_own_names(tmp_path):
    text = "pref_loss: kto_pair\nsave_strategy: no\nsave_total_limit: 1"
    saving, loss = faults_of(write(tmp_path, text))
    assert loss.startswith("loss_type must be one of") and loss.endswith(
        "(loss_type is pref_loss there)"
    )
    assert saving == (
        "keep_checkpoints=1 has no effect with save_strategy=no; leave one out "
        "(keep_checkpoints is save_total_limit there)"
    )


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("optim: paged_adamw_32bit", "optim adamw: not paged, an adapter's states are small"),
        ("optimizer: paged_adamw_32bit", "optim adamw: not paged, an adapter's states are small"),
        (
            "lora_rank: 4",
            "lora_alpha 8: not in the file, so twice lora_rank, as its trainer has it",
        ),
        (
            "rlhf_type: dpo\nlora_rank: 4",
            "lora_alpha 32: not in the file, so ms-swift's default, as its trainer has it",
        ),
        (
            "template: qwen",
            "template qwen: no effect, the chat template is the tokenizer's own; chat_template "
            "takes another",
        ),
        ("seed: 1\nrandom_state: 2", "random_state: no effect beside seed, seed is 1"),
        ("random_state: 2\nseed: 1", "random_state: no effect beside seed, seed is 1"),
        (
            "max_seq_length: 9\nmax_length: 8",
            "max_seq_length: no effect beside max_length, max_length is 8",
        ),
        (
            "bf16: true\ntorch_dtype: float32",
            "torch_dtype: no effect beside bf16, dtype is bfloat16",
        ),
        (
            "bnb_4bit_compute_dtype: float16\ntorch_dtype: bfloat16",
            "bnb_4bit_compute_dtype: no effect beside torch_dtype, dtype is bfloat16",
        ),
        ("dataset: dpo_en_demo\ndata: a.jsonl", "dataset: no effect, data is given"),
        (
            "hub_model_id: me/dpo\nhub_strategy: end",
            "hub_model_id, hub_strategy: no effect, nothing is sent anywhere",
        ),
        (
            "trust_remote_code: true",
            "trust_remote_code: no effect, code that comes with a model is never run",
        ),
        (
            "max_steps: 3",
            None,
        ),
        (
            "model_name: m",
            "LoRA is not named in the file: an adapter is trained, not the whole model",
        ),
        (
            "use_peft: true\nload_in_4bit: false\nlr_scheduler_type: linear\nwarmup_steps: 2\n"
            "max_steps: 5\nmicro_batch_size: 2",
            "not in the file, so as usual here: lora_r 16, lora_alpha 16, learning_rate 5e-06, "
            "max_length 1024; set what should be otherwise",
        ),
        (
            "adapter_name_or_path: a\nlearning_rate: 0.1\nsequence_len: 5\nnum_epochs: 1\n"
            "warmup_ratio: 0\nlr_scheduler: linear\nload_in_4bit: true\nmicro_batch_size: 1",
            None,
        ),
    ],
)
def test_what_a_file_of_another_trainer_gets_is_said(text, line, tmp_path, capsys):
    parse_config(TrainConfig, ["--config", str(write(tmp_path, text))])
    lines = said(capsys)
    assert line in lines if line else lines == []


@pytest.mark.parametrize(
    ("text", "setting", "value"),
    [
        ("warmup_steps: 0.25", "warmup_ratio", 0.25),
        ("warmup_steps: 3", "warmup_steps", 3),
        ("save_steps: 7", "save_strategy", "steps"),
        ("dataset_mixer: {org/a: 1}", "data", "org/a"),
        (
            "dataset_mixture: {datasets: [{id: org/a, config: c, split: s, weight: 1.0}]}",
            "dataset_config",
            "c",
        ),
        (
            "dataset_mixture: {datasets: [{path: org/a}], test_split_size: 0.1}",
            "eval_fraction",
            0.1,
        ),
        ("datasets: [{path: json, data_files: [a.jsonl]}]", "data", "a.jsonl"),
        (
            "datasets: [{path: a/b, field_messages: prompt, field_chosen: good}]",
            "columns",
            {"chosen": "good"},
        ),
        ("test_datasets: [{path: org/a, split: test}]", "eval_data", "org/a"),
        ("dataset: org/a\neval_dataset: b.json", "eval_data", "b.json"),
        ("dataset_name: org/a\ndataset_test_split: test", "dataset_test_split", None),
        ("eval_strategy: steps\nlogging_steps: 5\neval_fraction: 0.1", "eval_steps", 5),
        ("rl: ipo", "loss_type", "ipo"),
        ("saves_per_epoch: 0", "save_strategy", "no"),
        ("dtype: bf16", "dtype", "bfloat16"),
        ("auto_resume_from_checkpoints: true", "resume", "auto"),
        ("max_samples: 12", "max_samples", 12),
    ],
)
def test_settings_of_recipes_convert(text, setting, value, tmp_path):
    config = parse_config(TrainConfig, ["--config", str(write(tmp_path, text))])
    assert getattr(config, setting) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dataset_mixer: {a/b: 1.0, c/d: 0.5}", "names 2 sets, a run reads one; join them"),
        ("dataset_mixer: {a/b: 0.5}", "a set is read as a whole; leave weight out, or set max_sam"),
        ("dataset: a.json,b.json", "names 2 sets, a run reads one"),
        ("dataset_splits: [train_a, train_b]", "give one to train on"),
        ("datasets: [{path: a/b, field_human: q}]", "set columns where it names a column"),
        (
            "datasets: [{path: a/b, type: {field_prompt: q}}]",
            "has a format of its own; set columns",
        ),
        ("dataset_mixture: {datasets: [{id: a/b}], test_split_size: 20}", "set eval_fraction"),
        ("special_tokens: {eos_token: <x>}", "special_tokens.eos_token is not supported"),
        ("rl: grpo", "rl is 'grpo'; this is a DPO trainer"),
        ("adapter: ''", "set lora or qlora"),
        ("saves_per_epoch: 4", "once an epoch, or set save_steps"),
        ("finetuning_type: full", "only LoRA is supported; leave it out"),
        ("rank_pattern: {q_proj: 4}", "only plain LoRA is trained; leave it out"),
        ("use_cpu: true", "use_cpu=True is not supported: set device cpu"),
        ("max_train_samples: 4", "did you mean max_samples?"),
        ("warmup_steps: 0.1\nwarmup_ratio: 0.2", "are both given for warmup_ratio"),
    ],
)
def test_settings_of_recipes_that_cannot_be_had(text, message, tmp_path):
    (fault,) = faults_of(write(tmp_path, text))
    assert message in fault and "\n" not in fault


def test_flags_mean_what_they_mean_in_a_file(tmp_path, capsys):
    config = parse_config(TrainConfig, ["--warmup_steps", "0.25", "--save_steps", "7"])
    assert (config.warmup_ratio, config.warmup_steps) == (0.25, None)
    assert (config.save_strategy, config.save_steps) == ("steps", 7)
    path = write(tmp_path, LLAMA_FACTORY.replace("data/preferences.json", "dpo_en_demo"))
    config = parse_config(TrainConfig, ["--config", str(path), "--data", "mine.jsonl"])
    assert config.data == "mine.jsonl"
    config = parse_config(TrainConfig, ["--config", str(path), "--data", "a", "--lora_alpha", "3"])
    assert (config.lora_r, config.lora_alpha) == (8, 3.0)


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"file_name": "a.json", "ranking": True}, {"data": "DIR/a.json"}),
        (
            {"file_name": "a.json", "columns": {"prompt": "question", "chosen": "chosen"}},
            {"data": "DIR/a.json", "columns": {"instruction": "question"}},
        ),
        (
            {"hf_hub_url": "org/a", "subset": "s", "split": "train[:9]"},
            {"data": "org/a", "dataset_config": "s", "dataset_train_split": "train[:9]"},
        ),
    ],
)
def test_names_of_llama_factory_s_registry_are_looked_up(entry, expected, tmp_path, capsys):
    registry = tmp_path / "dataset_info.json"
    registry.write_text(json.dumps({"mine": entry}), encoding="utf-8")
    path = write(tmp_path, f"dataset: mine\ndataset_dir: {tmp_path.as_posix()}")
    config = parse_config(TrainConfig, ["--config", str(path)])
    for name, value in expected.items():
        if isinstance(value, str):
            value = value.replace("DIR", tmp_path.as_posix())
        assert getattr(config, name) == value
    assert f"dataset mine: data is {config.data}, after {registry}" in said(capsys)
    registry.write_text("[]", encoding="utf-8")
    assert "has no such entry; set data to the file" in faults_of(path)[0]


def test_flags_take_the_place_of_what_the_file_has_under_their_name(tmp_path):
    path = write(tmp_path, "max_length: 1024\nmax_prompt_length: 600\npush_to_hub: true")
    words = ["--max_prompt_length", "200", "--max_length", "400", "--push_to_hub", "false"]
    config = parse_config(TrainConfig, ["--config", str(path), *words])
    assert (config.max_length, config.truncate_prompt) == (400, True)


def test_faults_name_the_file_that_they_are_in(tmp_path):
    path = write(tmp_path, "push_to_hub: true\nbeta: 0\nbetta: 1")
    words = ["--config", str(path), "--deepspeed", "z.json", "--num_steps", "0"]
    with pytest.raises(Faults) as caught:
        parse_config(TrainConfig, words)
    in_file = {fault[len(f"{path}: ") :][:5] for fault in caught.value.faults if "yaml" in fault}
    others = {fault[:5] for fault in caught.value.faults if "yaml" not in fault}
    assert (in_file, others) == ({"push_", "beta ", "unkno"}, {"deeps", "max_s"})


def test_a_recipe_for_training_is_refused_in_few_lines_by_a_verb_that_does_not_train(tmp_path):
    with pytest.raises(Faults) as caught:
        parse_config(GenerateConfig, ["--config", str(write(tmp_path, LLAMA_FACTORY))])
    (fault,) = (each for each in caught.value.faults if "unknown settings" in each)
    assert "'lora_rank', 'lora_target', 'pref_beta'" in fault and len(caught.value.faults) < 5


@pytest.mark.slow  # imports trl
def test_a_dump_of_every_trl_setting_is_understood(tmp_path, capsys):
    trl = pytest.importorskip("trl")
    dump = {}
    for kind in (trl.ScriptArguments, trl.ModelConfig, trl.DPOConfig):
        dump |= {f.name: getattr(kind, f.name, None) for f in fields(kind)}
    dump |= {"model_name_or_path": "org/model", "dataset_name": "org/a", "use_peft": True}
    dump["do_train"] = True
    dump |= {"eval_steps": None, "per_device_train_batch_size": 2, "save_strategy": "epoch"}
    dump |= {"output_dir": "out", "save_steps": None, "bf16": True, "report_to": "none"}
    parse_config(TrainConfig, ["--config", str(write(tmp_path, yaml.safe_dump(dump)))])
    assert "no effect" in capsys.readouterr().err


def test_a_recipe_trains(llama_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copy(Path(__file__).parents[2] / "examples" / "preferences.jsonl", "pairs.jsonl")
    path = write(
        tmp_path, AXOLOTL.replace("split: train, ", "").replace("org/model", str(llama_dir))
    )
    words = ["--dtype", "float32", "--optim", "adamw", "--max_steps", "1", "--warmup_steps", "0"]
    words += ["--max_samples", "6", "--eval_fraction", "0", "--evals_per_epoch", "0"]
    assert main(["train", "--config", str(path), *words]) == 0
    assert "max_samples 6: any further rows are left out" in capsys.readouterr().out
    resolved = TrainConfig.from_yaml(tmp_path / "outputs" / "config.yaml")
    assert (resolved.lora_r, resolved.max_samples, resolved.save_strategy) == (64, 6, "epoch")


@pytest.mark.parametrize("suffix", [*READERS, ".jsonl.gz"])
def test_a_file_of_rows_has_no_split_whatever_its_trainer_calls_it(tmp_path, suffix):
    text = f"rl: dpo\ndatasets: [{{path: pairs{suffix}, split: train}}]\n"
    config = parse_config(TrainConfig, ["--config", str(write(tmp_path, text))])
    assert (config.data, config.dataset_train_split) == (f"pairs{suffix}", None)

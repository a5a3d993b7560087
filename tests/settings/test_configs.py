import dataclasses
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lowmem_dpo.settings import groups
from lowmem_dpo.settings.configs import DemoConfig, GenerateConfig, TrainConfig
from lowmem_dpo.settings.fields import parse_config, settings_by_group, to_yaml
from lowmem_dpo.settings.groups import ModelSettings, parse_bytes

ROOT = Path(__file__).parents[2]


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_parse_config_flags_override_yaml_overrides_defaults(tmp_path):
    path = write(tmp_path, "beta: 0.2\nlearning_rate: 1e-5\n")
    config = parse_config(TrainConfig, ["--beta", "0.5", "--config", path])
    assert (config.beta, config.learning_rate, config.batch_size) == (0.5, 1e-5, 16)


def test_parse_config_reads_5e_6_without_a_dot_as_a_number(tmp_path):
    assert parse_config(TrainConfig, ["--learning_rate", "7e-6"]).learning_rate == 7e-6
    assert TrainConfig.from_yaml(write(tmp_path, "learning_rate: 7e-6\n")).learning_rate == 7e-6


def test_parse_config_accepts_hyphens_equals_and_bare_booleans():
    words = ["--learning-rate=1e-4", "--reference-free", "--shuffle", "false"]
    config = parse_config(TrainConfig, words)
    assert (config.learning_rate, config.reference_free, config.shuffle) == (1e-4, True, False)


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("--learning_rate=1e-4", 1e-4),
        ("--learning_rate=1", 1.0),
        ("--seed=042", 42),
        ("--max_steps=7", 7),
        ("--max_steps=null", None),
        ("--shuffle=no", False),
        ("--model=042", "042"),
        ("--model=1e5", "1e5"),
        ("--model=null", None),
        ("--system_prompt=[no YAML: *", "[no YAML: *"),
        ("--save_strategy=no", "no"),
        ("--ld_alpha=.5", 0.5),
        ("--chat_template_kwargs={a: [1, x], b: '1'}", {"a": [1, "x"], "b": "1"}),
    ],
)
def test_parse_config_gives_a_flag_the_type_of_its_field(word, value):
    name = word[2:].partition("=")[0]
    read = getattr(parse_config(TrainConfig, [word]), name)
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("learning_rate: 1e-4", 1e-4),
        ("learning_rate: '0.5'", 0.5),
        ("learning_rate: 1", 1.0),
        ("seed: '7'", 7),
        ("model: '7'", "7"),
        ("model: 'null'", "null"),
        ("model: null", None),
        ("save_strategy: no", "no"),
        ("shuffle: off", False),
        ("lora_target_modules: [q_proj, '1']", ["q_proj", "1"]),
        ("report_to: [wandb, trackio]", ["wandb", "trackio"]),
    ],
)
def test_from_yaml_gives_a_value_the_type_of_its_field(line, value, tmp_path):
    read = getattr(TrainConfig.from_yaml(write(tmp_path, line)), line.partition(":")[0])
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("max_steps: 5", "--max_steps=null"),
        ("max_steps: 5", "--max_steps=-1"),
        ("output_dir: a", "--output_dir=null"),
        ("beta: 0.5", "--beta=~"),
        ("lora_target_modules: [q_proj]", "--lora_target_modules=null"),
        ("columns: {prompt: q}", "--columns=null"),
        ("lora_rank: 8", "--lora_rank=null"),
    ],
)
def test_null_as_a_flag_unsets_what_the_file_sets(tmp_path, line, word):
    words = ["--config", write(tmp_path, line)]
    assert parse_config(TrainConfig, words) != TrainConfig()
    assert parse_config(TrainConfig, [*words, word]) == TrainConfig()


def test_null_is_a_prompt():
    assert parse_config(GenerateConfig, ["--prompt", "null"]).prompt == "null"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("beta: -1", ["--beta", "0.1"]),
        ("save_steps: 0.1", ["--save_steps", "null"]),
        ("gradient_accumulation_steps: 8", ["--batch_size", "16"]),
        ("model_name: a\nmodel_path: b", ["--model", "null"]),
    ],
)
def test_what_a_flag_overrides_may_be_wrong_in_the_file(tmp_path, text, words):
    file = ["--config", write(tmp_path, text)]
    with pytest.raises(ValueError):
        parse_config(TrainConfig, file)
    assert parse_config(TrainConfig, [*file, *words]) == TrainConfig()


@pytest.mark.parametrize("text", ["q_proj,v_proj", "[q_proj, v_proj]", '["q_proj","v_proj"]'])
def test_parse_config_reads_lists_of_modules(text):
    config = parse_config(TrainConfig, ["--lora_target_modules", text])
    assert config.lora_target_modules == ["q_proj", "v_proj"]


def test_parse_config_reads_names_of_columns():
    expected = {"prompt": "question", "chosen": "best"}
    words = ["--columns", "{prompt: question, chosen: best}"]
    assert parse_config(TrainConfig, words).columns == expected


def test_parse_config_reads_template_variables():
    words = ["--chat_template_kwargs", "{enable_thinking: false}"]
    assert parse_config(TrainConfig, words).chat_template_kwargs == {"enable_thinking": False}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--learningrate", "1"], "did you mean learning_rate?"),
        (["--BETA", "1"], "unknown setting 'BETA'; did you mean beta?"),
        (["--output_dir", "/tmp/\udcff"], "--output_dir must be UTF-8 text"),
        (["--system_prompt", "\udcff"], "--system_prompt must be UTF-8 text"),
        (["--config", "\udcff"], "--config must be UTF-8 text"),
        (["--config", " "], "--config is empty"),
        (["--config", "a\0b"], "'a\\x00b' is not valid YAML"),
        (["--seed", "!!bool abc"], "seed must be a whole number, got !!bool abc"),
        (["--columns", "[" * 3000], "its brackets are nested too deep"),
        (["--seed", "9" * 5000], "seed must be a whole number, got 999"),
        (["--batch_size", "9" * 30], "batch_size must be at most 1000000000, got 999"),
        (["--lora_alpha", "1e300"], "lora_alpha must be at most 1000000000, got 1e+300"),
        (["--adam_epsilon", "1e-300"], "adam_epsilon must be at least 1e-16, got 1e-300"),
        (["--warmup_steps", "9" * 30], "warmup_steps must be in [0, 1e9], or left out, got 99"),
        (["--beta", "1:30.5"], "beta must be a number, got 1:30.5"),
        (["--beta", "1_0.5"], "1_0.5 means another number in YAML"),
        (["--lora_target_modules", "[q_proj"], "several such as [a, b], got [q_proj"),
        (["--lora_target_modules", "['q_proj','']"], "several such as [a, b], got nothing"),
        (["--lora_target_modules", "[]"], "lora_target_modules is empty; use all, or names"),
        (["--lora_target_modules="], "lora_target_modules is empty; use all, or names"),
        (
            ["--system_prompt", "x", "--chat_template", "none"],
            "system_prompt=x has no effect with chat_template=none; leave one out",
        ),
        (
            ["--columns", "{prompt: q"],
            "got {prompt: q (not valid YAML: expected ',' or '}', but got the end)",
        ),
        (["--columns", "{prompt:q}"], "got nothing; write '{prompt: question}', a blank after"),
        (
            ["--early_stopping_threshold", "1"],
            "no effect without early_stopping_patience; set early_stopping_patience, or leave it",
        ),
        (["--data", "a", "--dataset_name", "b"], "--data and --dataset_name are both given"),
        (["--beta", "x"], "beta must be a number, got x"),
        (["--beta", "-1"], "beta must be > 0, got -1.0; the usual value is 0.1"),
        (["--loss_type", "dpo"], "got dpo; did you mean sigmoid?"),
        (["--label_smoothing", "0.5"], "label_smoothing must be in [0, 0.5)"),
        (["--label_smoothing", "0.1", "--loss_type", "ipo"], "has no effect with loss_type=ipo"),
        (["--save_steps", "5", "--save_strategy", "epoch"], "no effect with save_strategy=epoch"),
        (
            ["--head_quantization", "int8", "--head_weight", "host"],
            "head_quantization=int8 keeps the head on the device",
        ),
        (["--dataset_test_split", "x"], "dataset_test_split=x has no effect without eval_data"),
        (["--columns", "{prompt: 3}"], "columns"),
        (["--columns", "{prompt: a, chosen: a}"], "columns names a column of the file twice"),
        (["--on_bad_row", "ignore"], "on_bad_row must be one of error, skip, got ignore"),
        (["--eval_steps", "5"], "needs something to evaluate on"),
        (["--seed"], "--seed needs a value"),
        (["data.jsonl"], "unexpected argument 'data.jsonl'"),
        (["--config", "missing.yaml"], "cannot read the settings file missing.yaml"),
        (["--memory_limit", "lots"], "memory_limit must be a size"),
        (["--max_steps", "0"], "max_steps must be at least 1"),
        (["--beta", ".inf"], "beta must be a finite number, got inf"),
        (["--weight_decay", ".nan"], "weight_decay must be a finite number, got nan"),
        (["--learning_rate", "1" + "0" * 400], "learning_rate must be a finite number, got 10000"),
        (["--seed", "1:30"], "seed must be a whole number, got 1:30"),
        (["--seed", "true"], "seed must be a whole number, got true"),
        (["--seed", "2.0"], "seed must be a whole number, got 2.0"),
        (["--seed", "["], "seed must be a whole number, got ["),
        (["--max_steps="], "max_steps must be a whole number, got nothing"),
        (["--shuffle", "1"], "shuffle must be true or false, got 1"),
        (
            ["--loss_type", "sigmoid,ipo", "--loss_weights", "1,x"],
            "numbers such as [0.8, 0.2], got 1,x",
        ),
        (
            ["--chat_template_kwargs", "{1: 2}"],
            "of the form '{name: value}', got {1: 2}",
        ),
        (["--columns.prompt", "question"], "did you mean columns?"),
        (["--data", ""], "data is empty"),
        (["--cache_dir", " "], "cache_dir is empty"),
        (["--seed", str(2**63)], "seed must be in [0, 2**63)"),
        (["--lora_r", "8193"], "lora_r must be at most 8192"),
        (["--pack_tokens", str(2**24 + 1)], "pack_tokens must be at most"),
        (["--beta", "--shuffle"], "--beta needs a value"),
        (["--config", "--shuffle"], "--config needs a value"),
        (["--lr", "1"], "did you mean learning_rate?"),
        (["--epochs", "1"], "did you mean num_train_epochs?"),
        (["--output", "x"], "did you mean output_dir?"),
        (["--rank", "8"], "did you mean lora_r?"),
        (["--config", "a.yaml", "--config", "b.yaml"], "--config is given twice, a.yaml and b"),
        (["--beta", "nan"], "beta must be a finite number, got nan"),
        (["--columns", "prompt=question"], "of the form '{name: value}', got prompt=question"),
        (["--loss_weights", "0.5"], "loss_weights=[0.5] has no effect with one loss"),
        (["--alpha", "8"], "did you mean lora_alpha?"),
        (
            ["--print_config=skip_default"],
            "unknown setting 'print_config'; leave it out",
        ),
        (
            ["--lr_scheduler_type", "constant", "--warmup_ratio", "0.2"],
            "warmup_ratio=0.2 has no effect with lr_scheduler_type=constant",
        ),
        (["--optim", "sgd", "--adam_beta1", "0.8"], "adam_beta1=0.8 has no effect with optim=sgd"),
        (["--optim", "sgd", "--adam_epsilon", "1e-6"], "adam_epsilon=1e-06 has no effect"),
        (
            ["--save_strategy", "no", "--keep_checkpoints", "3"],
            "keep_checkpoints=3 has no effect with save_strategy=no",
        ),
        (
            ["--quantization", "none", "--quantized_copy", "false"],
            "quantized_copy=False has no effect with quantization=none",
        ),
    ],
)
def test_parse_config_refuses_in_one_line(words, message):
    with pytest.raises(ValueError) as error:
        parse_config(TrainConfig, words)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0, "top_p": 0.5}, "top_p=0.5 has no effect with temperature=0"),
        ({"temperature": 0, "top_k": 5}, "top_k=5 has no effect with temperature=0"),
        ({"temperature": 0, "seed": 5}, "seed=5 has no effect with temperature=0"),
        (
            {"quantization": "none", "quantized_copy": False},
            "quantized_copy=False has no effect with quantization=none",
        ),
        ({"temperature": float("inf")}, "temperature must be a finite number"),
        ({"temperature": 1e-300}, "temperature must be 0 or at least 0.0001, got 1e-300"),
        ({"system_prompt": "x", "chat_template": "none"}, "no effect with chat_template=none"),
        ({"prompt": " "}, "prompt is empty"),
        ({"adapter": ""}, "adapter is empty"),
        ({"prompts": ""}, "prompts is empty"),
        ({"seed": -1}, "seed must be in"),
    ],
)
def test_generate_config_refuses_settings_that_cannot_count(settings, message):
    with pytest.raises(ValueError, match=message):
        GenerateConfig(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"lr_scheduler_type": "constant"},
        {"lr_scheduler_type": "constant", "warmup_ratio": 0.0},
        {"lr_scheduler_type": "constant_with_warmup", "warmup_ratio": 0.2},
        {"optim": "adamw_8bit", "adam_beta1": 0.8},
        {"save_strategy": "steps", "save_steps": 5, "keep_checkpoints": 3},
    ],
)
def test_train_config_takes_combinations_that_count(settings):
    assert dataclasses.asdict(TrainConfig(**settings)).items() >= settings.items()


def test_config_takes_paths_as_text():
    config = TrainConfig(model=Path("a") / "b", output_dir=Path("c"))
    assert (config.model, config.output_dir) == (str(Path("a") / "b"), "c")


@pytest.mark.parametrize("text", ["", "# nothing yet\n", "{}\n"])
def test_from_yaml_takes_an_empty_file_for_no_settings(tmp_path, text):
    assert TrainConfig.from_yaml(write(tmp_path, text)) == TrainConfig()


def test_from_yaml_reads_utf8_whatever_the_locale(tmp_path):
    path = write(tmp_path, "system_prompt: né 日本\n")
    script = (
        "import sys; from lowmem_dpo.settings.configs import TrainConfig; "
        "print(ascii(TrainConfig.from_yaml(sys.argv[1]).system_prompt))"
    )
    plain = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = subprocess.run(
        [sys.executable, "-c", script, path],
        env={**os.environ, **plain},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == ascii("né 日本")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("betta: 0.1\n", "run.yaml: unknown setting 'betta'; did you mean beta?"),
        ("beta: [1\n", "is not valid YAML"),
        ("- 1\n", "must hold `name: value` lines"),
        ("beta: -3\n", "run.yaml: beta must be > 0"),
        ("model: 7\n", "run.yaml: model must be text in quotes, got 7"),
        (
            "lora_target_modules: [1]\n",
            "must be a name, or several such as [a, b], got [1]",
        ),
        ("optim: [sgd]\n", "run.yaml: optim must be one of adamw"),
    ],
)
def test_from_yaml_names_the_file_and_the_fault(tmp_path, text, message):
    with pytest.raises(ValueError) as error:
        TrainConfig.from_yaml(write(tmp_path, text))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "dpo"}, "loss_type must be one of"),
        ({"learning_rate": "5e-6"}, "learning_rate must be a number"),
        ({"batch_size": 2.5}, "batch_size must be a whole number"),
        ({"batch_size": True}, "batch_size must be a whole number"),
        ({"model": 7}, "model must be text in quotes"),
        ({"columns": {"prompt": 3}}, "columns: prompt must be the name of a column in the file"),
    ],
)
def test_config_checks_types_of_values_given_in_python(settings, message):
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        TrainConfig(**settings)


def test_to_yaml_round_trips_every_setting(tmp_path):
    config = TrainConfig(
        model="m",
        learning_rate=1e-5,
        chat_template_kwargs={"a": 1},
        system_prompt="né: 'x'",
        lora_alpha=3,
    )
    assert TrainConfig.from_yaml(write(tmp_path, to_yaml(config))) == config


def test_to_yaml_has_the_groups_in_the_order_of_the_help():
    names = list(yaml.safe_load(to_yaml(TrainConfig())))
    assert names[:2] == ["model", "quantization"] and names[-1] == "head_weight"
    assert sorted(names) == sorted(field.name for field in dataclasses.fields(TrainConfig))


@pytest.mark.parametrize("config", [TrainConfig, GenerateConfig, DemoConfig])
def test_settings_by_group_has_every_field_once_and_no_group_declares_it_anew(config):
    groups = settings_by_group(config)
    fields = [field for _, group in groups for field in group]
    assert sorted(f.name for f in fields) == sorted(f.name for f in dataclasses.fields(config))
    for cls, group in groups[1:]:
        assert {field.name for field in group} <= inspect.get_annotations(cls).keys()
    declared = [name for cls in config.__mro__ for name in inspect.get_annotations(cls)]
    twins = [field.name for field in fields if declared.count(field.name) > 1]
    assert twins == (["output_dir"] if config is DemoConfig else [])


@pytest.mark.parametrize(
    ("text", "expected"),
    [("8GB", 8 * 10**9), ("7.5GiB", int(7.5 * 2**30)), ("900 MiB", 900 * 2**20), ("12", 12)],
)
def test_parse_bytes_reads_decimal_and_binary_units(text, expected):
    assert parse_bytes(text) == expected


def test_another_verbs_file_is_called_that(tmp_path):
    path = write(tmp_path, to_yaml(TrainConfig()))
    with pytest.raises(ValueError, match="more are settings of another verb") as error:
        parse_config(GenerateConfig, ["--config", path])
    assert len(str(error.value)) < 300


def test_groups_at_their_defaults_have_nothing_to_refuse():
    """Their checks are left out then."""
    checked = [
        group for group in vars(groups).values() if "check" in getattr(group, "__dict__", ())
    ]
    assert len(checked) > 5
    for group in checked:
        group.check(group())


def test_a_check_is_made_if_only_one_setting_of_its_group_is_given():
    with pytest.raises(ValueError, match="quantized_copy=False has no effect"):
        ModelSettings(quantization="none", quantized_copy=False)
    with pytest.raises(ValueError, match="memory_limit must be a size"):
        TrainConfig(memory_limit="much")
    with pytest.raises(ValueError, match="save_strategy steps needs save_steps"):
        TrainConfig(save_strategy="steps")

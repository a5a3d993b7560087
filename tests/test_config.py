import dataclasses
from pathlib import Path

import pytest

from lowmem_dpo.config import (
    DemoConfig,
    GenerateConfig,
    TrainConfig,
    parse_bytes,
    parse_config,
    to_yaml,
)


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


@pytest.mark.parametrize("text", ["q_proj,v_proj", "[q_proj, v_proj]"])
def test_parse_config_reads_lists_of_modules(text):
    config = parse_config(TrainConfig, ["--lora_target_modules", text])
    assert config.lora_target_modules == ["q_proj", "v_proj"]


def test_parse_config_reads_template_variables():
    words = ["--chat_template_kwargs", "{enable_thinking: false}"]
    assert parse_config(TrainConfig, words).chat_template_kwargs == {"enable_thinking": False}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--learningrate", "1"], "did you mean learning_rate?"),
        (["--beta", "x"], "beta must be float, got x"),
        (["--beta", "-1"], "beta must be > 0, got -1.0; the usual value is 0.1"),
        (["--loss_type", "dpo"], "loss_type must be one of sigmoid, ipo, hinge, apo_zero, got dpo"),
        (["--label_smoothing", "0.5"], "label_smoothing must be in [0, 0.5)"),
        (["--label_smoothing", "0.1", "--loss_type", "ipo"], "has no effect with loss_type=ipo"),
        (["--save_steps", "5"], "has no effect with save_strategy=epoch"),
        (["--eval_steps", "5"], "needs something to evaluate on"),
        (["--seed"], "--seed needs a value"),
        (["data.jsonl"], "unexpected argument 'data.jsonl'"),
        (["--config", "missing.yaml"], "cannot read the settings file missing.yaml"),
        (["--memory_limit", "lots"], "memory_limit must be a size"),
        (["--max_steps", "0"], "max_steps must be at least 1"),
    ],
)
def test_parse_config_refuses_in_one_line(words, message):
    with pytest.raises(ValueError) as error:
        parse_config(TrainConfig, words)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("betta: 0.1\n", "run.yaml: unknown setting 'betta'; did you mean beta?"),
        ("beta: [1\n", "is not valid YAML"),
        ("- 1\n", "must hold `name: value` lines"),
        ("beta: -3\n", "run.yaml: beta must be > 0"),
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
        ({"learning_rate": "5e-6"}, "learning_rate must be float"),
        ({"batch_size": 2.5}, "batch_size must be int"),
        ({"batch_size": True}, "batch_size must be int"),
        ({"model": 7}, "model must be str | None"),
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


@pytest.mark.parametrize("cls", [TrainConfig, GenerateConfig, DemoConfig])
def test_every_setting_has_a_docstring_shown_in_the_help(cls):
    from lowmem_dpo.config import settings_parser

    help_text = " ".join(settings_parser(cls).format_help().split())
    docs = field_docs(cls)
    for field in dataclasses.fields(cls):
        assert docs[field.name], field.name
        assert " ".join(docs[field.name].split()) in help_text, field.name


def field_docs(cls: type) -> dict[str, str]:
    from docstring_parser import parse_from_object

    return {p.arg_name: p.description for p in parse_from_object(cls).params}


@pytest.mark.parametrize(
    ("text", "expected"),
    [("8GB", 8 * 10**9), ("7.5GiB", int(7.5 * 2**30)), ("900 MiB", 900 * 2**20), ("12", 12)],
)
def test_parse_bytes_reads_decimal_and_binary_units(text, expected):
    assert parse_bytes(text) == expected

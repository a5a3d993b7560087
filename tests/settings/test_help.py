import dataclasses
import inspect
import re

import pytest

from lowmem_dpo.cli import VERBS
from lowmem_dpo.settings.configs import DemoConfig, GenerateConfig, TrainConfig
from lowmem_dpo.settings.fields import parse_config
from lowmem_dpo.settings.help import field_docs, full_help, group_title, short_help


@pytest.fixture(autouse=True)
def terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def settings_shown(text: str) -> list[str]:
    """The names of the settings that a help text explains, in order."""
    names = re.findall(r"^  --(\w+)  ", text, re.MULTILINE)
    return [name for name in names if name not in ("print_config", "help_all")]


def helps(name: str) -> tuple[str, str]:
    verb = VERBS[name]
    short = short_help(name, verb.summary, verb.config, verb.first)
    return short, full_help(name, verb.summary, verb.config)


@pytest.mark.parametrize("name", VERBS)
def test_full_help_shows_every_setting_once_under_its_group(name):
    text = helps(name)[1]
    verb = VERBS[name]
    assert sorted(settings_shown(text)) == sorted(f.name for f in dataclasses.fields(verb.config))
    groups = {group_title(cls): cls for cls in verb.config.__mro__}
    for block in text.split("\n\n"):
        title = block.splitlines()[0]
        for setting in settings_shown(block):
            assert setting in inspect.get_annotations(groups[title]), setting


@pytest.mark.parametrize("name", VERBS)
def test_short_help_shows_the_first_settings_in_their_order(name):
    text = helps(name)[0]
    verb = VERBS[name]
    assert tuple(settings_shown(text)) == verb.first
    assert len(verb.first) <= 10
    assert len(text.splitlines()) <= 45
    others = len(dataclasses.fields(verb.config)) - len(verb.first)
    assert (f"--help_all shows {others} more" in text) == (others > 0)


@pytest.mark.parametrize("name", VERBS)
@pytest.mark.parametrize(("columns", "longest"), [("80", 80), ("60", 79), ("300", 100)])
def test_no_line_of_help_is_wider_than_the_terminal(name, columns, longest, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    for text in helps(name):
        assert max(map(len, text.splitlines())) <= longest
    meanings = [line for line in helps(name)[1].splitlines() if line.startswith("      ")]
    assert max(map(len, meanings)) <= int(columns)


@pytest.mark.parametrize("config", [TrainConfig, GenerateConfig, DemoConfig])
def test_every_setting_has_a_docstring_shown_in_the_help(config):
    text = " ".join(full_help("verb", "summary", config).split())
    docs = field_docs(config)
    for field in dataclasses.fields(config):
        assert docs[field.name].endswith(".") and docs[field.name] in text, field.name


def test_field_docs_prefers_a_configs_own_words():
    assert "demo" in field_docs(DemoConfig)["output_dir"]
    assert field_docs(TrainConfig)["output_dir"] == "Folder that receives the run."


def test_help_shows_type_and_default():
    text = full_help("train", "summary", TrainConfig)
    for line in (
        "  --learning_rate  float; default 5e-06",
        "  --shuffle  bool; default true",
        "  --model  str",
        "  --save_strategy  one of epoch, steps, no; default epoch",
        "  --columns  dict[str, str]; default {}",
    ):
        assert line in text.splitlines()


@pytest.mark.parametrize("name", VERBS)
def test_defaults_in_the_help_are_read_back_as_the_defaults(name):
    config = VERBS[name].config
    shown = re.findall(r"^  --(\w+)  .*; default\s+(\S+)$", helps(name)[1], re.MULTILINE)
    assert shown
    for setting, default in shown:
        assert parse_config(config, [f"--{setting}={default}"]) == config(), setting

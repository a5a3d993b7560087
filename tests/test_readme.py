import re
import shlex
from pathlib import Path

import yaml

from lowmem_dpo.config import TrainConfig
from lowmem_dpo.settings import parse_config
from lowmem_dpo.settings_table import CONFIGS, with_tables

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_tables_are_those_of_the_dataclasses():
    assert with_tables(README) == README
    assert set(re.findall(r"<!-- settings (\w+) -->", README)) == set(CONFIGS)
    assert README.count("<!-- formats -->") == 1


def test_tables_of_other_trainers_are_those_of_the_code():
    text = (ROOT / "docs" / "other-trainers.md").read_text(encoding="utf-8")
    assert with_tables(text) == text
    assert re.findall(r"<!-- settings (\w+) -->", text) == ["renamed", "fixed", "without_effect"]


def test_readme_commands_are_understood():
    commands = re.findall(r"-m lowmem_dpo (train|generate)((?:\\\n|[^\n])*)", README)
    assert {verb for verb, _ in commands} == {"train", "generate"}
    for verb, words in commands:
        cls = CONFIGS["TrainConfig" if verb == "train" else "GenerateConfig"]
        parse_config(cls, shlex.split(words.replace("\\\n", " ")))


def test_readme_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http|#)([^)#]+)", README):
        assert (ROOT / target).exists(), target


def test_constraints_pin_torch_and_leave_triton_to_it():
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    names = {pin.partition("==")[0] for pin in pins}
    assert "torch==2.13.0" in pins and "triton" not in names
    assert all("==" in pin for pin in pins)


def test_default_config_is_the_documented_recipe():
    config = TrainConfig()
    assert (config.learning_rate, config.beta, config.num_train_epochs) == (5e-6, 0.1, 1)
    assert (config.lr_scheduler_type, config.warmup_ratio, config.batch_size) == ("cosine", 0.1, 16)
    assert (config.max_grad_norm, config.lora_r, config.lora_alpha) == (1.0, 16, 16)
    assert (config.max_length, config.save_strategy, config.keep_checkpoints) == (1024, "epoch", 2)


def test_pre_commit_configuration_is_yaml_with_hooks():
    text = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    assert {hook["id"] for repo in yaml.safe_load(text)["repos"] for hook in repo["hooks"]} >= {
        "ruff-check",
        "ruff-format",
    }

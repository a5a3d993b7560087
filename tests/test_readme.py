import json
import re
import shlex
from pathlib import Path

import torch
import yaml

from lowmem_dpo.settings.configs import TrainConfig
from lowmem_dpo.settings.parsing import parse_config
from lowmem_dpo.settings_table import CONFIGS, with_tables
from lowmem_dpo.training.trainer import Trainer

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


def documented_keys() -> dict[str, set[str]]:
    """The keys in the README's table, by file."""
    table = README.partition("<!-- keys -->")[2].partition("<!-- end keys -->")[0]
    keys: dict[str, set[str]] = {}
    file = ""
    for line in table.strip().splitlines()[2:]:
        cell, names = (cell.strip() for cell in line.split("|")[1:3])
        file = cell or file
        keys[file] = keys.get(file, set()) | set(re.findall(r"`([^`]+)`", names))
    return keys


def test_readme_names_every_key_that_a_run_writes(llama_dir, pairs_file, tmp_path, monkeypatch):
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def one_without_end(parameters, limit):
        calls.append(1)
        return torch.tensor(torch.inf) if len(calls) == 2 else clip(parameters, limit)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", one_without_end)
    monkeypatch.setattr("lowmem_dpo.training.recorder.draw_plots", lambda *paths: [])
    settings = {"eval_fraction": 0.3, "batch_size": 2, "max_steps": 3, "learning_rate": 1e-3}
    config = TrainConfig(
        model=str(llama_dir), data=str(pairs_file(8)), output_dir=str(tmp_path / "out"), **settings
    )
    output = Trainer(config).fit().output_dir
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    record = json.loads((output / "run.json").read_text(encoding="utf-8"))
    keys = documented_keys()
    common = keys["all three"]
    assert {key for line in lines for key in json.loads(line)} == keys["metrics.jsonl"] | common
    assert record.keys() == keys["run.json"] | common


def test_readme_names_every_key_of_the_recorded_benchmarks():
    written = set()
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        written |= record.keys() | {key for result in record["results"] for key in result}
    keys = documented_keys()
    assert written == keys["benchmarks/\\*.json"] | keys["all three"]


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

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from lowmem_dpo.cli import VERBS
from lowmem_dpo.data.formats import FORMATS
from lowmem_dpo.losses.types import LOSS_TYPES
from lowmem_dpo.model.families import FAMILIES
from lowmem_dpo.settings.configs import TrainConfig
from lowmem_dpo.settings.conversions import CONVERTED
from lowmem_dpo.settings.fields import parse_config
from lowmem_dpo.settings.other_names import FIXED, NO_EFFECT, RENAMED

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


README = read(ROOT / "README.md")


def load_generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GENERATOR = load_generator()


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.stem)
def test_tables_are_those_of_the_code(path):
    text = path.read_text(encoding="utf-8")
    assert GENERATOR.with_tables(text) == text, "run python docs/generate.py"


def test_tables_are_made_from_the_checkout_that_the_generator_stands_in(tmp_path):
    """Not from another one that is installed."""
    (tmp_path / "lowmem_dpo").mkdir()
    (tmp_path / "lowmem_dpo" / "__init__.py").write_text("raise ImportError('another checkout')")
    code = f"import runpy; runpy.run_path({str(ROOT / 'docs' / 'generate.py')!r})"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment)
    assert result.returncode == 0


def test_documents_name_files_that_exist():
    folders = ("lowmem_dpo", "kernels", "tests", "benchmarks", "docs")
    files = [
        path.relative_to(ROOT).as_posix() for f in folders for path in ROOT.glob(f"{f}/**/*.py")
    ]
    records = [path for path in DOCS if path.stem == "experiments"]  # of trees that are gone
    documents = set(ROOT.glob("*.md")) | set(ROOT.glob("docs/**/*.md")) - set(records)
    for path in documents:
        for name in re.findall(r"`([\w/]+\.py)\b", read(path)):
            assert any(f"/{file}".endswith(f"/{name}") for file in files), f"{path}: {name}"


def test_every_table_stands_in_one_document():
    names = [name for path in DOCS for name in re.findall(r"<!-- table (\w+) -->", read(path))]
    assert sorted(names) == sorted(GENERATOR.TABLES)


def test_with_tables_replaces_what_is_between_the_markers():
    text = "a\n<!-- table losses -->\nold\n<!-- end -->\nb\n"
    renewed = GENERATOR.with_tables(text)
    assert renewed.startswith("a\n<!-- table losses -->\n| loss_type |")
    assert renewed.endswith("|\n<!-- end -->\nb\n") and "old" not in renewed


def cells(table: str) -> list[list[str]]:
    """The rows of a Markdown table below its head."""
    lines = [line for line in table.splitlines() if line.startswith("| `") or "| {" in line]
    return [re.split(r"(?<!\\) ?\| ?", line)[1:-1] for line in lines]


@pytest.mark.parametrize("verb", VERBS)
def test_settings_of_every_verb_stand_in_its_section(verb):
    sections = read(ROOT / "docs" / "settings.md").split("\n## ")[1:]
    (section,) = (text for text in sections if verb in text.splitlines()[0].split())
    (table,) = re.findall(r"<!-- table (\w+) -->", section)
    assert VERBS[table].config is VERBS[verb].config
    own = table == "plan"  # the others are train's, as its section says
    assert GENERATOR.TABLES[table]() == GENERATOR.settings_tables(VERBS[verb].config, own=own)
    assert not own or "all settings of `train`, above" in section


@pytest.mark.parametrize("config", dict.fromkeys(verb.config for verb in VERBS.values()))
def test_settings_tables_have_every_setting_once(config):
    rows = cells(GENERATOR.settings_tables(config))
    assert sorted(row[0].strip("`") for row in rows) == sorted(f.name for f in fields(config))
    assert all(len(row) == 4 and row[3].endswith(".") for row in rows)


def test_losses_table_has_a_row_of_every_loss_with_five_cells():
    rows = cells(GENERATOR.losses_table())
    assert [row[0].strip("`") for row in rows] == list(LOSS_TYPES)
    assert all(len(row) == 5 for row in rows)


def test_formats_table_shows_every_format():
    table = GENERATOR.formats_table()
    for known in FORMATS:
        assert f"| {known.name} | `{known.example}` |" in table


def test_tables_of_other_trainers_have_every_foreign_name():
    names = RENAMED.keys() | CONVERTED.keys() | FIXED.keys() | NO_EFFECT.keys()
    tables = (GENERATOR.renamed_table(), GENERATOR.fixed_table(), GENERATOR.no_effect_table())
    rows = [row for table in tables for row in cells(table)]
    assert {name.strip("`") for row in rows for name in row[0].split(", ")} == names


def test_readme_is_short():
    assert len(README.splitlines()) < 200


def test_readme_names_every_type_of_model():
    """In the table of what it trains, and no other there."""
    table = README.partition("| type | models")[2].partition("\n\n")[0]
    types = re.findall(r"`(\w+)`", " ".join(row.split("|")[1] for row in table.splitlines()[2:]))
    assert sorted(types) == sorted(FAMILIES)


def test_readme_commands_are_understood():
    commands = re.findall(r"-m lowmem_dpo (\w+)((?:\\\n|[^\n`])*)", README)
    assert {verb for verb, _ in commands} >= {"train", "generate"}
    for verb, words in commands:
        parse_config(VERBS[verb].config, shlex.split(words.replace("\\\n", " ")))


# docs/experiments.md is a dated record: the flags that it names were so then.
@pytest.mark.parametrize(
    "path",
    [ROOT / "README.md", *(path for path in DOCS if path.stem != "experiments")],
    ids=lambda path: path.stem,
)
def test_flags_in_the_docs_are_settings(path):
    settings = {field.name for verb in VERBS.values() for field in fields(verb.config)}
    settings |= {"config", "print_config", "help", "help_all", "name"}
    found = {name.replace("-", "_") for name in re.findall(r"`--([a-z][a-z_-]+)", read(path))}
    assert found <= settings, found - settings


def documented_keys() -> dict[str, set[str]]:
    """The keys in the guide's table, by file."""
    table = (
        read(ROOT / "docs" / "guide.md")
        .partition("<!-- keys -->")[2]
        .partition("<!-- end keys -->")[0]
    )
    keys: dict[str, set[str]] = {}
    file = ""
    for line in table.strip().splitlines()[2:]:
        cell, names = (cell.strip() for cell in line.split("|")[1:3])
        file = cell or file
        keys[file] = keys.get(file, set()) | set(re.findall(r"`([^`]+)`", names))
    return keys


def test_guide_names_every_key_that_a_run_writes(llama_dir, pairs_file, tmp_path, monkeypatch):
    import torch

    from lowmem_dpo.trainer import Trainer

    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def one_without_end(parameters, limit, **options):
        calls.append(1)
        return torch.tensor(torch.inf) if len(calls) == 2 else clip(parameters, limit, **options)

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
    of_cards = set() if torch.cuda.is_available() else {"peak_reserved_bytes"}
    wanted = keys["metrics.jsonl"] | common
    assert of_cards <= wanted
    assert {key for line in lines for key in json.loads(line)} == wanted - of_cards
    assert record.keys() == keys["run.json"] | common


def test_guide_names_every_key_of_the_recorded_benchmarks():
    written = set()
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        written |= record.keys() | {key for result in record["results"] for key in result}
    keys = documented_keys()
    assert written == keys["benchmarks/\\*.json"] | keys["all three"]


def anchors(path: Path) -> set[str]:
    """The names under which GitHub links to a document's headings."""
    headings = re.findall(r"^#+ (.*)$", read(path), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", [ROOT / "README.md", *DOCS], ids=lambda path: path.stem)
def test_links_lead_somewhere(path):
    for target, _, anchor in re.findall(r"\]\((?!http)([^)#]*)(#([^)]*))?\)", read(path)):
        file = path.parent / target if target else path
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), f"{target}#{anchor}"


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

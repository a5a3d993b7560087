"""A template that writes today's date: a run keeps its own, and so does the reference's cache."""

from dataclasses import replace
from pathlib import Path

import pytest

from lowmem_dpo.settings.configs import TrainConfig
from lowmem_dpo.tokens import templates
from lowmem_dpo.training import fit as fit_module
from lowmem_dpo.training.fit import fit, precompute
from tests.training.conftest import read_metrics, read_record, write_rows

pytestmark = pytest.mark.usefixtures("without_plots")

TEMPLATE = (
    "{{ strftime_now('%d %b %Y') }}\n{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture
def set_today(monkeypatch):
    return lambda date: monkeypatch.setattr(templates, "_today", lambda: date)


@pytest.fixture
def config(llama_dir, tmp_path) -> TrainConfig:
    path = tmp_path / "dated.jinja"
    path.write_text(TEMPLATE)
    rows = [{"prompt": f"{i}?", "chosen": f"{i}.", "rejected": "none"} for i in range(6)]
    return TrainConfig(
        model=str(llama_dir),
        data=str(write_rows(tmp_path / "pairs.jsonl", rows)),
        output_dir=str(tmp_path / "run"),
        cache_dir=str(tmp_path / "cache"),
        chat_template=str(path),
        batch_size=2,
        lora_r=2,
        save_strategy="steps",
        save_steps=1,
        keep_checkpoints=3,
    )


def go_on(config, **changes):
    checkpoint = str(Path(config.output_dir) / "checkpoints" / "step-000001")
    return replace(config, resume=checkpoint, **changes)


def test_a_run_goes_on_the_next_day_with_its_own_date(config, set_today):
    set_today("2026-11-25")
    fit(config)
    first, losses = read_record(Path(config.output_dir)), read_metrics(Path(config.output_dir))
    assert first["data"]["template_date"] == "2026-11-25"
    assert "template_date: '2026-11-25'" in (Path(config.output_dir) / "config.yaml").read_text()
    set_today("2026-11-26")
    fit(go_on(config))
    later = read_record(Path(config.output_dir))
    assert later["data_digest"] == first["data_digest"]
    assert later["data"]["template_date"] == "2026-11-25"
    assert later["reference"]["num_scored"] == 0
    last = [lines[-1]["loss"] for lines in (losses, read_metrics(Path(config.output_dir)))]
    assert last[0] == last[1]


def test_resume_names_the_date_only_if_the_user_changed_it(config, set_today):
    set_today("2026-11-25")
    fit(config)
    with pytest.raises(ValueError, match="template_date 2026-11-25 -> 2026-12-24"):
        fit(go_on(config, template_date="2026-12-24"))


def test_resume_names_a_changed_template_and_not_the_pairs(config, set_today):
    set_today("2026-11-25")
    fit(config)
    Path(config.chat_template).write_text(TEMPLATE + " ")
    with pytest.raises(ValueError, match="the chat template changed") as error:
        fit(go_on(config))
    assert "the pairs changed" not in str(error.value)


def test_resume_names_versions_that_changed_with_the_pairs(config, set_today, monkeypatch):
    set_today("2026-11-25")
    with monkeypatch.context() as earlier:
        earlier.setattr(fit_module, "text_versions", lambda: {"tokenizers": "0.1"})
        fit(config)
    rows = [{"prompt": f"{i}!", "chosen": f"{i}.", "rejected": "none"} for i in range(6)]
    write_rows(Path(str(config.data)), rows)
    with pytest.raises(ValueError, match=r"the pairs changed .*; tokenizers 0\.1 -> \d"):
        fit(go_on(config))


def test_a_fixed_date_lets_the_cache_hold_on_another_day(config, set_today):
    set_today("2026-11-25")
    assert precompute(config) == 6
    set_today("2026-11-26")
    assert precompute(replace(config, template_date="2026-11-25")) == 0
    assert precompute(config) == 6

"""Which chat template is used, which date it writes, and what its complaints say."""

from datetime import datetime

import pytest

from lowmem_dpo.data.formats import Preference
from lowmem_dpo.settings.fields import parse_config
from lowmem_dpo.settings.groups import EncodingSettings, TemplateSettings
from lowmem_dpo.tokens import templates
from lowmem_dpo.tokens.encoding import encode_pairs, render_prompt
from lowmem_dpo.tokens.rendering import build_renderer
from lowmem_dpo.tokens.templates import choose_template
from tests.tokens.encoding import AUTO, encode_one, sides, trl_pairs, turn
from tests.tokens.shapes import LLAMA31, R1

TOOL = {"type": "function", "function": {"name": "rain", "parameters": {"type": "object"}}}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NEEDS_TOOLS = "{% if not tools %}{{ raise_exception('no tools') }}{% endif %}"
TOOL_USE = NEEDS_TOOLS + "{{ tools | tojson }}\n" + CHATML
MESSAGES = [turn("user", "hi")]


def dated(date):
    return TemplateSettings(template_date=date)


@pytest.fixture
def named(build_tokenizer):
    tokenizer = build_tokenizer("chatml")
    tokenizer.chat_template = {"default": CHATML, "tool_use": TOOL_USE, "thinking": R1}
    return tokenizer


def rows(**columns):
    return Preference(MESSAGES, [turn("assistant", "yes")], [turn("assistant", "no")], 1, **columns)


# Named templates


def test_rows_with_tools_take_tool_use_as_trl_does(named):
    for tools in ([TOOL], []):
        pair, report = encode_one(rows(tools=tools), named)
        assert ("tool_use where there are tools (1 of 1)" in report.template_choice) == bool(tools)
        row = {"prompt": MESSAGES, "chosen": rows().chosen, "rejected": rows().rejected}
        (expected,) = trl_pairs([row | {"tools": tools}] if tools else [row], named)
        start = pair.chosen_start
        assert list(pair.chosen_ids) == expected[0] + expected[1]
        assert start == len(expected[0])
        assert ('"name": "rain"' in named.decode(pair.chosen_ids)) == bool(tools)


def test_a_template_is_chosen_by_name(named):
    settings = EncodingSettings(chat_template="thinking")
    pair, report = encode_one(rows(), named, settings)
    assert "<think>" in next(sides(pair, named))[0]
    assert report.template_choice == "text goes through the tokenizer's chat template thinking"
    assert render_prompt(named, MESSAGES, settings) == list(pair.chosen_ids[: pair.chosen_start])
    with pytest.raises(ValueError, match=r"no file, and no template .*default, tool_use, thinking"):
        encode_one(rows(), named, EncodingSettings(chat_template="rag"))


def test_templates_without_a_default_are_named(named):
    named.chat_template = {"rag": CHATML, "tool_use": TOOL_USE}
    encode_one(rows(tools=[TOOL]), named)
    with pytest.raises(
        ValueError, match=r"row 1: .* rag, tool_use and none .*--chat_template NAME"
    ):
        encode_one(rows(), named)


def test_all_templates_are_saved_unless_one_is_chosen(named):
    assert choose_template(named, AUTO).to_save == named.chat_template
    assert choose_template(named, EncodingSettings(chat_template="thinking")).to_save == R1
    assert choose_template(named, EncodingSettings(chat_template="none")).to_save is None


def test_templates_beside_a_tokenizer_are_read_as_transformers_writes_them(named, tmp_path):
    from transformers import AutoTokenizer

    named.save_pretrained(tmp_path)
    assert (tmp_path / "additional_chat_templates" / "tool_use.jinja").is_file()
    read = AutoTokenizer.from_pretrained(tmp_path)
    assert choose_template(read, AUTO).sources.keys() == {"default", "tool_use", "thinking"}
    pair, _ = encode_one(rows(tools=[TOOL]), read)
    assert pair == encode_one(rows(tools=[TOOL]), named)[0]


# Complaints


def test_a_template_that_needs_tools_is_probed_with_them(named):
    named.chat_template = TOOL_USE
    pair, _ = encode_one(rows(tools=[TOOL]), named)
    assert next(sides(pair, named))[1] == "yes<|im_end|>\n"
    assert "<|im_end|>" in build_renderer(named, AUTO, tools=[TOOL]).terminators
    assert "<|im_end|>" not in build_renderer(named, AUTO).terminators


@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
def test_complaints_are_about_the_users_messages(named, on_bad_row):
    named.chat_template = NEEDS_TOOLS + CHATML
    settings = EncodingSettings(on_bad_row=on_bad_row)
    with pytest.raises(ValueError, match=r"row 1: .* the roles user: no tools; change") as error:
        encode_pairs([rows()], named, settings)
    assert "--on_bad_row skip" in str(error.value)
    with pytest.raises(ValueError, match="the roles user: no tools; change") as error:
        render_prompt(named, MESSAGES, TemplateSettings())
    assert "on_bad_row" not in str(error.value)


# Dates


@pytest.mark.parametrize("date", ["2026-01-05", "2026-11-25"])
def test_the_date_is_what_strftime_writes(build_tokenizer, date):
    form = "%d %b %Y|%B %d, %Y|%-d|%A %H:%M 100%%|%Y-%m-%d"
    tokenizer = build_tokenizer("chatml")
    tokenizer.chat_template = (
        "\n{% macro day() %}{{ strftime_now(form) + '!' }}{% endmacro %}"
        "{% set form = '" + form + "' %}{{ strftime_now(form) }}{{ messages[0]['content'] }}"
    )
    template = choose_template(tokenizer, dated(date))
    day = datetime.fromisoformat(date)
    expected = day.strftime(form.replace("%-d", str(day.day)))
    assert template.render(MESSAGES, {}) == f"\n{expected}hi"


def test_a_date_changes_nothing_else(build_tokenizer):
    tokenizer = build_tokenizer("chatml")
    tokenizer.chat_template = LLAMA31
    template = choose_template(tokenizer, TemplateSettings())
    plain = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert template.render(MESSAGES, {}, opens_answer=True) == plain
    assert datetime.now().strftime("%d %b %Y") in plain


def test_today_is_written_unless_a_date_is_set(build_tokenizer, monkeypatch):
    tokenizer = build_tokenizer("chatml")
    tokenizer.chat_template = LLAMA31
    monkeypatch.setattr(templates, "_today", lambda: "2026-11-25")
    for date, written in ((None, "25 Nov 2026"), ("2024-07-26", "26 Jul 2024")):
        pair, report = encode_one(rows(), tokenizer, EncodingSettings(template_date=date))
        assert written in next(sides(pair, tokenizer))[0]
        (line,) = (line for line in report.lines() if "writes the date" in line)
        assert report.template_date in line
    assert choose_template(build_tokenizer("chatml"), TemplateSettings()).date is None


def test_a_date_without_effect_or_meaning_is_refused(build_tokenizer, tmp_path):
    with pytest.raises(ValueError, match="template_date has no effect: the chat template does not"):
        choose_template(build_tokenizer("chatml"), dated("2026-11-25"))
    with pytest.raises(ValueError, match="template_date needs a chat template"):
        choose_template(build_tokenizer(), dated("2026-11-25"))
    with pytest.raises(ValueError, match="must be a date such as 2026-11-25, got 'today'"):
        dated("today")
    path = tmp_path / "settings.yaml"
    path.write_text("template_date: 2026-11-25\n")
    assert parse_config(TemplateSettings, ["--config", str(path)]) == dated("2026-11-25")

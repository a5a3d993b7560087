"""What rows give the chat template: tools, variables, system messages, tool calls."""

import json

import pytest

from lowmem_dpo.data.formats import Preference, parse_row
from lowmem_dpo.settings.groups import EncodingSettings
from lowmem_dpo.tokens.encoding import encode_pairs
from tests.tokens.encoding import (
    AUTO,
    CHATML_PROMPT,
    chat,
    encode_one,
    ours,
    sides,
    trl_pairs,
    turn,
)

TOOL = {"type": "function", "function": {"name": "rain", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "rain", "arguments": {"where": "here"}}}
WITH_TOOLS = (
    "{% if enable_thinking is defined %}<|im_start|>think<|im_end|>\n{% endif %}"
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] or '' }}"
    "{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% endif %}"
)


@pytest.fixture
def tool_tokenizer(build_tokenizer):
    tokenizer = build_tokenizer("chatml")
    tokenizer.chat_template = WITH_TOOLS
    return tokenizer


def test_encode_pairs_agrees_with_trl_on_tools_and_template_variables(tool_tokenizer):
    calling = [turn("assistant", None) | {"tool_calls": [CALL]}, turn("tool", "wet")]
    variables = {"enable_thinking": True}
    row = {
        "prompt": [turn("user", "hi")],
        "chosen": [*calling, turn("assistant", "yes")],
        "rejected": [turn("assistant", "no")],
        "chat_template_kwargs": variables,
    }
    sides = [row[key] for key in ("prompt", "chosen", "rejected")]
    preference = Preference(*sides, 1, tools=[TOOL], chat_template_kwargs=variables)
    expected = trl_pairs([row | {"tools": json.dumps([TOOL])}], tool_tokenizer)
    assert list(ours([preference], tool_tokenizer)) == expected
    pair, report = encode_one(preference, tool_tokenizer)
    assert '"where": "here"' in tool_tokenizer.decode(pair.chosen_ids)
    assert report.ignored_columns == []


def test_encode_pairs_agrees_with_trl_on_implicit_prompts(build_tokenizer):
    text = {"chosen": "Is it abc? yes", "rejected": "Is it abc? no"}
    messages = {
        "chosen": [turn("user", "hi"), turn("assistant", "yes")],
        "rejected": [turn("user", "hi"), turn("assistant", "no")],
    }
    for row, tokenizer in ((text, build_tokenizer()), (messages, build_tokenizer("llama3"))):
        preference, _ = parse_row(row, 1)
        assert list(ours([preference], tokenizer)) == trl_pairs([row], tokenizer)


def test_encode_pairs_leaves_implicit_prompts_of_strings_without_a_template(build_tokenizer):
    tokenizer = build_tokenizer("chatml")
    preference, _ = parse_row({"chosen": "Is it? yes", "rejected": "Is it? no"}, 1)
    pair, _ = encode_one(preference, tokenizer)
    assert list(sides(pair, tokenizer)) == [("Is it?", " yes</s>"), ("Is it?", " no</s>")]


def test_encode_pairs_says_once_what_the_template_ignores(build_tokenizer, tool_tokenizer):
    rows = [
        Preference("hi", "yes", "no", row, tools=[TOOL], chat_template_kwargs={"other": row})
        for row in range(1, 4)
    ]
    _, report = encode_pairs(rows, tool_tokenizer, AUTO)
    assert report.ignored_columns == ["chat_template_kwargs"]
    _, report = encode_pairs(rows, build_tokenizer("chatml"), AUTO)
    lines = [line for line in report.lines() if "has no effect" in line]
    assert lines == [
        f"the column {name} has no effect: the chat template writes the same without it"
        for name in ("tools", "chat_template_kwargs")
    ]


def test_encode_pairs_does_not_call_a_column_ignored_that_counts_in_some_rows(tool_tokenizer):
    rows = [
        Preference("hi", "yes", "no", 1, chat_template_kwargs={"other": 1}),
        Preference("hi", "yes", "no", 2, chat_template_kwargs={"enable_thinking": True}),
    ]
    assert encode_pairs(rows, tool_tokenizer, AUTO)[1].ignored_columns == []


def test_encode_pairs_does_not_call_a_column_ignored_that_one_row_needs(tool_tokenizer):
    tool_tokenizer.chat_template = (
        "{% if not tools %}{{ raise_exception('no tools') }}{% endif %}"
        + tool_tokenizer.chat_template
    )
    tool_tokenizer.chat_template = tool_tokenizer.chat_template.replace(
        "{% if not tools %}", "{% if not tools and messages[0]['content'] != 'UserProbe' %}"
    )
    _, report = encode_one(Preference("hi", "yes", "no", 1, tools=[TOOL]), tool_tokenizer)
    assert report.ignored_columns == []


def test_encode_pairs_lets_a_rows_variables_win_over_the_settings(tool_tokenizer, build_tokenizer):
    tokenizer = build_tokenizer("chatml")
    settings = EncodingSettings(chat_template_kwargs={"enable_thinking": True})
    off = Preference("hi", "yes", "no", 1, chat_template_kwargs={"enable_thinking": False})
    assert encode_one(off, tokenizer, settings)[1].notes["opened"]["text"] == "<think></think>"
    bad = Preference("hi", "yes", "no", 4, chat_template_kwargs={"tokenize": True})
    with pytest.raises(ValueError, match="row 4: chat_template_kwargs cannot set tokenize"):
        encode_one(bad, tokenizer)


@pytest.mark.parametrize("name", ["tools", "chat_template_kwargs"])
def test_encode_pairs_refuses_columns_for_the_template_beside_rendered_text(build_tokenizer, name):
    values = {"tools": [TOOL], "chat_template_kwargs": {"a": 1}}
    row = Preference(CHATML_PROMPT, "yes", "no", 3, **{name: values[name]})
    with pytest.raises(ValueError, match=f"row 3: a {name} column beside a prompt .* rendered"):
        encode_one(row, build_tokenizer("chatml"))
    plain = Preference("hi", "yes", "no", 3, **{name: values[name]})
    with pytest.raises(ValueError, match="row 3: messages need a chat template"):
        encode_one(plain, build_tokenizer())


def test_encode_pairs_keeps_answers_that_only_call_tools(tool_tokenizer):
    calling = [turn("assistant", None) | {"tool_calls": [CALL]}]
    row = Preference([turn("user", "hi")], calling, [turn("assistant", "no")], 1, tools=[TOOL])
    pair, _ = encode_one(row, tool_tokenizer)
    assert next(sides(pair, tool_tokenizer))[1].startswith('{"name": "rain"')
    empty = Preference([turn("user", "hi")], [turn("assistant", None)], calling, 2)
    _, report = encode_pairs([row, empty], tool_tokenizer, AUTO)
    assert report.num_dropped == {"empty": 1}


def test_encode_pairs_says_when_every_row_has_a_system_message(build_tokenizer):
    tokenizer, settings = build_tokenizer("chatml"), EncodingSettings(system_prompt="s")
    own = [
        chat("y", "n", system="own"),
        Preference("hi", "yes", "no", 2, system="own"),
    ]
    said = "system_prompt has no effect: every row has a system message of its own"
    assert said in encode_pairs(own, tokenizer, settings)[1].template_choice
    for rows, used in ((own, AUTO), ([*own, Preference("hi", "yes", "no", 3)], settings)):
        assert said not in encode_pairs(rows, tokenizer, used)[1].template_choice


def test_encode_pairs_skips_rows_that_the_template_refuses_if_told_so(build_tokenizer):
    tokenizer, skip = build_tokenizer("mistral"), EncodingSettings(on_bad_row="skip")
    good = Preference("hi", "yes", "no", 1)
    bad = Preference("hi", "yes", "no", 2, system="s")
    pairs, report = encode_pairs([good, bad], tokenizer, skip)
    assert [pair.row for pair in pairs] == [1]
    assert report.num_dropped == {"refused by the chat template": 1}
    assert report.lines()[-1].startswith("row 2: the chat template cannot render the roles system/")
    with pytest.raises(ValueError, match=r"no pair is left of 1 .*; row 2: the chat template"):
        encode_pairs([bad], tokenizer, skip)
    with pytest.raises(ValueError, match=r"^row 2: the chat template"):
        encode_pairs([good, bad], tokenizer, AUTO)

import json
import re

import pytest

from lowmem_dpo.data.formats import (
    COLUMNS,
    FORMATS,
    Preference,
    known_formats,
    parse_row,
)
from lowmem_dpo.data.rows import RowFault


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


USER, CHOSEN, REJECTED = turn("user", "u"), turn("assistant", "c"), turn("assistant", "r")
STRINGS = {"prompt": "u", "chosen": "c", "rejected": "r"}
MESSAGES = {"prompt": [USER], "chosen": "c", "rejected": "r"}
SHAREGPT = {"conversations": [{"from": "human", "value": "u"}], "chosen": "c", "rejected": "r"}
WHOLE = {"chosen": [USER, CHOSEN], "rejected": [USER, REJECTED]}
HH = {"chosen": "\n\nHuman: u\n\nAssistant: c", "rejected": "\n\nHuman: u\n\nAssistant: r"}
AS_STRINGS = Preference("u", "c", "r", 1)
AS_MESSAGES = Preference([USER], [CHOSEN], [REJECTED], 1)


@pytest.mark.parametrize(
    ("name", "row", "expected"),
    [
        ("prompt/chosen/rejected strings", STRINGS, AS_STRINGS),
        ("message lists", MESSAGES, AS_MESSAGES),
        ("message lists", {**STRINGS, "chosen": [CHOSEN]}, AS_MESSAGES),
        (
            "message lists",
            {**STRINGS, "chosen": [{"from": "gpt", "value": "c"}], "rejected": REJECTED},
            AS_MESSAGES,
        ),
        ("ShareGPT ranking", SHAREGPT, AS_MESSAGES),
        ("prompt and whole conversations", {"prompt": "u", **WHOLE}, AS_MESSAGES),
        ("prompt and whole conversations", {"prompt": " u\n", **WHOLE}, AS_MESSAGES),
        ("prompt and whole conversations", {"prompt": [USER], **WHOLE}, AS_MESSAGES),
        ("implicit prompt, whole conversations", WHOLE, AS_MESSAGES),
        ("Anthropic HH text", HH, AS_MESSAGES),
        ("Anthropic HH text", {k: v.strip() for k, v in HH.items()}, AS_MESSAGES),
        (
            "Anthropic HH text",
            {"prompt": "\n\nHuman: u\n\nAssistant:", "chosen": " c", "rejected": " r"},
            AS_MESSAGES,
        ),
        ("Anthropic HH text", {"prompt": "\n\nHuman: u\n\nAssistant:", **HH}, AS_MESSAGES),
        (
            "implicit prompt, strings",
            {"chosen": "Is it? yes", "rejected": "Is it? no"},
            Preference("Is it?", "Is it? yes", "Is it? no", 1),
        ),
        (
            "instruction and input",
            {"prompt": None, "instruction": "u", "chosen": "c", "rejected": "r"},
            AS_STRINGS,
        ),
        ("question", {"question": "u", "chosen": "c", "rejected": "r"}, AS_STRINGS),
        ("input", {"input": "u", "chosen": "c", "rejected": "r"}, AS_STRINGS),
        (
            "messages and rejected_response",
            {"messages": [USER, CHOSEN], "rejected_response": "r"},
            AS_MESSAGES,
        ),
        (
            "messages and rejected_messages",
            {"messages": [USER, CHOSEN], "rejected_messages": [USER, REJECTED]},
            AS_MESSAGES,
        ),
        (
            "messages and rejected_messages",
            {"messages": [USER, CHOSEN], "rejected_messages": [REJECTED]},
            AS_MESSAGES,
        ),
        (
            "query and responses",
            {"query": "u", "response": "c", "rejected_response": "r"},
            AS_STRINGS,
        ),
        (
            "OpenAI preference",
            {"input.messages": [USER], "preferred_output": [CHOSEN], "non_preferred_output": "r"},
            AS_MESSAGES,
        ),
    ],
)
def test_parse_row_reads_every_format(name, row, expected):
    preference, found = parse_row(row, 1)
    assert found.name == name
    assert preference == expected


@pytest.mark.parametrize("name", ["messages", "conversation", "context", "query"])
def test_parse_row_takes_the_prompt_beside_answers(name):
    answers = {"chosen": "c", "rejected": "r"}
    assert parse_row({name: [USER], **answers}, 1)[0] == AS_MESSAGES
    assert parse_row({name: "u", **answers}, 1)[0] == AS_STRINGS
    row = {name: [USER], "chosen": [CHOSEN], "rejected": REJECTED}
    assert parse_row(row, 1)[0] == AS_MESSAGES
    assert parse_row({name: [USER, CHOSEN], **answers}, 1)[0] == AS_MESSAGES
    assert parse_row({name: [USER, CHOSEN], **WHOLE}, 1)[0] == AS_MESSAGES
    history = {"history": [["a", "b"]]}
    before = [turn("user", "a"), turn("assistant", "b")]
    assert parse_row({name: "u", **answers, **history}, 1)[0].prompt == [*before, USER]
    for row, message in (
        ({name: [USER], **answers, **history}, f"history beside messages in {name}; put it before"),
        ({name: [USER, turn("assistant", "x")], **answers}, f"{name} ends with an assistant"),
    ):
        with pytest.raises(RowFault, match=message):
            parse_row(row, 1)


def test_parse_row_takes_openais_tools():
    row = {"input.messages": [USER], "preferred_output": [CHOSEN], "non_preferred_output": "r"}
    assert parse_row(row | {"input.tools": [TOOL]}, 1)[0].tools == [TOOL]
    assert parse_row(row | {"input.tools": []}, 1)[0].tools == []
    assert parse_row(STRINGS | {"input.tools": [TOOL]}, 1)[0].tools == []


def test_parse_row_keeps_identical_pairs_for_encoding_to_count():
    rows = [
        STRINGS | {"rejected": "c"},
        MESSAGES | {"rejected": "c"},
        WHOLE | {"rejected": WHOLE["chosen"]},
        HH | {"rejected": HH["chosen"]},
        {"prompt": "u", **WHOLE, "rejected": WHOLE["chosen"]},
        {"chosen": "ab", "rejected": "ab"},
        {"chosen": "a", "rejected": "a"},
        {"messages": [USER, CHOSEN], "rejected_response": "c"},
        {"messages": [USER, CHOSEN], "rejected_messages": [USER, CHOSEN]},
    ]
    for row in rows:
        preference = parse_row(row, 1)[0]
        assert preference.chosen == preference.rejected


# A column of the conversation is read, or says nothing new, or the row is refused


@pytest.mark.parametrize(
    "row",
    [
        STRINGS | {"question": "u"},
        STRINGS | {"prompt": "Answer:\n u", "instruction": "Answer: u", "input": ""},
        STRINGS | {"messages": [USER, turn("assistant", "another answer")]},
        WHOLE | {"prompt": "u", "messages": WHOLE["chosen"]},
        WHOLE | {"messages": [USER, turn("assistant", "x")], "conversation": [{"input": "z"}]},
        STRINGS | {"system": "s", "messages": [turn("system", "s"), USER]},
        {"chosen": "u c", "rejected": "u r", "judge": [USER]},
    ],
)
def test_parse_row_leaves_out_columns_that_say_nothing_new(row):
    names = {"question", "instruction", "input", "messages", "conversation", "judge"}
    assert parse_row(row, 1)[0] == parse_row({k: row[k] for k in row.keys() - names}, 1)[0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (STRINGS | {"messages": [turn("user", "v"), CHOSEN, USER]}, "{prompt: messages} to read"),
        (STRINGS | {"prompt": "u", "query": "v"}, "the column query beside prompt is not"),
        (WHOLE | {"messages": [turn("system", "s"), USER, CHOSEN]}, "column messages beside chos"),
        (MESSAGES | {"input.messages": [turn("user", "v")]}, "column input.messages beside prompt"),
        (
            {"question": "u", "context": "v", "chosen": "c", "rejected": "r"},
            "set columns {question: question} to leave it out, {prompt: context} to read it",
        ),
        (
            {"trajectory": [USER], "chosen": "It is c", "rejected": "It is r"},
            "the column trajectory beside chosen is not supported; put it into the prompt, or set "
            "columns {prompt: trajectory} to read it instead",
        ),
    ],
)
def test_parse_row_refuses_to_drop_a_part_of_the_conversation(row, message):
    with pytest.raises(RowFault, match=re.escape(message)):
        parse_row(row, 1)


def test_parse_row_keeps_turns_before_the_answer():
    conversation = [
        {"from": "human", "value": "u"},
        {"from": "gpt", "value": "a"},
        {"from": "observation", "value": "o"},
    ]
    preference, _ = parse_row({**SHAREGPT, "conversations": conversation}, 1)
    assert preference.prompt == [USER, turn("assistant", "a"), turn("tool", "o")]


def test_parse_row_joins_instruction_input_and_history():
    row = {"instruction": "do", "input": "this", "chosen": "c", "rejected": "r"}
    assert parse_row(row, 1)[0].prompt == "do\nthis"
    assert parse_row({**row, "input": ""}, 1)[0].prompt == "do"
    preference, _ = parse_row({**row, "history": [["a", "b"]]}, 1)
    before = [turn("user", "a"), turn("assistant", "b")]
    assert preference.prompt == [*before, turn("user", "do\nthis")]
    assert (preference.chosen, preference.rejected) == ([CHOSEN], [REJECTED])


def test_parse_row_puts_the_system_column_where_it_belongs():
    assert parse_row({**STRINGS, "system": "s"}, 1)[0] == Preference("u", "c", "r", 1, "s")
    assert parse_row({**STRINGS, "system": " "}, 1)[0] == AS_STRINGS
    for row in (MESSAGES, WHOLE, HH, SHAREGPT):
        preference, _ = parse_row({**row, "system": "s"}, 1)
        assert (preference.prompt, preference.system) == ([turn("system", "s"), USER], "")


# Where a whole conversation parts


def test_parse_row_takes_shared_turns_for_the_prompt():
    more = [USER, turn("assistant", "a"), turn("user", "v")]
    row = {"chosen": [*more, CHOSEN], "rejected": [*more, REJECTED]}
    for extra in ({}, {"prompt": "u"}):
        assert parse_row(row | extra, 1)[0] == Preference(more, [CHOSEN], [REJECTED], 1)
    system = turn("system", "s")
    row = {"prompt": "u", "chosen": [system, USER, CHOSEN], "rejected": [system, USER, REJECTED]}
    assert parse_row(row, 1)[0].prompt == [system, USER]


def test_parse_row_leaves_at_least_the_last_message_to_each_answer():
    longer = [USER, CHOSEN, turn("user", "v"), REJECTED]
    preference, _ = parse_row({"chosen": [USER, CHOSEN], "rejected": longer}, 1)
    assert preference == Preference([USER], [CHOSEN], longer[1:], 1)


def test_parse_row_scores_all_that_follows_where_earlier_turns_differ():
    text = "\n\nHuman: u\n\nAssistant: {}\n\nHuman: v\n\nAssistant: c"
    preference, _ = parse_row({"chosen": text.format("a"), "rejected": text.format("b")}, 1)
    assert preference.prompt == [USER]
    assert preference.chosen == [turn("assistant", "a"), turn("user", "v"), CHOSEN]
    assert preference.rejected == [turn("assistant", "b"), turn("user", "v"), CHOSEN]


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ("Is it? yes", "Is it? no"),
        ("The sky is blue.", "The sky is black."),
        ("one two", "one  three"),
        ("same but longer", "same"),
        ("same", "same but longer"),
        ([USER, CHOSEN], [USER, REJECTED]),
        ([USER, CHOSEN, USER, CHOSEN], [USER, CHOSEN, USER, REJECTED]),
        ([USER, CHOSEN], [USER, CHOSEN, USER, REJECTED]),
        ([USER, CHOSEN, turn("user", "x"), CHOSEN], [USER, CHOSEN, turn("user", "y"), CHOSEN]),
    ],
)
def test_parse_row_takes_the_implicit_prompt_that_trl_takes(chosen, rejected):
    trl = pytest.importorskip("trl")
    expected = trl.extract_prompt({"chosen": chosen, "rejected": rejected})
    found, _ = parse_row({"chosen": chosen, "rejected": rejected}, 1)
    start = len(found.prompt) if isinstance(chosen, str) else 0  # joined text keeps the prompt
    assert found.prompt == expected["prompt"]
    assert found.chosen[start:] == expected["chosen"]
    assert found.rejected[start:] == expected["rejected"]


# Tools


CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


@pytest.mark.parametrize("as_text", [False, True])
def test_parse_row_reads_tools_and_template_variables(as_text):
    tools, variables = [TOOL], {"enable_thinking": False}
    values = (json.dumps(v) if as_text else v for v in (tools, variables))
    row = {**STRINGS, **dict(zip(("tools", "chat_template_kwargs"), values, strict=True))}
    preference, _ = parse_row(row, 1)
    assert (preference.tools, preference.chat_template_kwargs) == (tools, variables)


@pytest.mark.parametrize("empty", [None, "", [], {}])
def test_parse_row_takes_empty_tools_for_none(empty):
    assert parse_row({**STRINGS, "tools": empty, "chat_template_kwargs": empty}, 1)[0] == AS_STRINGS


@pytest.mark.parametrize("arguments", [{"x": 1}, '{"x": 1}'])
def test_parse_row_keeps_tool_calls_and_their_null_content(arguments):
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    result, expected = turn("tool", "2", name="f"), turn("assistant", None, tool_calls=[CALL])
    for calls in ([call], json.dumps([call])):
        calling = turn("assistant", None, tool_calls=calls)
        without_content = {"role": "assistant", "tool_calls": calls}
        for first in (calling, without_content):
            row = {"prompt": [USER], "chosen": [first, result, CHOSEN], "rejected": "r"}
            assert parse_row(row, 1)[0].chosen == [expected, result, CHOSEN]


def test_parse_row_keeps_further_text_of_messages():
    answer = [{**CHOSEN, "reasoning_content": "why", "tool_calls": None, "name": None}]
    preference, _ = parse_row({**STRINGS, "chosen": answer}, 1)
    assert preference.chosen == [{**CHOSEN, "reasoning_content": "why"}]


# What is refused


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            [1],
            "a row must be a JSON object, got a list; known are chosen, rejected, alone",
        ),
        ({"prompt": "p", "chosen": "c"}, "missing rejected; found prompt, chosen; known are"),
        (
            {"question": "p", "answer": "c"},
            "missing chosen, rejected; found question, answer; k",
        ),
        ({}, "missing prompt, chosen, rejected; found no keys"),
        ({f"k{i}": 1 for i in range(99)}, "k10, k11, ...; known are"),
        ({"prompt": "p", "completion": "c", "label": True}, "unpaired preferences"),
        ({"messages": [USER, CHOSEN], "label": False}, "KTO data: one answer a row, with a label"),
        ({"instruction": "u", "output": "c", "kto_tag": 1}, "join two rows of the same prompt"),
        ({"prompt": "u", "completion": "c", "label": "True"}, "(the answer whose label is true)"),
        ({"text": "u", "label": "sports"}, "missing prompt, chosen, rejected; found text, label"),
        (
            {"prompt": "u", "chosen": "c", "rejcted": "r"},
            "did you mean rejected by rejcted? then set columns {rejected: rejcted}",
        ),
        (
            {"prompt": "u", "chosen_response": "c", "rejected_response": "r"},
            "then set columns {chosen: chosen_response, rejected: rejected_response}",
        ),
        (STRINGS | {"prompt": 3}, "prompt must be a string or a list of messages, got a number"),
        (STRINGS | {"prompt": b"x"}, "prompt must be a string or a list of messages, got a value"),
        (STRINGS | {"chosen": None}, "missing chosen; found prompt, rejected; known are"),
        (STRINGS | {"chosen": "\ud800"}, "chosen holds half a character"),
        (STRINGS | {"images": ["a.png"]}, "the column images is not supported yet; remove it"),
        (STRINGS | {"history": [["a", "b"]]}, "the column history beside prompt is not supported"),
        (STRINGS | {"input": "i"}, "the column input beside prompt is not supported; put it"),
        (MESSAGES | {"instruction": "i"}, "the column instruction beside prompt is not"),
        (STRINGS | {"system": ["s"]}, "system must be a string, got a list"),
        (MESSAGES | {"prompt": []}, "prompt is an empty list"),
        (MESSAGES | {"prompt": ["u"]}, "prompt[0] must be a message, got a string"),
        (MESSAGES | {"prompt": [{"role": "user"}]}, "prompt[0] has no content (found role)"),
        (MESSAGES | {"prompt": [turn("robot", "u")]}, "prompt[0] has the role 'robot'; known"),
        (MESSAGES | {"prompt": [turn("x" * 10**6, "u")]}, "xxx...'; known"),
        (MESSAGES | {"prompt": [turn("user", [])]}, "prompt[0].content must be a string, got"),
        (MESSAGES | {"prompt": [turn("user", None)]}, "prompt[0].content must be a string, got"),
        (MESSAGES | {"chosen": [USER]}, "chosen begins with a user message; keep only the answer"),
        (MESSAGES | {"chosen": [turn("tool", "u")]}, "chosen must end with an assistant"),
        (SHAREGPT | {"system": "s", "conversations": [turn("system", "t")]}, "a system column and"),
        (WHOLE | {"system": "s", "chosen": [turn("system", "t"), USER, CHOSEN]}, "do not begin"),
        (SHAREGPT | {"system": 1}, "system must be a string, got a number"),
        (STRINGS | {"tools": "[1"}, "tools is text, but no JSON (Expecting"),
        (STRINGS | {"tools": [1]}, "tools must be a list of objects, got a list of other things"),
        (STRINGS | {"tools": {"a": 1}}, "tools must be a list of objects, got an object"),
        (STRINGS | {"tools": [{"a": "\ud800"}]}, "tools holds half a character"),
        (STRINGS | {"tools": [{"a": b"x"}]}, "tools holds something that is neither text"),
        (STRINGS | {"chat_template_kwargs": [1]}, "chat_template_kwargs must be an object"),
        (MESSAGES | {"chosen": [turn("assistant", "", tool_calls="f")]}, "chosen[0].tool_calls"),
        (WHOLE | {"prompt": "v"}, "the first user message of chosen is not the prompt"),
        (WHOLE | {"prompt": [turn("user", "v")]}, "chosen is a whole conversation that does not"),
        (WHOLE | {"prompt": [USER, CHOSEN]}, "chosen is a whole conversation that does not begin"),
        (WHOLE | {"rejected": [turn("user", "v"), REJECTED]}, "the same user message"),
        (WHOLE | {"rejected": [USER]}, "rejected must end with an assistant message"),
        (WHOLE | {"rejected": []}, "rejected is an empty list"),
        (WHOLE | {"rejected": "r"}, "rejected must be a list of messages like the other side"),
        (HH | {"rejected": "\n\nHuman: u"}, "rejected must end with an assistant message"),
        ({"chosen": "a", "rejected": "b"}, "do not begin with the same text"),
        ({"chosen": "", "rejected": "b"}, "do not begin with the same text"),
        ({"messages": [CHOSEN], "rejected_response": "r"}, "messages holds an answer alone"),
        (
            {"messages": [USER, CHOSEN], "rejected_messages": [turn("user", "v"), REJECTED]},
            "do not begin with the same user message",
        ),
        ({"messages": [USER], "rejected_response": "r"}, "messages must end with an assistant"),
        ({"input": "q", "chosen": "c", "rejected": "r", "history": "x"}, "history must be a list"),
        ({"question": "q", "chosen": "c", "rejected": "r", "history": [["a"]]}, "history must be"),
        ({"question": "q", "chosen": "c", "rejected": "r", "input": "i"}, "column input beside qu"),
    ],
)
def test_parse_row_refuses_a_bad_row_in_one_line(row, message):
    with pytest.raises(RowFault, match=re.escape(message)) as error:
        parse_row(row, 1)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


# One table


def test_every_format_shows_its_columns():
    for known in FORMATS:
        shown = set(re.findall(r'"(\w+)":', known.example))
        assert shown >= {part for name in known.columns for part in name.split(".")}, known.name
        assert all(re.search(rf"\b{name}\b", known_formats()) for name in known.columns)


def test_parse_row_prefers_the_first_format_that_fits():
    row = {**SHAREGPT, "prompt": "u", "question": "u"}
    assert parse_row(row, 1)[1].name == "ShareGPT ranking"
    assert {"prompt", "conversations", "system", "tools", "history"} <= set(COLUMNS)

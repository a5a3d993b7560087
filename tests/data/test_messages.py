import json
import re

import pytest

from lowmem_dpo.data.messages import Notes, read_messages, read_tools
from lowmem_dpo.data.rows import RowFault

CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TEXT_CALL = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
PARTS = "content that stands in parts is read as one text, part behind part"


def read(value, notes=None):
    return read_messages(value, "chosen", "assistant", notes or Notes())


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


# Turns that are tool calls and what tools answer


@pytest.mark.parametrize("role", ["function_call", "tool_call"])
@pytest.mark.parametrize(
    "content",
    [
        '{"name": "f", "arguments": {"x": 1}}',
        '{"name": "f", "arguments": "{\\"x\\": 1}"}',
        '{"name": "f", "parameters": {"x": 1}}',
        "{'name': 'f', 'arguments': {'x': 1}}",
        json.dumps([CALL]),
        {"name": "f", "arguments": {"x": 1}},
    ],
)
def test_read_messages_makes_turns_of_calls_tool_calls(role, content):
    expected = [turn("assistant", "", tool_calls=[CALL])]
    assert read([turn(role, content)]) == expected
    assert read({"from": role, "value": content}) == expected


@pytest.mark.parametrize("role", ["tool_response", "observation", "tool"])
def test_read_messages_makes_answers_of_tools_tool_turns(role):
    assert read([{"from": role, "value": '{"a": 1}'}]) == [turn("tool", '{"a": 1}')]


def test_read_messages_puts_calls_that_follow_into_one_turn():
    f, g = (json.dumps({"name": name, "arguments": {"x": 1}}) for name in "fg")
    called = CALL | {"function": CALL["function"] | {"name": "g"}}
    result = turn("tool", "1")
    calls = [turn("tool_call", f), turn("tool_call", g)]
    answers = [turn("tool_response", "1"), turn("tool_response", "1")]
    expected = [turn("assistant", "", tool_calls=[CALL, called]), result, result]
    assert read([*calls, *answers]) == expected
    expected[0]["content"] = "Let me see."
    assert read([turn("assistant", "Let me see."), *calls, *answers]) == expected
    assert len(read([turn("user", "u"), *calls])) == 2
    assert len(read([turn("assistant", "a"), turn("assistant", "b")])) == 2


@pytest.mark.parametrize("content", ["f(1)", "[]", "[1]", '{"arguments": {}}', 3, ""])
def test_read_messages_refuses_a_turn_that_is_no_call(content):
    message = "chosen[0].content must be a tool call: JSON with name and arguments"
    with pytest.raises(RowFault, match=re.escape(message)):
        read([turn("tool_call", content)])


# Tool calls of a message


@pytest.mark.parametrize(
    "more",
    [
        {"tool_calls": [CALL]},
        {"tool_calls": [TEXT_CALL]},
        {"tool_calls": json.dumps([TEXT_CALL])},
        {"function_call": TEXT_CALL["function"]},
    ],
)
def test_read_messages_reads_arguments_of_tool_calls(more):
    notes = Notes()
    assert read([turn("assistant", None, **more)], notes) == [
        turn("assistant", None, tool_calls=[CALL])
    ]
    assert notes == Notes()


def test_read_messages_keeps_what_else_a_call_has():
    call = TEXT_CALL | {"id": "c0"}
    assert read([turn("assistant", "", tool_calls=[call])])[0]["tool_calls"] == [
        CALL | {"id": "c0"}
    ]
    bare = {"name": "f", "arguments": '{"x": 1}'}
    assert read([turn("assistant", "", tool_calls=[bare])])[0]["tool_calls"] == [CALL["function"]]
    empty = {"function": {"name": "f", "arguments": " "}}
    assert read([turn("assistant", "", tool_calls=[empty])])[0]["tool_calls"] == [
        {"function": {"name": "f", "arguments": {}}}
    ]


@pytest.mark.parametrize("arguments", ["{broken", "[1]", "5", "x"])
def test_read_messages_keeps_arguments_that_are_no_object_and_says_so(arguments):
    call, notes = {"function": {"name": "f", "arguments": arguments}}, Notes()
    assert read([turn("assistant", "", tool_calls=[call])], notes)[0]["tool_calls"] == [call]
    assert notes.lines() == ["arguments of tool calls that hold no JSON object stay text"]


def test_read_tools_reads_text_of_all_or_of_each():
    for value in ([CALL], json.dumps([CALL]), [json.dumps(CALL)], str([CALL])):
        assert read_tools(value) == [CALL]
    with pytest.raises(RowFault, match=r"tools\[0\] is text, but no JSON"):
        read_tools(["f"])


# Content and further keys


def test_read_messages_joins_parts_of_text():
    notes = Notes()
    parts = [{"type": "text", "text": "Hi "}, {"text": "there"}, "!"]
    assert read([turn("user", parts)], notes) == [turn("user", "Hi there!")]
    assert read([turn("user", [{"type": "input_text", "text": "a"}])]) == [turn("user", "a")]
    assert notes.lines() == [PARTS]


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "image", "text": ""}, "chosen[0].content[1] is of type image; only parts with"),
        ({"type": "text"}, "chosen[0].content[1] is of type text; only parts with text"),
        ({"type": ["x"], "text": "a"}, "chosen[0].content[1] is of type ['x']; only"),
        ({"type": "text", "text": 3}, "chosen[0].content[1] must be a string, got a number"),
        (None, "chosen[0].content[1] must be a string, got null"),
    ],
)
def test_read_messages_refuses_parts_that_are_no_text(part, message):
    with pytest.raises(RowFault, match=re.escape(message)):
        read([turn("user", ["a", part])])


def test_read_messages_leaves_out_and_names_keys_that_hold_no_text():
    notes = Notes()
    message = turn("assistant", "c", weight=1, train=False, meta={"a": 1}, seen=[1], name="n")
    empty = {"images": [], "note": None, "tool_calls": [], "extra": {}}
    assert read([message | empty, message], notes) == [turn("assistant", "c", name="n")] * 2
    assert notes.lines() == [
        "keys of messages not used: weight (a number), train (a boolean), meta (an object), "
        "seen (a list)"
    ]
    with pytest.raises(RowFault, match=r"chosen\[0\]\.images is not supported yet; remove it"):
        read([turn("user", "u", images=["a.png"])])

import json
import re

import pytest

from lowmem_dpo.data.columns import columns_of_messages, decode_messages, open_columns
from lowmem_dpo.data.messages import Notes
from lowmem_dpo.data.reading import read_preferences
from lowmem_dpo.data.rows import RowFault

USER, ANSWER = {"role": "user", "content": "u"}, {"role": "assistant", "content": "c"}
ROW = {"prompt": "p", "chosen": "c", "rejected": "r"}


def write(tmp_path, *rows):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


# Paths


@pytest.mark.parametrize(
    ("row", "path", "expected"),
    [
        ({"a": {"b": 1, "c": 2}, "d": 3}, "a.b", {"d": 3, "a.b": 1, "a.c": 2}),
        ({"a": {"b": {"c": 1}}}, "a.b.c", {"a.b.c": 1}),
        ({"a": [{"b": 1}, 2]}, "a.0.b", {"a.0.b": 1, "a.1": 2}),
        ({"a": '{"b": 1}'}, "a.b", {"a.b": 1}),
        ({"a.b": 1, "a": {"b": 2}}, "a.b", {"a.b": 1, "a": {"b": 2}}),
        ({"a.b": {"c": 1}}, "a.b.c", {"a.b.c": 1}),
        ({"a": "text"}, "a.b", {"a": "text"}),
        ({"input": {"a": 1}}, "x", {"input": {"a": 1}}),
        ({"input": {"messages": []}}, "x", {"input.messages": []}),
    ],
)
def test_open_columns_takes_apart_the_objects_on_a_path(row, path, expected):
    assert open_columns(row, {"prompt": path}) == expected


def test_read_preferences_takes_columns_within_objects(tmp_path):
    row = {"in": {"q": "p", "lang": "en"}, "out": [{"text": "c"}, {"text": "r"}]}
    columns = {"prompt": "in.q", "chosen": "out.0.text", "rejected": "out.1.text"}
    preferences, report = read_preferences(write(tmp_path, row), columns=columns)
    assert (preferences[0].prompt, preferences[0].chosen, preferences[0].rejected) == tuple("pcr")
    assert report.unused == ["in.lang"]
    message = "no column in.other, which columns gives for prompt; found out, in.q, in.lang"
    with pytest.raises(ValueError, match=re.escape(message)):
        read_preferences(write(tmp_path, row), columns={"prompt": "in.other"})
    with pytest.raises(ValueError, match=r"no column in\.lung \(did you mean in\.lang\?\), which"):
        read_preferences(write(tmp_path, row), columns={"prompt": "in.lung"})


# Messages as text


@pytest.mark.parametrize(("dump", "notation"), [(json.dumps, "JSON"), (str, "Python")])
def test_read_preferences_reads_messages_that_stand_as_text(tmp_path, dump, notation):
    row = {"prompt": dump([USER]), "chosen": dump([ANSWER]), "rejected": dump(ANSWER)}
    preferences, report = read_preferences(write(tmp_path, row, row))
    assert (preferences[1].prompt, preferences[1].rejected) == ([USER], [ANSWER])
    said = f"prompt, chosen, rejected: {notation} text of messages, read as messages"
    assert report.lines() == ["2 pairs, message lists", said]


def test_columns_of_messages_goes_by_half_of_the_rows():
    text, plain = {"chosen": json.dumps([ANSWER])}, {"chosen": "c"}
    assert columns_of_messages([text]) == {"chosen"}
    assert columns_of_messages([text, plain]) == {"chosen"}
    assert columns_of_messages([text, {"chosen": [ANSWER]}, {"chosen": None}]) == {"chosen"}
    assert columns_of_messages([text, plain, plain]) == frozenset()
    assert columns_of_messages([plain, {"chosen": [ANSWER]}]) == frozenset()
    assert columns_of_messages([{"note": json.dumps([ANSWER])}]) == frozenset()


def test_decode_messages_keeps_the_odd_answer_that_is_json_and_counts_it():
    row, notes = ROW | {"chosen": json.dumps([ANSWER]), "rejected": '[{"a": 1}]'}, Notes()
    assert decode_messages(row, frozenset(), notes) == row
    assert notes.lines() == [
        "chosen: 1 texts look like messages and stay text, as most there are plain text"
    ]


def test_decode_messages_refuses_text_that_it_cannot_read():
    with pytest.raises(RowFault, match="chosen is text that begins like messages, but no JSON"):
        decode_messages({"chosen": '[{"role": "user", '}, frozenset({"chosen"}), Notes())


def test_decode_messages_turns_lists_of_roles_and_contents_into_messages():
    lists = {"role": ["user", "assistant"], "content": ["u", "c"]}
    row = decode_messages({"chosen": lists}, frozenset(), Notes())
    assert row == {"chosen": [USER, ANSWER]}
    uneven = {"chosen": lists | {"content": ["u"]}}
    assert decode_messages(uneven, frozenset(), Notes()) == uneven


def test_read_preferences_reads_json_text_in_a_column_that_was_named(tmp_path):
    row = {"q": json.dumps([USER]), "chosen": "c", "rejected": "r"}
    preferences, _ = read_preferences(write(tmp_path, row), columns={"prompt": "q"})
    assert preferences[0].prompt == [USER]


# Names that are not read


@pytest.mark.parametrize(
    ("theirs", "ours"), [("sytem", "system"), ("system_prompt", "system"), ("tool", "tools")]
)
def test_read_preferences_says_what_an_unused_column_may_be_meant_by(tmp_path, theirs, ours):
    _, report = read_preferences(write(tmp_path, ROW | {theirs: "s", "score": 1, "prompt_id": "x"}))
    assert report.unused == [theirs, "score", "prompt_id"]
    said = f"{theirs} is not used: did you mean {ours}? then set columns {{{ours}: {theirs}}}"
    assert report.lines()[1:] == [said]


def test_read_preferences_has_no_hint_for_what_is_there_or_no_text(tmp_path):
    row = ROW | {"system": "s", "system_prompt": "t", "my_tools": 3, "prompts": "p"}
    assert len(read_preferences(write(tmp_path, row))[1].lines()) == 1

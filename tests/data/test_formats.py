import json
import re

import pytest

from lowmem_dpo.data.formats import Preference, read_preferences

STRING_ROW = {"prompt": "p", "chosen": "c", "rejected": "r"}


def write(tmp_path, rows, name="pairs.jsonl"):
    path = tmp_path / name
    text = json.dumps(rows) if name.endswith(".json") else "\n".join(map(json.dumps, rows))
    path.write_text(text, encoding="utf-8")
    return path


def turn(role, content):
    return {"role": role, "content": content}


def test_read_preferences_reads_strings(tmp_path):
    path = write(tmp_path, [STRING_ROW, {**STRING_ROW, "prompt": "q"}])
    preferences, name = read_preferences(path)
    assert preferences == [Preference("p", "c", "r", 1), Preference("q", "c", "r", 2)]
    assert name == "prompt/chosen/rejected strings"


def test_read_preferences_counts_lines_in_jsonl_and_rows_in_json(tmp_path):
    lines = tmp_path / "a.jsonl"
    lines.write_text(f"\n{json.dumps(STRING_ROW)}\r\n\n{json.dumps(STRING_ROW)}\n", newline="")
    assert [p.row for p in read_preferences(lines)[0]] == [2, 4]
    listed = write(tmp_path, [STRING_ROW, STRING_ROW], "b.json")
    assert [p.row for p in read_preferences(listed)[0]] == [1, 2]


def test_read_preferences_reads_json_lines_in_a_json_file(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(f"{json.dumps(STRING_ROW)}\n{json.dumps(STRING_ROW)}\n")
    assert [p.row for p in read_preferences(str(path))[0]] == [1, 2]


def test_read_preferences_accepts_a_byte_order_mark_and_odd_line_separators(tmp_path):
    row = {**STRING_ROW, "prompt": "one\u2028two\u0085three äß語"}
    for name, text in (("a.jsonl", json.dumps(row, ensure_ascii=False)), ("a.json", None)):
        path = tmp_path / name
        path.write_text(text or json.dumps([row], ensure_ascii=False), encoding="utf-8-sig")
        assert read_preferences(path)[0][0].prompt == row["prompt"]


def test_read_preferences_reads_message_lists_and_mixtures(tmp_path):
    rows = [
        {
            "prompt": [turn("system", "s"), turn("user", "u")],
            "chosen": [turn("assistant", "c")],
            "rejected": [turn("assistant", "r")],
        },
        {"prompt": [turn("user", "u")], "chosen": "c", "rejected": turn("assistant", "r")},
        {"prompt": "u", "chosen": [{"from": "gpt", "value": "c"}], "rejected": "r"},
    ]
    preferences, name = read_preferences(write(tmp_path, rows))
    assert name == "message lists"
    assert [p.prompt[-1] for p in preferences] == [turn("user", "u")] * 3
    assert [p.chosen for p in preferences] == [[turn("assistant", "c")]] * 3
    assert [p.rejected for p in preferences] == [[turn("assistant", "r")]] * 3


def test_read_preferences_reads_sharegpt_ranking(tmp_path):
    row = {
        "system": "s",
        "conversations": [
            {"from": "human", "value": "u"},
            {"from": "gpt", "value": "a"},
            {"from": "observation", "value": "o"},
        ],
        "chosen": {"from": "gpt", "value": "c"},
        "rejected": "r",
    }
    preferences, name = read_preferences(write(tmp_path, [row], "a.json"))
    assert name == "ShareGPT ranking"
    prompt = [turn("system", "s"), turn("user", "u"), turn("assistant", "a"), turn("tool", "o")]
    assert preferences == [
        Preference(prompt, [turn("assistant", "c")], [turn("assistant", "r")], 1)
    ]


def test_read_preferences_keeps_the_system_column_of_strings(tmp_path):
    rows = [STRING_ROW | {"system": "s"}, STRING_ROW | {"system": " "}, STRING_ROW]
    preferences, name = read_preferences(write(tmp_path, rows))
    assert [p.system for p in preferences] == ["s", "", ""]
    assert [(p.prompt, p.chosen, p.rejected) for p in preferences] == [("p", "c", "r")] * 3
    assert name == "prompt/chosen/rejected strings"


def test_read_preferences_puts_the_system_column_before_messages(tmp_path):
    row = {"system": "s", "prompt": [turn("user", "u")], "chosen": "c", "rejected": "r"}
    preferences, name = read_preferences(write(tmp_path, [row]))
    assert preferences[0].prompt == [turn("system", "s"), turn("user", "u")]
    assert (preferences[0].system, name) == ("", "message lists")


def test_read_preferences_names_the_columns_it_does_not_use(tmp_path):
    rows = [
        STRING_ROW | {"score": 0, "history": [], "note": None},
        STRING_ROW | {"source\n\ud800": "a", "score": 2, "system": "s", "tools": ""},
        STRING_ROW,
    ]
    preferences, name = read_preferences(write(tmp_path, rows))
    assert len(preferences) == 3
    expected = "prompt/chosen/rejected strings (columns not used: score, source \\ud800)"
    assert name == expected
    row = {"conversations": [turn("user", "u")], "chosen": "c", "rejected": "r", "prompt": "q"}
    _, name = read_preferences(write(tmp_path, [row]))
    assert name == "ShareGPT ranking (columns not used: prompt)"


def test_read_preferences_keeps_further_text_of_messages(tmp_path):
    answer = [turn("assistant", "c") | {"reasoning_content": "why", "tool_calls": None}]
    path = write(tmp_path, [{"prompt": "p", "chosen": answer, "rejected": "r"}])
    expected = [{"role": "assistant", "content": "c", "reasoning_content": "why"}]
    assert read_preferences(path)[0][0].chosen == expected


MESSAGES_ROW = {"prompt": [turn("user", "u")], "chosen": "c", "rejected": "r"}
SHAREGPT_ROW = {"conversations": [{"from": "human", "value": "u"}], "chosen": "c", "rejected": "r"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1], "a row must be a JSON object, got a list; known are"),
        ({"prompt": "p", "chosen": "c"}, "missing rejected; found prompt, chosen; known are"),
        ({"question": "p", "chosen": "c", "rejected": "r"}, "missing prompt; found question"),
        ({}, "missing prompt, chosen, rejected; found no keys"),
        ({"chosen": "c", "rejected": "r"}, "(implicit prompt) is not supported yet; convert"),
        ({"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: b"}, "Anthropic HH"),
        ({"prompt": "p", "completion": "c", "label": True}, "unpaired preferences"),
        (STRING_ROW | {"prompt": 3}, "prompt must be a string or a list of messages, got a number"),
        (STRING_ROW | {"chosen": None}, "chosen must be a string or a list of messages, got null"),
        (STRING_ROW | {"chosen": "\ud800"}, "chosen holds half a character"),
        (STRING_ROW | {"tools": [1]}, "the column tools is not supported yet; remove it"),
        (STRING_ROW | {"history": [["a", "b"]]}, "the column history beside prompt is not supp"),
        (STRING_ROW | {"input": "i"}, "the column input beside prompt is not supported yet; put"),
        (MESSAGES_ROW | {"instruction": "i"}, "the column instruction beside prompt is not"),
        (STRING_ROW | {"system": ["s"]}, "system must be a string, got a list"),
        (MESSAGES_ROW | {"prompt": []}, "prompt is an empty list"),
        (MESSAGES_ROW | {"prompt": ["u"]}, "prompt[0] must be a message, got a string"),
        (MESSAGES_ROW | {"prompt": [{"role": "user"}]}, "prompt[0] has no content (found role)"),
        (MESSAGES_ROW | {"prompt": [turn("robot", "u")]}, "prompt[0] has the role 'robot'; known"),
        (MESSAGES_ROW | {"prompt": [turn("user", [])]}, "prompt[0].content must be a string, got"),
        (MESSAGES_ROW | {"chosen": [turn("assistant", "c") | {"weight": 1}]}, "chosen[0].weight"),
        (MESSAGES_ROW | {"chosen": [turn("user", "u")]}, "UltraFeedback"),
        (MESSAGES_ROW | {"chosen": [turn("tool", "u")]}, "chosen must end with an assistant"),
        (
            SHAREGPT_ROW | {"system": "s", "conversations": [{"from": "system", "value": "t"}]},
            "a system column and a system message",
        ),
        (SHAREGPT_ROW | {"system": 1}, "system must be a string, got a number"),
    ],
)
def test_read_preferences_refuses_a_bad_row_in_one_line_with_its_place(tmp_path, row, message):
    good = MESSAGES_ROW if "conversations" not in row else SHAREGPT_ROW
    for name, place in (("a.jsonl", "line 2"), ("a.json", "row 2")):
        path = write(tmp_path, [good, row], name)
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            read_preferences(path)
        assert str(error.value).startswith(f"{path}, {place}: ")
        assert "\n" not in str(error.value)


def test_read_preferences_refuses_a_change_of_format(tmp_path):
    path = write(tmp_path, [STRING_ROW, MESSAGES_ROW])
    with pytest.raises(ValueError, match=r"line 2: this row is message lists, .* strings .*line 1"):
        read_preferences(path)


def test_read_preferences_names_the_line_of_broken_json(tmp_path):
    lines = tmp_path / "a.jsonl"
    lines.write_text(json.dumps(STRING_ROW) + '\n{"prompt": \n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: broken JSON"):
        read_preferences(lines)
    listed = tmp_path / "a.json"
    listed.write_text('[\n{"prompt": "p",}\n]')
    with pytest.raises(ValueError, match=r"a\.json, line 2: broken JSON"):
        read_preferences(listed)
    listed.write_text(json.dumps(STRING_ROW) + "\n{oops}")
    with pytest.raises(ValueError, match=r"a\.json, line 2: broken JSON"):
        read_preferences(listed)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[" * 100_000 + "]" * 100_000, "lists or objects nested too deeply"),
        ("1" * 5000, "a number with too many digits"),
    ],
)
def test_read_preferences_names_the_row_that_python_cannot_read(tmp_path, value, message):
    good = json.dumps(STRING_ROW)
    bad = f'{good[:-1]}, "score": {value}}}'
    lines, listed = tmp_path / "a.jsonl", tmp_path / "a.json"
    for text, path, place in (
        (f"{good}\n\n{bad}\n", lines, "line 3"),
        (f" [\n{good},\n{good}, {bad}\n]", listed, "row 3"),
        (f"{good}\n{bad}", listed, "line 2"),
        (bad, listed, "row 1"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message) as error:
            read_preferences(path)
        assert str(error.value).startswith(f"{path}, {place}: ")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_read_preferences_refuses_what_is_not_utf8_or_empty(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(json.dumps(STRING_ROW).encode() + b"\n\xff\xfe")
    with pytest.raises(ValueError, match="not valid UTF-8"):
        read_preferences(path)
    path.write_bytes(b" \n\n")
    with pytest.raises(ValueError, match="holds no rows"):
        read_preferences(path)


def test_read_preferences_refuses_other_sources_by_name(tmp_path):
    for name in ("a.parquet", "a.csv", "a.jsonl.gz", "a"):
        (tmp_path / name).write_text("x")
        with pytest.raises(ValueError, match=r"not supported yet; convert to \.jsonl"):
            read_preferences(tmp_path / name)
    with pytest.raises(ValueError, match="Hugging Face dataset ids are not supported yet"):
        read_preferences("trl-lib/ultrafeedback_binarized")
    with pytest.raises(ValueError, match="no such file"):
        read_preferences(tmp_path / "missing.jsonl")
    with pytest.raises(ValueError, match="is a folder"):
        read_preferences(tmp_path)

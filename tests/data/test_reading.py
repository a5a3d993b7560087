import json
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lowmem_dpo.data.messages import ROLES
from lowmem_dpo.data.reading import is_single_file, open_source, read_preferences

ROW = {"prompt": "p", "chosen": "c", "rejected": "r"}
MESSAGES = {"prompt": [{"role": "user", "content": "u"}], "chosen": "c", "rejected": "r"}


def write(tmp_path, rows, name="pairs.jsonl"):
    path = tmp_path / name
    text = json.dumps(rows) if name.endswith(".json") else "\n".join(map(json.dumps, rows))
    path.write_text(text, encoding="utf-8")
    return path


def test_read_preferences_says_what_the_file_holds(tmp_path):
    rows = [
        ROW | {"score": 0, "history": [], "note": None},
        ROW | {"source\n\ud800": "a", "score": 2, "system": "s", "tools": ""},
        ROW,
    ]
    preferences, report = read_preferences(write(tmp_path, rows))
    assert [p.row for p in preferences] == [1, 2, 3]
    expected = "3 pairs, prompt/chosen/rejected strings (columns not used: score, source \\ud800)"
    assert report.lines() == [expected]
    row = {"conversations": MESSAGES["prompt"], **ROW, "prompt": "u"}
    assert read_preferences(write(tmp_path, [row]))[1].unused == ["prompt"]


@pytest.mark.parametrize(("name", "place"), [("a.jsonl", "line 2"), ("a.json", "row 2")])
def test_read_preferences_names_file_and_row_of_a_fault(tmp_path, name, place):
    path = write(tmp_path, [ROW, ROW | {"chosen": 1}], name)
    with pytest.raises(ValueError, match="chosen must be a string") as error:
        read_preferences(path)
    assert str(error.value).startswith(f"{path}, {place}: chosen must be")
    assert "(on_bad_row skip leaves bad rows out)" in str(error.value)


def test_read_preferences_refuses_a_change_of_format(tmp_path):
    path = write(tmp_path, [ROW, MESSAGES])
    with pytest.raises(ValueError, match=r"line 2: this row is message lists, .* strings .*line 1"):
        read_preferences(path)


def test_read_preferences_refuses_what_holds_no_rows(tmp_path):
    for name in ("a.jsonl", "a.json", "a.csv"):
        path = tmp_path / name
        path.write_bytes(b" \n\n" if name != "a.csv" else b"prompt,chosen\n")
        with pytest.raises(ValueError, match="holds no rows, it is empty; known are"):
            read_preferences(path)


# on_bad_row


def test_read_preferences_skips_counts_and_shows_bad_rows(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [ROW, {"prompt": "p"}, "{", ROW | {"chosen": 1}, MESSAGES, ROW | {"prompt": "q"}]
    path.write_text("\n".join(x if x == "{" else json.dumps(x) for x in lines))
    preferences, report = read_preferences(path, on_bad_row="skip")
    assert [(p.row, p.prompt) for p in preferences] == [(1, "p"), (6, "q")]
    lines = report.lines()
    assert lines[:2] == [
        "2 pairs, prompt/chosen/rejected strings",
        "4 of 6 rows are bad and left out, as set",
    ]
    assert [line.partition(":")[0] for line in lines[2:5]] == [
        f"{path}, line {n}" for n in (2, 3, 4)
    ]
    assert lines[5:] == ["... and 1 more"]


def test_read_preferences_takes_the_format_of_the_first_good_row(tmp_path):
    path = write(tmp_path, [{"prompt": "p"}, MESSAGES, MESSAGES])
    preferences, report = read_preferences(path, on_bad_row="skip")
    assert (len(preferences), report.format) == (2, "message lists")


IMPLICIT = {"chosen": "How? x", "rejected": "How? y z"}


@pytest.mark.parametrize("odd", [IMPLICIT, IMPLICIT | {"prompt": None}])
def test_read_preferences_holds_all_rows_to_the_format_that_most_have(tmp_path, odd):
    path = write(tmp_path, [odd, *[ROW] * 10])
    preferences, report = read_preferences(path, on_bad_row="skip")
    assert (len(preferences), report.num_skipped) == (10, 1)
    assert report.format == "prompt/chosen/rejected strings"
    message = (
        r"line 1: .* implicit prompt, strings.*, but others are prompt/.* strings \(.*line 2\)"
    )
    with pytest.raises(ValueError, match=message) as error:
        read_preferences(path)
    assert ("its prompt is null" in str(error.value)) == ("prompt" in odd)


def test_read_preferences_takes_a_null_prompt_for_none_unless_all_are(tmp_path):
    null = IMPLICIT | {"prompt": None}
    preferences, _ = read_preferences(write(tmp_path, [null, null, ROW]), on_bad_row="skip")
    assert [p.row for p in preferences] == [3]
    preferences, report = read_preferences(write(tmp_path, [null, null]))
    assert (len(preferences), report.format) == (2, "implicit prompt, strings")


def test_read_preferences_does_not_skip_every_row_nor_half_a_file(tmp_path):
    path = write(tmp_path, [{"a": 1}, {"b": 2}])
    with pytest.raises(ValueError, match=r"every one of the 2 rows is bad; .*line 1: missing"):
        read_preferences(path, on_bad_row="skip")
    path = tmp_path / "a.json"
    path.write_text(f"[{json.dumps(ROW)}, ")
    with pytest.raises(ValueError, match="broken JSON"):
        read_preferences(path, on_bad_row="skip")


# columns


def test_read_preferences_maps_columns(tmp_path):
    rows = [{"q": "p", "good": "c", "bad": "r", "prompt": "other", "chosen": "", "tag": 1}]
    columns = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    preferences, report = read_preferences(write(tmp_path, rows), columns=columns)
    assert (preferences[0].prompt, preferences[0].chosen, preferences[0].rejected) == tuple("pcr")
    assert report.unused == ["prompt", "tag"]


def test_read_preferences_lets_columns_choose_among_prompts(tmp_path):
    rows = [ROW | {"conversations": [{"role": "user", "content": "u"}], "input": "i"}]
    path = write(tmp_path, rows)
    with pytest.raises(ValueError, match=r"set columns \{conversations: conversations\}"):
        read_preferences(path)
    for name, prompt in (("prompt", "p"), ("input", "i")):
        preferences, report = read_preferences(path, columns={name: name})
        assert preferences[0].prompt == prompt
        assert set(report.unused) == {"conversations", "input", "prompt"} - {name}


def test_read_preferences_swaps_columns_that_were_named_the_wrong_way_round(tmp_path):
    columns = {"chosen": "rejected", "rejected": "chosen"}
    preferences, _ = read_preferences(write(tmp_path, [ROW]), columns=columns)
    assert (preferences[0].chosen, preferences[0].rejected) == ("r", "c")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"answer": "chosen"}, "columns names answer, which no format reads; known are"),
        ({"prompt": "q"}, "line 1: no column q, which columns gives for prompt; found prompt, cho"),
    ],
)
def test_read_preferences_refuses_columns_that_are_not_there(tmp_path, columns, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_preferences(write(tmp_path, [ROW]), columns=columns)


def test_read_preferences_refuses_a_split_of_a_single_file(tmp_path):
    path = write(tmp_path, [ROW])
    for purpose in ("train", "test"):
        with pytest.raises(ValueError, match=f"dataset_{purpose}_split=x has no effect on the fil"):
            open_source(path, split="x", purpose=purpose)


def test_is_single_file_goes_by_suffix_and_folder(tmp_path):
    folder = tmp_path / "a.json"
    folder.mkdir()
    assert is_single_file("x/y.CSV") and is_single_file("missing.parquet")
    assert not is_single_file(folder) and not is_single_file("owner/name")


# Any rows


TEXT = st.text(max_size=6) | st.sampled_from(["\n\nHuman: a\n\nAssistant: b", "Is it? yes", "[{"])
ROLE = st.sampled_from([*ROLES, "robot", ""])
MESSAGE = st.fixed_dictionaries(
    {"role": ROLE, "content": TEXT | st.none()},
    optional={"tool_calls": st.just([{"type": "function"}]), "name": TEXT | st.integers()},
) | st.fixed_dictionaries({"from": ROLE, "value": TEXT})
JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | TEXT
    | st.characters(categories=["Cs"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
VALUE = st.one_of(TEXT, st.lists(MESSAGE, max_size=4), MESSAGE, JUNK)
NAMES = "chosen rejected prompt conversations messages rejected_response instruction input question"
NAMES += " history system tools chat_template_kwargs images other"
CONVERSATION = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": TEXT}),
    min_size=1,
    max_size=4,
)
SIDES = st.fixed_dictionaries(
    {"chosen": VALUE, "rejected": VALUE}, optional=dict.fromkeys(NAMES.split()[2:], VALUE)
) | st.fixed_dictionaries(
    {"chosen": CONVERSATION, "rejected": CONVERSATION}, optional={"prompt": CONVERSATION | TEXT}
)
VALID = [
    ROW,
    MESSAGES,
    {"conversations": MESSAGES["prompt"], "chosen": "c", "rejected": "r"},
    {"instruction": "i", "input": "j", "chosen": "c", "rejected": "r"},
    {"messages": [*MESSAGES["prompt"], {"from": "gpt", "value": "c"}], "rejected_response": "r"},
    {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
    {"chosen": "Is it? yes", "rejected": "Is it? no"},
]
MUTATED = st.builds(
    lambda row, name, value: row | {name: value},
    st.sampled_from(VALID),
    st.sampled_from(NAMES.split()),
    VALUE | st.sampled_from([[], "", " ", "\ud800", 0, {}, [{"role": "assistant"}]]),
)


def check_invariants(preference):
    """What `rendering` relies on."""
    sides = (preference.prompt, preference.chosen, preference.rejected)
    kinds = {type(side) for side in sides}
    assert kinds == {str} or kinds == {list}
    for side in sides if kinds == {list} else ():
        assert side and all(message["role"] in ROLES.values() for message in side)
        assert all(isinstance(m["content"], str) or m["tool_calls"] for m in side)
    if kinds == {list}:
        assert preference.chosen[-1]["role"] == preference.rejected[-1]["role"] == "assistant"
        assert not preference.system
    json.dumps([*sides, preference.system, preference.tools, preference.chat_template_kwargs])
    for side in sides:
        json.dumps(side, ensure_ascii=False).encode("utf-8")


@given(
    st.lists(MUTATED, min_size=1, max_size=2) | st.lists(JUNK | SIDES, min_size=1, max_size=3),
    st.sampled_from(["a.jsonl", "a.json"]),
)
@example([ROW | {"prompt": "\ud800"}], "a.json")
def test_read_preferences_reads_or_refuses_any_rows(tmp_path_factory, rows, name):
    path = write(tmp_path_factory.getbasetemp(), rows, name)
    for on_bad_row in ("error", "skip"):
        try:
            preferences, report = read_preferences(path, on_bad_row=on_bad_row)
        except ValueError as error:
            assert re.match(rf"{path}(, (line|row) [123]|: every one of the)", str(error))
            assert "\n" not in str(error)
            continue
        assert len(preferences) == report.num_rows - report.num_skipped
        assert "\n" not in "".join(report.lines())
        for preference in preferences:
            check_invariants(preference)

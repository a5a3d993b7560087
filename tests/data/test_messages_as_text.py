import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowmem_dpo.data.messages import looks_like_messages, value_of_text

MESSAGES = [{"role": "user", "content": 'it\'s "so"\n'}, {"role": "assistant", "content": None}]


@pytest.mark.parametrize(
    "value",
    [
        json.dumps(MESSAGES),
        json.dumps(MESSAGES, indent=1),
        str(MESSAGES),
        str(MESSAGES[0]),
        '[{"content": "x", "role": "user"}]',
        '{"from": "human", "value": "x"}',
        "array([{'content': 'x', 'role': 'user'}], dtype=object)",
    ],
)
def test_looks_like_messages_is_true_of_messages_as_text(value):
    assert looks_like_messages(value)


@pytest.mark.parametrize(
    "value",
    [
        MESSAGES,
        None,
        "",
        "[see below]",
        '["a", "b"]',
        '[{"a": 1}]',
        '[{"name": "Bob", "role": "manager", "content": "x"}]',
        'Write [{"role": "user"}] for me',
        json.dumps([{"text": json.dumps(MESSAGES)}]),
    ],
)
def test_looks_like_messages_is_false_of_other_values(value):
    assert not looks_like_messages(value)


def test_value_of_text_reads_json_and_python():
    assert value_of_text(json.dumps(MESSAGES)) == (MESSAGES, "JSON")
    assert value_of_text(str(MESSAGES)) == (MESSAGES, "Python")
    assert value_of_text("[('a', True, None, 1.5)]") == ([["a", True, None, 1.5]], "Python")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1", "no JSON (Expecting"),
        ("hello", "no JSON (Expecting value)"),
        ("[" * 10**5, "no JSON (too deep or too long)"),
        ("['a'" + "[" * 10**4, "neither JSON nor a Python list or dict; write"),
        ("[{'a': 1}\n {'b': 2}]", "(NumPy prints arrays without commas); write it with json.dumps"),
        ("[{'a': open('x')}]", "neither JSON nor a Python list or dict; write"),
        ("[{'a': {'b', 'c'}}]", "neither JSON nor"),
        ("[{'a': b'c'}]", "neither JSON nor"),
        ("['\0']", "neither JSON nor"),
    ],
)
def test_value_of_text_refuses_other_text_and_evaluates_nothing(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        value_of_text(text)


PLAIN = st.none() | st.booleans() | st.integers() | st.text(max_size=5)
VALUES = st.recursive(
    PLAIN, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=3), x, max_size=3)
)


@given(st.dictionaries(st.text(max_size=3), VALUES, min_size=1, max_size=3))
def test_value_of_text_gives_back_what_json_and_python_wrote(value):
    assert value_of_text(json.dumps(value))[0] == value
    assert value_of_text(str(value))[0] == value


@given(st.sampled_from(["", "[", "{'", "[{'role': 'user'", '[{"']), st.text(max_size=20))
def test_value_of_text_reads_or_refuses_any_text(opening, text):
    try:
        json.dumps(value_of_text(opening + text)[0])
    except ValueError as error:
        assert "\n" not in str(error)

import io

import pytest
from rich.console import Console

from lowmem_dpo.tokens.report import preview_pair
from lowmem_dpo.tokens.trees import TokenPair


@pytest.fixture
def pair_of(build_tokenizer):
    tokenizer = build_tokenizer()

    def make(prompt, chosen, rejected):
        ids = [tuple(tokenizer(text)["input_ids"]) for text in (prompt, chosen, rejected)]
        start = len(ids[0])
        return TokenPair(7, ids[0] + ids[1], ids[0] + ids[2], start, start), tokenizer

    return make


def test_preview_pair_marks_scored_tokens_and_shows_special_ones(pair_of):
    text = preview_pair(*pair_of("<s>hi ", "yes</s>", "no</s>"))
    assert text.plain == (
        "chosen (row 7, 4 of 8 tokens scored)\n<s>hi [[yes</s>]]\n"
        "rejected (row 7, 3 of 7 tokens scored)\n<s>hi [[no</s>]]\n"
    )


def test_preview_pair_dims_the_prompt_and_colours_the_answers(pair_of):
    text = preview_pair(*pair_of("hi ", "yes", "no"))
    styled = [(str(span.style), text.plain[span.start : span.end]) for span in text.spans]
    assert styled == [
        ("dim", "hi "),
        ("green", "[[yes]]\n"),
        ("dim", "hi "),
        ("red", "[[no]]\n"),
    ]


def test_preview_pair_leaves_out_the_middle_of_long_parts(pair_of):
    pair, tokenizer = pair_of("0" * 48 + "1" * 49, "k" * 48 + "-" * 9 + "l" * 48, "s" * 96)
    prompt, chosen = "0" * 48 + " [...] " + "1" * 48, "k" * 48 + " [...] " + "l" * 48
    text = preview_pair(pair, tokenizer).plain
    assert f"\n{prompt}[[{chosen}]]\n" in text
    assert f"\n{prompt}[[{'s' * 96}]]\n" in text


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_preview_pair_survives_a_narrow_terminal(pair_of, encoding):
    text = preview_pair(*pair_of("語", "ja", "nein"), encoding=encoding)
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    Console(file=file).print(text)
    assert "\\u8a9e[[ja]]" in text.plain


def test_preview_pair_escapes_control_codes_and_markup(pair_of):
    text = preview_pair(*pair_of("a\x1b[31m\tb\n", "[bold]c", "\x9bd"))
    assert "a\\x1b[31m\tb\n[[[bold]c]]" in text.plain
    assert "[[\\x9bd]]" in text.plain

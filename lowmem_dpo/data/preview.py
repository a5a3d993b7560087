"""One pair as the model will see it: decoded, special tokens visible, scored tokens marked."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.text import Text

from lowmem_dpo.data.encoding import TokenPair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_SHOWN_TOKENS = 96  # longer prompts and completions lose their middle
# ASCII, so that the marks show where there is neither colour nor Unicode.
SCORED_OPEN, SCORED_CLOSE, ELLIPSIS = "[[", "]]", " [...] "
STYLES = {"chosen": "green", "rejected": "red"}
# Control characters of the data, which could steer the terminal; tab and newline stay.
CONTROL_CODES = {
    code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"
}


def preview_pair(
    pair: TokenPair, tokenizer: "PreTrainedTokenizerBase", *, encoding: str = "utf-8"
) -> Text:
    """Decode a pair for the eye.

    Unscored tokens are dim; scored ones stand in [[ ]], chosen green and rejected red where the
    terminal has colours.

    Args:
        pair: The pair.
        tokenizer: The tokenizer that made it.
        encoding: What the terminal can show; other characters are written as escapes.

    Returns:
        Two labelled blocks of text.
    """
    text = Text()
    sides = (
        ("chosen", pair.chosen_ids, pair.chosen_start),
        ("rejected", pair.rejected_ids, pair.rejected_start),
    )
    for name, ids, start in sides:
        prompt, completion = (
            _decode(part, tokenizer, encoding) for part in (ids[:start], ids[start:])
        )
        text.append(f"{name} (row {pair.row}, {len(ids) - start} of {len(ids)} tokens scored)\n")
        text.append(prompt, style="dim")
        text.append(f"{SCORED_OPEN}{completion}{SCORED_CLOSE}\n", style=STYLES[name])
    return text


def _decode(ids: Sequence[int], tokenizer: "PreTrainedTokenizerBase", encoding: str) -> str:
    """Token ids as printable text, the middle of a long sequence left out."""
    half = MAX_SHOWN_TOKENS // 2
    parts = [ids] if len(ids) <= MAX_SHOWN_TOKENS else [ids[:half], ids[len(ids) - half :]]
    decoded = (
        tokenizer.decode(list(part), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for part in parts
    )
    text = ELLIPSIS.join(map(str, decoded)).translate(CONTROL_CODES)
    return text.encode(encoding, "backslashreplace").decode(encoding)

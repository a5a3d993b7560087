"""A pair as the model will see it: decoded, special tokens visible, scored tokens marked."""

from typing import TYPE_CHECKING

from rich.text import Text

from lowmem_dpo.tokens.trees import Tree

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
    tree: Tree, tokenizer: "PreTrainedTokenizerBase", *, encoding: str = "utf-8"
) -> Text:
    """Decode a pair for the eye.

    Unscored tokens are dim; scored ones stand in [[ ]], chosen green and rejected red where the
    terminal has colours.

    Args:
        tree: The pair.
        tokenizer: The tokenizer that made it.
        encoding: What the terminal can show; other characters are written as escapes.

    Returns:
        Two labelled blocks of text.
    """
    text = Text()
    sides = (
        ("chosen", tree.chosen_ids, tree.chosen_start),
        ("rejected", tree.rejected_ids, tree.rejected_start),
    )
    for name, ids, start in sides:
        text.append(f"{name} (row {tree.row}, {len(ids) - start} of {len(ids)} tokens scored)\n")
        for part, style, opening, closing in (
            (ids[:start], "dim", "", ""),
            (ids[start:], STYLES[name], SCORED_OPEN, SCORED_CLOSE + "\n"),
        ):
            half = MAX_SHOWN_TOKENS // 2
            shown = [part] if len(part) <= MAX_SHOWN_TOKENS else [part[:half], part[-half:]]
            decoded = (
                tokenizer.decode(
                    list(run), skip_special_tokens=False, clean_up_tokenization_spaces=False
                )
                for run in shown
            )
            words = ELLIPSIS.join(map(str, decoded)).translate(CONTROL_CODES)
            words = words.encode(encoding, "backslashreplace").decode(encoding)
            text.append(f"{opening}{words}{closing}", style=style)
    return text

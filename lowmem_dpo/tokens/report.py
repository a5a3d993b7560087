"""What became of the pairs of a file on their way to token ids: in words, and one pair as it is."""

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich.text import Text

from lowmem_dpo.tokens.answers import LOSSES, quoted
from lowmem_dpo.tokens.answers import NOTES as ANSWER_NOTES
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
MANY_DROPPED = 0.1  # share of the pairs lost to cutting above which a report says what to do
IDENTICAL_BY_TEMPLATE = "identical without what the chat template leaves out"
NOTES = {
    "looks rendered": "have a prompt that looks rendered already, {text}, and goes through the "
    "chat template like most of the file; rendered yes leaves all as they are",
    "looks plain": "have a prompt that does not look rendered, {text}, and stays as it is like "
    "most of the file; rendered no puts all through the chat template",
} | ANSWER_NOTES


@dataclass
class EncodeReport:
    """What became of the pairs of a file.

    Attributes:
        template_choice: What was done about a chat template, in one sentence.
        num_pairs: Pairs read.
        num_kept: Pairs that are trained on.
        num_dropped: Dropped pairs by reason (empty, identical, ... after cutting).
        num_truncated: Sequences of kept pairs that were cut.
        num_prompts_cut: Kept pairs whose prompt lost its beginning.
        num_mismatches: Pairs whose last prompt tokens change where a completion follows.
        num_rendered: Pairs that were already rendered.
        num_joined: Pairs of joined text: the answers repeat a plain prompt, as implicit ones do.
        ignored_columns: Columns for the template that change nothing in what it writes.
        first_fault: Why the template refused the first of the rows it refused.
        max_length: The limit, in tokens.
        template_date: The date that the chat template writes; None where it writes none.
        notes: What the template does to pairs, by the names of `NOTES`: num_pairs, and the row
            and the text of the first.
    """

    template_choice: str = ""
    num_pairs: int = 0
    num_kept: int = 0
    num_dropped: Counter[str] = field(default_factory=Counter)
    num_truncated: int = 0
    num_prompts_cut: int = 0
    num_mismatches: int = 0
    num_rendered: int = 0
    num_joined: int = 0
    ignored_columns: list[str] = field(default_factory=list)
    first_fault: str = ""
    max_length: int = 0
    template_date: str | None = None
    notes: dict[str, dict[str, Any]] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """The report in words, a line each; only what happened."""
        lines = [self.template_choice, f"{self.num_pairs} pairs read, {self.num_kept} kept"]
        if self.num_dropped:
            lines.append(f"{self.num_dropped.total()} pairs dropped: {self.reasons()}{self.hint()}")
        if self.first_fault:
            lines.append(self.first_fault)
        if self.template_date:
            lines.append(
                f"the chat template writes the date: {self.template_date} in every session of this "
                "run; template_date gives other runs the same, whose cached reference then holds"
            )
        lines += [self.note_line(name) for name in NOTES if name in self.notes]
        lines += [
            f"the column {name} has no effect: the chat template writes the same without it"
            for name in self.ignored_columns
        ]
        if self.num_truncated:
            lines.append(f"{self.num_truncated} of {2 * self.num_kept} sequences cut to max_length")
        if self.num_prompts_cut:
            lines.append(f"{self.num_prompts_cut} prompts cut from the left")
        if self.num_mismatches:
            lines.append(
                f"{self.num_mismatches} pairs whose last prompt tokens change where an answer "
                "follows: scored from where they differ"
            )
        return lines

    def note_row(self, name: str, row: int, text: str) -> None:
        """Count what the template does to a row; the first one is the example."""
        note = self.notes.setdefault(name, {"num_pairs": 0, "row": row, "text": text})
        note["num_pairs"] += 1

    def note_line(self, name: str) -> str:
        """A note in words, with its example."""
        note = self.notes[name]
        said = NOTES[name].format(text=quoted(note["text"]))
        return f"{note['num_pairs']} of {self.num_pairs} pairs (first row {note['row']}) {said}"

    def cause(self) -> str:
        """Why no pair may be left, as far as the template is to blame; empty elsewhere."""
        if self.first_fault:
            return f"; {self.first_fault}"
        losses = [name for name in self.notes if name in LOSSES]
        is_lost = IDENTICAL_BY_TEMPLATE in self.num_dropped and losses
        return f"; {self.note_line(losses[0])}" if is_lost else ""

    def reasons(self) -> str:
        """Reasons and counts of the dropped pairs, most frequent first."""
        return ", ".join(f"{count} {reason}" for reason, count in self.num_dropped.most_common())

    def hint(self) -> str:
        """What helps where cutting cost many pairs; empty elsewhere."""
        num_cut = sum(n for reason, n in self.num_dropped.items() if "after cutting" in reason)
        if num_cut <= MANY_DROPPED * self.num_pairs:
            return ""
        return f"; raise max_length (now {self.max_length})"


def preview_pair(
    tree: Tree, tokenizer: "PreTrainedTokenizerBase", *, encoding: str = "utf-8"
) -> Text:
    """Decode a pair as the model will see it: special tokens visible, scored tokens marked.

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

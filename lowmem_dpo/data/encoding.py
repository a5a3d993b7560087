"""From preferences to token ids: special tokens once, the prompt's end, cutting to length.

Message lists get the ids that TRL gives them. Text is tokenised without special tokens, and BOS and
EOS are added to the ids where they are missing: so each stands there once, whatever the tokenizer,
the template and the file do of their own. Which text that is, `rendering` decides.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING

from lowmem_dpo.data.formats import Preference
from lowmem_dpo.data.messages import Message, has_system
from lowmem_dpo.data.rendering import (
    TEMPLATE_COLUMNS,
    PairText,
    Renderer,
    build_renderer,
    prompts_are_repeated,
    repeats_prompt,
)
from lowmem_dpo.settings.groups import EncodingSettings, TemplateSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK_PAIRS = 1000  # pairs per call of the tokenizer: bounds memory
CHECKED_ROWS = 10  # on which tools and template variables must show an effect
MANY_DROPPED = 0.1  # share of the pairs lost to cutting above which a report says what to do


@dataclass(frozen=True)
class TokenPair:
    """A preference in token ids.

    Attributes:
        row: Its row in the file.
        chosen_ids: Prompt and chosen completion.
        rejected_ids: Prompt and rejected completion.
        chosen_start: Position of the first scored token of `chosen_ids`, at least 1.
        rejected_start: The same for `rejected_ids`.
        prompt_key: Digest of the prompt's whole text: ids change where tokens merge or are cut.
    """

    row: int
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]
    chosen_start: int
    rejected_start: int
    prompt_key: str = ""


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

    def lines(self) -> list[str]:
        """The report in words, a line each; only what happened."""
        lines = [self.template_choice, f"{self.num_pairs} pairs read, {self.num_kept} kept"]
        if self.num_dropped:
            lines.append(f"{self.num_dropped.total()} pairs dropped: {self.reasons()}{self.hint()}")
        if self.first_fault:
            lines.append(self.first_fault)
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

    def reasons(self) -> str:
        """Reasons and counts of the dropped pairs, most frequent first."""
        return ", ".join(f"{count} {reason}" for reason, count in self.num_dropped.most_common())

    def hint(self) -> str:
        """What helps where cutting cost many pairs; empty elsewhere."""
        num_cut = sum(n for reason, n in self.num_dropped.items() if "after cutting" in reason)
        if num_cut <= MANY_DROPPED * self.num_pairs:
            return ""
        return f"; raise max_length (now {self.max_length})"


def encode_pairs(
    preferences: Sequence[Preference],
    tokenizer: "PreTrainedTokenizerBase",
    settings: EncodingSettings,
) -> tuple[list[TokenPair], EncodeReport]:
    """Turn preferences into token ids and drop the pairs that teach nothing.

    Dropped are pairs with an empty answer, identical pairs, and pairs that after cutting are
    identical or have no scored token left on a side.

    Args:
        preferences: The rows of a file.
        tokenizer: The model's tokenizer.
        settings: Template and length.

    Returns:
        The pairs kept, in the given order, and what became of the others.

    Raises:
        ValueError: No pair is left, or the template, the settings and the rows do not go together.

    Source: message lists as `DPOTrainer` of TRL 1.16, https://github.com/huggingface/trl.
    """
    renderer = build_renderer(tokenizer, settings)
    report = EncodeReport(num_pairs=len(preferences), max_length=settings.max_length)
    texts = _pair_texts(preferences, renderer, settings.on_bad_row, report)
    report.ignored_columns = _ignored_columns(preferences, renderer)
    pairs: list[TokenPair] = []
    for start in range(0, len(texts), CHUNK_PAIRS):
        for uncut in _tokenize(texts[start : start + CHUNK_PAIRS], renderer, report):
            pair = _cut(uncut, settings, tokenizer.bos_token_id)
            reason = _why_dropped(uncut, pair)
            if reason:
                report.num_dropped[reason] += 1
                continue
            pairs.append(pair)
            report.num_truncated += len(pair.chosen_ids) < len(uncut.chosen_ids)
            report.num_truncated += len(pair.rejected_ids) < len(uncut.rejected_ids)
            report.num_prompts_cut += pair.chosen_start < uncut.chosen_start
    report.num_kept = len(pairs)
    report.template_choice = _template_choice(preferences, renderer, report)
    if not pairs:
        fault = f"; {report.first_fault}" if report.first_fault else ""
        raise ValueError(
            f"no pair is left of {report.num_pairs} (dropped: {report.reasons() or 'none'})"
            f"{report.hint() or fault or '; check the data'}"
        )
    return pairs, report


def render_prompt(
    tokenizer: "PreTrainedTokenizerBase", prompt: str | list[Message], settings: TemplateSettings
) -> list[int]:
    """Token ids of a prompt as training sees them, ready for the answer's first token.

    Args:
        tokenizer: The model's tokenizer.
        prompt: Plain or rendered text, or messages.
        settings: Template; the length is not used.

    Returns:
        The ids, with BOS once where the tokenizer or the template puts one.

    Raises:
        ValueError: The template, the settings and the prompt do not go together.
    """
    renderer = build_renderer(tokenizer, settings)
    ids = tokenizer(renderer.prompt_text(prompt), add_special_tokens=False)["input_ids"]
    return ids if renderer.uses_template(prompt) else _with_bos(ids, _bos_ids(tokenizer))


def common_prefix_length(ids: Sequence[int], other_ids: Sequence[int]) -> int:
    """Number of leading tokens that two sequences share."""
    for i, (token, other) in enumerate(zip(ids, other_ids, strict=False)):
        if token != other:
            return i
    return min(len(ids), len(other_ids))


def _pair_texts(
    preferences: Sequence[Preference], renderer: Renderer, on_bad_row: str, report: EncodeReport
) -> list[tuple[int, PairText]]:
    """Row and text of every pair; those with an empty answer are counted and left out."""
    most_repeat = prompts_are_repeated(preferences)
    texts = []
    for preference in preferences:
        prompt = preference.prompt
        rendered = isinstance(prompt, str) and renderer.is_rendered(prompt)
        repeats = (most_repeat or rendered) and repeats_prompt(preference)
        try:
            text = renderer.pair_text(preference, repeats)
        except ValueError as error:
            if on_bad_row == "error":
                raise
            report.num_dropped["refused by the chat template"] += 1
            report.first_fault = report.first_fault or str(error)
            continue
        if text is None:
            report.num_dropped["empty"] += 1
        else:
            report.num_rendered += text.as_is and rendered
            report.num_joined += text.as_is and not rendered
            texts.append((preference.row, text))
    return texts


def _ignored_columns(preferences: Sequence[Preference], renderer: Renderer) -> list[str]:
    """Columns for the template that show no effect on the first rows that have them."""
    ignored = []
    for name in TEMPLATE_COLUMNS if renderer.template else ():
        rows = islice((p for p in preferences if getattr(p, name)), CHECKED_ROWS)
        effects = [renderer.reads_column(preference, name) for preference in rows]
        if effects and not any(effects):
            ignored.append(name)
    return ignored


def _tokenize(
    texts: Sequence[tuple[int, PairText]], renderer: Renderer, report: EncodeReport
) -> Iterator[TokenPair]:
    """Yield the pairs in token ids, uncut.

    The completion begins where prompt and prompt+completion part, which is before the prompt's end
    where tokens merge across it.
    """
    tokenizer = renderer.tokenizer
    bos_ids = _bos_ids(tokenizer)
    flat = [side for _, text in texts for side in (text.prompt, text.chosen, text.rejected)]
    ids = iter(tokenizer(flat, add_special_tokens=False, verbose=False)["input_ids"])
    for (row, text), *sides in zip(texts, ids, ids, ids, strict=True):
        if not text.by_template:
            sides = [_with_bos(side, bos_ids) for side in sides]
        prompt, chosen, rejected = sides
        starts = [common_prefix_length(prompt, side) for side in (chosen, rejected)]
        report.num_mismatches += min(starts) < len(prompt)
        if text.by_template:  # one start for both sides, as in TRL
            starts = [min(starts)] * 2
        yield TokenPair(
            row=row,
            chosen_ids=_with_eos(chosen, text.chosen, renderer),
            rejected_ids=_with_eos(rejected, text.rejected, renderer),
            chosen_start=max(starts[0], 1),
            rejected_start=max(starts[1], 1),
            prompt_key=_prompt_key(text.prompt, tokenizer.bos_token),
        )


def _prompt_key(prompt: str, bos_token: str | None) -> str:
    """Digest of a prompt's text, the same with and without BOS."""
    return hashlib.sha256(prompt.removeprefix(bos_token or "").encode()).hexdigest()[:32]


def _bos_ids(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """What the tokenizer puts before text of its own accord: BOS, nothing, seldom more."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    return next(full[:i] for i in range(len(full) + 1) if full[i : i + len(plain)] == plain)


def _with_bos(ids: list[int], bos_ids: list[int]) -> list[int]:
    """The ids of plain text with BOS in front, unless the text held it."""
    return ids if ids[: len(bos_ids)] == bos_ids else bos_ids + ids


def _with_eos(ids: list[int], text: str, renderer: Renderer) -> tuple[int, ...]:
    """The ids with EOS behind, unless the text ends with a terminator of its own."""
    if renderer.is_terminated(text):
        return tuple(ids)
    if renderer.tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no EOS token; set eos_token in tokenizer_config.json")
    return (*ids, renderer.tokenizer.eos_token_id)


def _cut(pair: TokenPair, settings: EncodingSettings, bos_id: int | None) -> TokenPair:
    """Cut both sequences to max_length: with truncate_prompt the prompt's left, then the right.

    Half of max_length is left to the prompt: an answer that is long alone must not erase it.
    """
    limit = settings.max_length
    num_bos = int(pair.chosen_ids[0] == bos_id)
    cut = 0
    if settings.truncate_prompt:
        excess = max(len(pair.chosen_ids), len(pair.rejected_ids)) - limit
        spare = min(pair.chosen_start, pair.rejected_start) - max(limit // 2, num_bos + 1)
        cut = max(min(excess, spare), 0)
    return replace(
        pair,
        chosen_ids=(pair.chosen_ids[:num_bos] + pair.chosen_ids[num_bos + cut :])[:limit],
        rejected_ids=(pair.rejected_ids[:num_bos] + pair.rejected_ids[num_bos + cut :])[:limit],
        chosen_start=pair.chosen_start - cut,
        rejected_start=pair.rejected_start - cut,
    )


def _why_dropped(uncut: TokenPair, pair: TokenPair) -> str:
    """Why a pair teaches nothing; empty if it does."""
    if uncut.chosen_ids == uncut.rejected_ids:
        return "identical"
    if len(pair.chosen_ids) <= pair.chosen_start or len(pair.rejected_ids) <= pair.rejected_start:
        return "prompt only after cutting"
    return "identical after cutting" if pair.chosen_ids == pair.rejected_ids else ""


def _template_choice(
    preferences: Sequence[Preference], renderer: Renderer, report: EncodeReport
) -> str:
    """One sentence: the template, and what was done with plain and with rendered text."""
    parts = [f"text goes through {renderer.origin}" if renderer.template else renderer.origin]
    num_as_is = report.num_rendered + report.num_joined
    num_plain = sum(isinstance(p.prompt, str) for p in preferences) - num_as_is
    if renderer.template and num_plain > 0:
        parts.append("plain strings as one user and one assistant turn")
    unprompted = ", without the system_prompt" if renderer.settings.system_prompt else ""
    if report.num_joined and renderer.template:
        parts.append(
            f"no chat template is put around text that holds its prompt, as implicit prompts do "
            f"({report.num_joined} of {report.num_pairs} pairs){unprompted}"
        )
    if report.num_rendered:
        parts.append(
            f"{report.num_rendered} of {report.num_pairs} pairs are already rendered "
            f"and stay as they are{unprompted}"
        )
    own = [
        p
        for p in preferences
        if p.system or (not isinstance(p.prompt, str) and has_system(p.prompt))
    ]
    if renderer.settings.system_prompt and len(own) + num_as_is >= report.num_pairs:
        parts.append("system_prompt has no effect: every row has a system message of its own")
    return "; ".join(parts)

"""From preferences to token ids: special tokens once, the prompt's end, cutting to length.

Message lists get the ids that TRL gives them. Text is tokenised without special tokens, and BOS and
EOS are added to the ids where they are missing: so each stands there once, whatever the tokenizer,
the template and the file do of their own. Which text that is, `rendering` decides.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING

from lowmem_dpo.console import progress
from lowmem_dpo.data.formats import Preference
from lowmem_dpo.data.messages import Message, has_system
from lowmem_dpo.settings.groups import EncodingSettings, TemplateSettings
from lowmem_dpo.tokens.answers import LOSSES
from lowmem_dpo.tokens.rendered import looks_rendered
from lowmem_dpo.tokens.rendering import (
    TEMPLATE_COLUMNS,
    PairText,
    Renderer,
    build_renderer,
    repeats_prompt,
)
from lowmem_dpo.tokens.report import IDENTICAL_BY_TEMPLATE, EncodeReport
from lowmem_dpo.tokens.trees import TokenPair, Tree, build_tree, common_prefix_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK_PAIRS = 250  # pairs per call of the tokenizer: bounds memory
CHECKED_ROWS = 10  # on which tools and template variables must show an effect


def encode_pairs(
    preferences: Sequence[Preference],
    tokenizer: "PreTrainedTokenizerBase",
    settings: EncodingSettings,
) -> tuple[list[Tree], EncodeReport]:
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
    num_pairs = len(preferences)
    renderer = _build_renderer(preferences, tokenizer, settings)
    report = EncodeReport(num_pairs=num_pairs, max_length=settings.max_length)
    report.template_date = renderer.template.date
    # Rows hold joined text, whose answers begin with the whole prompt, if most of them do: a prompt
    # such as "Hi" begins an honest answer now and then.
    most_repeat = 2 * sum(map(repeats_prompt, preferences)) > num_pairs
    trees: list[Tree] = []
    takes_long = num_pairs > 8 * CHUNK_PAIRS
    with progress("encoding", num_pairs, "pairs") if takes_long else nullcontext() as bar:
        for first in range(0, num_pairs, CHUNK_PAIRS):
            chunk = preferences[first : first + CHUNK_PAIRS]
            texts = _pair_texts(chunk, most_repeat, renderer, settings, report)
            trees += _kept_trees(texts, renderer, settings, report)
            if bar:
                bar.advance(len(chunk))
    for name in TEMPLATE_COLUMNS if renderer.template.sources else ():
        rows = list(islice((p for p in preferences if getattr(p, name)), CHECKED_ROWS))
        if rows and not any(renderer.reads_column(row, name) for row in rows):
            report.ignored_columns.append(name)
    report.num_kept = len(trees)
    report.template_choice = _template_choice(preferences, renderer, report)
    if not trees:
        raise ValueError(
            f"no pair is left of {num_pairs} (dropped: {report.reasons() or 'none'})"
            f"{report.hint() or report.cause() or '; check the data'}"
        )
    return trees, report


def render_prompts(
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str | list[Message]],
    settings: TemplateSettings,
) -> list[list[int]]:
    """Token ids of prompts as training sees them, ready for the answer's first token.

    Args:
        tokenizer: The model's tokenizer.
        prompts: Plain or rendered text, or messages; most of the texts tell which.
        settings: Template; the length is not used.

    Returns:
        The ids of each, with BOS once where the tokenizer or the template puts one.

    Raises:
        ValueError: The template, the settings and a prompt do not go together.
    """
    renderer = build_renderer(tokenizer, settings, prompts)
    rendered = []
    for prompt in prompts:
        ids = tokenizer(renderer.prompt_text(prompt), add_special_tokens=False)["input_ids"]
        rendered.append(ids if renderer.uses_template(prompt) else _with_bos(ids, renderer.bos_ids))
    return rendered


def render_prompt(
    tokenizer: "PreTrainedTokenizerBase", prompt: str | list[Message], settings: TemplateSettings
) -> list[int]:
    """Token ids of one prompt, see `render_prompts`."""
    return render_prompts(tokenizer, [prompt], settings)[0]


def _build_renderer(
    preferences: Sequence[Preference],
    tokenizer: "PreTrainedTokenizerBase",
    settings: EncodingSettings,
) -> Renderer:
    """The renderer for a file's prompts and tools."""
    prompts = [preference.prompt for preference in preferences]
    if settings.rendered != "auto" and not any(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(
            f"rendered {settings.rendered} has no effect: the prompts are messages; leave it out"
        )
    tools = next((preference.tools for preference in preferences if preference.tools), [])
    return build_renderer(tokenizer, settings, prompts, tools)


def _pair_texts(
    preferences: Sequence[Preference],
    most_repeat: bool,
    renderer: Renderer,
    settings: EncodingSettings,
    report: EncodeReport,
) -> list[tuple[int, PairText]]:
    """Row and text of every pair; those with an empty answer are counted and left out."""
    is_open = settings.rendered == "auto" and bool(renderer.template.sources)
    texts = []
    for preference in preferences:
        prompt = preference.prompt
        rendered = isinstance(prompt, str) and renderer.is_rendered
        repeats = (most_repeat or rendered) and repeats_prompt(preference)
        try:
            text = renderer.pair_text(preference, repeats, settings.keep_reasoning)
        except ValueError as error:
            if settings.on_bad_row == "error":
                raise
            report.num_dropped["refused by the chat template"] += 1
            report.first_fault = report.first_fault or str(error)
            continue
        if text is None:
            report.num_dropped["empty"] += 1
            continue
        report.num_rendered += text.as_is and rendered
        report.num_joined += text.as_is and not rendered
        if is_open and isinstance(prompt, str):
            looks = looks_rendered(prompt, renderer.marks)
            if looks != rendered:
                name = "looks rendered" if looks else "looks plain"
                report.note_row(name, preference.row, prompt)
        for name, example in text.notes.items():
            report.note_row(name, preference.row, example)
        texts.append((preference.row, text))
    return texts


def _kept_trees(
    texts: Sequence[tuple[int, PairText]],
    renderer: Renderer,
    settings: EncodingSettings,
    report: EncodeReport,
) -> Iterator[Tree]:
    """Yield the pairs that teach something, cut to length; the others are counted."""
    bos_id = renderer.tokenizer.bos_token_id
    for uncut, (_, text) in zip(_tokenize(texts, renderer, report), texts, strict=True):
        num_chosen, num_rejected = len(uncut.chosen_ids), len(uncut.rejected_ids)
        fits = max(num_chosen, num_rejected) <= settings.max_length
        pair = uncut if fits else _cut(uncut, settings, bos_id)
        is_all_prompt = (
            len(pair.chosen_ids) <= pair.chosen_start
            or len(pair.rejected_ids) <= pair.rejected_start
        )
        if uncut.chosen_ids == uncut.rejected_ids:
            is_templates = any(name in text.notes for name in LOSSES)
            report.num_dropped[IDENTICAL_BY_TEMPLATE if is_templates else "identical"] += 1
        elif is_all_prompt:
            report.num_dropped["prompt only after cutting"] += 1
        elif pair.chosen_ids == pair.rejected_ids:
            report.num_dropped["identical after cutting"] += 1
        else:
            yield build_tree(pair)
            report.num_truncated += len(pair.chosen_ids) < num_chosen
            report.num_truncated += len(pair.rejected_ids) < num_rejected
            report.num_prompts_cut += pair.chosen_start < uncut.chosen_start


def _tokenize(
    texts: Sequence[tuple[int, PairText]], renderer: Renderer, report: EncodeReport
) -> Iterator[TokenPair]:
    """Yield the pairs in token ids, uncut.

    Where tokens merge across the prompt's end, a rendered prompt keeps the tokens that it has at
    inference and the answer becomes tokens apart; in plain text the completion begins where prompt
    and prompt+completion part, which is before the prompt's end. EOS stands behind the completion,
    unless the text has a terminator of its own.
    """
    tokenizer = renderer.tokenizer
    all_ids = renderer.side_ids([text for _, text in texts])
    for (row, text), sides in zip(texts, all_ids, strict=True):
        if not text.by_template:
            sides = [_with_bos(side, renderer.bos_ids) for side in sides]
        prompt, chosen, rejected = sides
        starts = [common_prefix_length(prompt, side) for side in (chosen, rejected)]
        if min(starts) < len(prompt) and text.is_rendered:
            report.note_row("apart", row, str(tokenizer.decode(prompt[min(starts) :])))
            answers = [side[len(text.prompt) :] for side in (text.chosen, text.rejected)]
            chosen, rejected = (prompt + answer for answer in renderer.answer_ids(answers))
            starts = [len(prompt)] * 2
        report.num_mismatches += min(starts) < len(prompt)
        if text.by_template:  # one start for both sides, as in TRL
            starts = [min(starts)] * 2
        for side, written in ((chosen, text.chosen), (rejected, text.rejected)):
            if renderer.is_ended(text, written):
                continue
            if tokenizer.eos_token_id is None:
                raise ValueError(
                    "the tokenizer has no EOS token; set eos_token in tokenizer_config.json"
                )
            side.append(tokenizer.eos_token_id)
        # The same with and without BOS.
        key = hashlib.sha256(text.prompt.removeprefix(tokenizer.bos_token or "").encode())
        yield TokenPair(
            row=row,
            chosen_ids=chosen,
            rejected_ids=rejected,
            chosen_start=max(starts[0], 1),
            rejected_start=max(starts[1], 1),
            prompt_key=key.hexdigest()[:32],
        )


def _with_bos(ids: list[int], bos_ids: list[int]) -> list[int]:
    """The ids of plain text with BOS in front, unless the text held it."""
    return ids if ids[: len(bos_ids)] == bos_ids else bos_ids + ids


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


def _template_choice(
    preferences: Sequence[Preference], renderer: Renderer, report: EncodeReport
) -> str:
    """One sentence: the template, and what was done with plain and with rendered text."""
    template = renderer.template
    parts = [f"text goes through {template.origin}" if template.sources else template.origin]
    if "tool_use" in template.sources and (num_tools := sum(bool(p.tools) for p in preferences)):
        parts.append(f"with its tool_use where there are tools ({num_tools} of {len(preferences)})")
    num_as_is = report.num_rendered + report.num_joined
    num_plain = sum(isinstance(p.prompt, str) for p in preferences) - num_as_is
    if template.sources and num_plain > 0:
        parts.append("plain strings as one user and one assistant turn")
    unprompted = ", without the system_prompt" if renderer.settings.system_prompt else ""
    if report.num_joined and template.sources:
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

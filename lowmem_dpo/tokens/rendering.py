"""From preferences to text: what goes through the chat template, and what is rendered already.

Message lists go through the template. Plain strings are wrapped as one user and one assistant turn
where there is a template, and put together as they are where there is none. Two kinds of text stay
as they are: what is already rendered, as `rendered` tells or the user says, and joined text, where
both answers begin with the whole prompt (as implicit prompts have it).

How a template opens a user turn and ends an answer is learnt by rendering a probe conversation, so
that rendered prompts and terminators are recognised for any template.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from lowmem_dpo.data.formats import Preference
from lowmem_dpo.data.messages import Message, has_system, says_nothing
from lowmem_dpo.settings.groups import TemplateSettings
from lowmem_dpo.tokens.answers import (
    ASSISTANT_PROBE,
    LOSSES,
    lost_call,
    quoted,
    write_answer,
)
from lowmem_dpo.tokens.rendered import NO_MARKS, TurnMarks, looks_rendered
from lowmem_dpo.tokens.templates import ChatTemplate, check_not_reserved, choose_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")
# What the user says in the conversation that a template is tried on.
USER_PROBE = "UserProbe"


@dataclass(frozen=True)
class PairText:
    """The text of a pair.

    Attributes:
        prompt: The prompt, up to where the answer begins.
        chosen: Prompt and chosen answer.
        rejected: Prompt and rejected answer.
        by_template: Written by the template, which then writes BOS too.
        as_is: The row's text as it stands: rendered already, or answers that repeat the prompt.
        is_rendered: Written by a template, this one or another, up to the prompt's end.
        notes: What the template does to it, see `answers.NOTES`.
    """

    prompt: str
    chosen: str
    rejected: str
    by_template: bool
    as_is: bool = False
    is_rendered: bool = False
    notes: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Renderer:
    """A tokenizer with the template in use, and what is known of a file's prompts.

    Attributes:
        tokenizer: The model's tokenizer.
        template: The chat template in use, or the lack of one.
        bos_ids: What the tokenizer puts before text of its own accord: BOS, nothing, seldom more.
        terminators: Texts that end an answer: the EOS token, the template's end of a turn.
        special_tokens: Tokens one of which ends a turn where rendered text ends in it.
        opens_with_bos: BOS is the template's first token and nothing else in it.
        marks: How the template opens and closes turns.
        answer_lead: Text before an answer that is tokenised alone, so that no space is put there.
        is_rendered: The file's text prompts went through a template already.
        seams: Tokens at which text can be cut and gives the same ids, and how they are written.
    """

    tokenizer: "PreTrainedTokenizerBase"
    template: ChatTemplate
    bos_ids: list[int]
    terminators: tuple[str, ...]
    special_tokens: tuple[str, ...]
    opens_with_bos: bool = True
    marks: TurnMarks = NO_MARKS
    answer_lead: str = ""
    is_rendered: bool = False
    seams: dict[int, str] = field(default_factory=dict)

    @property
    def settings(self) -> TemplateSettings:
        """The user's."""
        return self.template.settings

    def uses_template(self, prompt: str | list[Message]) -> bool:
        """Whether a prompt goes through the template: messages, and text not yet rendered."""
        return not isinstance(prompt, str) or bool(self.template.sources and not self.is_rendered)

    def prompt_text(self, prompt: str | list[Message]) -> str:
        """A prompt up to where the answer begins."""
        if isinstance(prompt, str) and not self.uses_template(prompt):
            return prompt
        return self.template.render(self._with_system(prompt), {}, opens_answer=True)

    def pair_text(
        self, preference: Preference, answers_repeat_prompt: bool, keep_reasoning: str = "auto"
    ) -> PairText | None:
        """The text of a pair.

        Args:
            preference: A row.
            answers_repeat_prompt: The answers are joined text: they begin with the whole prompt.
            keep_reasoning: The setting of that name.

        Returns:
            The text, or None if an answer is empty.

        Raises:
            ValueError: The template refuses the row.
        """
        prompt, chosen, rejected = preference.prompt, preference.chosen, preference.rejected
        where = f"row {preference.row}: "
        if isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str):
            as_is = answers_repeat_prompt or self.is_rendered
            if as_is:
                _check_text_stands_alone(preference, where)
            if answers_repeat_prompt:
                chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
            answers = self._without_terminator(chosen), self._without_terminator(rejected)
            if not all(answer.strip() for answer in answers):
                return None
            needs_template = any(getattr(preference, n) for n in ("system", *TEMPLATE_COLUMNS))
            if as_is or (not self.template.sources and not needs_template):
                is_rendered = self.is_rendered and not answers_repeat_prompt
                return PairText(
                    prompt, prompt + chosen, prompt + rejected, False, as_is, is_rendered
                )
            # The template writes the terminator.
            chosen, rejected = ([{"role": "assistant", "content": answer}] for answer in answers)
        else:
            assert not isinstance(chosen, str) and not isinstance(rejected, str)
            if says_nothing(chosen) or says_nothing(rejected):
                return None
        messages = self._with_system(prompt, preference.system)
        return self._by_template(preference, messages, (chosen, rejected), keep_reasoning)

    def reads_column(self, preference: Preference, name: str) -> bool:
        """Whether a row's tools or chat_template_kwargs change what the template writes."""
        bare = replace(preference, **{name: type(getattr(preference, name))()})
        try:
            return self.pair_text(bare, False) != self.pair_text(preference, False)
        except ValueError:  # it cannot do without
            return True

    def is_ended(self, text: PairText, side: str) -> bool:
        """Whether a pair's text has a terminator of its own on a side.

        Rendered text ends in one if it ends in a special token: a turn that calls a tool may end in
        another one than a turn that speaks.
        """
        ends = self.terminators
        if text.by_template or (text.as_is and self.is_rendered):
            ends += self.special_tokens
        return side.rstrip().endswith(ends)

    def _by_template(
        self,
        preference: Preference,
        messages: list[Message],
        answers: tuple[list[Message], list[Message]],
        keep_reasoning: str,
    ) -> PairText:
        """What the template writes for a row's messages and the two answers to them."""
        where = f"row {preference.row}: "
        variables = preference.chat_template_kwargs
        if variables:
            check_not_reserved(variables, where)
        if preference.tools:
            variables = variables | {"tools": preference.tools}
        write = partial(self.template.render, variables=variables, where=where)
        text = write(messages, opens_answer=True)
        try:
            sides = [
                write_answer(write, messages, text, answer, keep_reasoning) for answer in answers
            ]
        except ValueError as error:
            raise ValueError(where + str(error).removeprefix(where)) from error
        for side in sides:
            lost = next((side.notes[name] for name in LOSSES if name in side.notes), "")
            if lost and not self._without_terminator(side.text).strip():
                raise ValueError(
                    f"{where}the chat template leaves nothing of an answer, {quoted(lost)} is lost"
                    "; set keep_reasoning yes if that is reasoning in the content, name another "
                    "template with --chat_template FILE, or leave such rows out with "
                    "--on_bad_row skip"
                )
        notes = sides[1].notes | sides[0].notes
        opened = partial(write, opens_answer=True)
        calls = (lost_call(opened, messages, i, text) for i in range(len(messages)))
        if call := next(filter(None, calls), ""):
            notes["prompt calls"] = call
        with_chosen, with_rejected = (text + side.text for side in sides)
        return PairText(
            text, with_chosen, with_rejected, by_template=True, is_rendered=True, notes=notes
        )

    def side_ids(self, texts: Sequence[PairText]) -> Iterator[list[list[int]]]:
        """Token ids of every pair's prompt, prompt+chosen and prompt+rejected.

        What stands in front of the prompt's last seam is tokenised once; see `_seams`.
        """
        prompts = self._ids([text.prompt for text in texts])
        places, tails = [], []
        for text, prompt in zip(texts, prompts, strict=True):
            place = next((i for i in reversed(range(len(prompt))) if prompt[i] in self.seams), 0)
            seam = self.seams.get(prompt[place], "") if prompt else ""
            if not seam or text.prompt.count(seam) != prompt.count(prompt[place]):
                # Its id for other text too: what is unknown, or becomes the token by normalisation.
                place, seam = 0, ""
            begin = text.prompt.rindex(seam) if seam else 0
            places.append(place)
            tails += [text.chosen[begin:], text.rejected[begin:]]
        behind = iter(self._ids(tails))
        for prompt, place, *both in zip(prompts, places, behind, behind, strict=True):
            yield [prompt, *(prompt[:place] + tail for tail in both)]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        """Token ids of texts, no special token added."""
        if not texts:
            return []
        encoded = self.tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return encoded["input_ids"]

    def answer_ids(self, answers: list[str]) -> list[list[int]]:
        """Token ids of answers as they follow on a prompt, whatever tokens that ends in."""
        texts = [self.answer_lead + text for text in answers]
        both = self.tokenizer([self.answer_lead, *texts], add_special_tokens=False)["input_ids"]
        return [ids[len(both[0]) :] for ids in both[1:]]

    def _without_terminator(self, text: str) -> str:
        """A plain answer without a terminator written behind it."""
        stripped = text.rstrip()
        end = next((end for end in self.terminators if stripped.endswith(end)), None)
        return stripped.removesuffix(end) if end else text

    def _with_system(self, prompt: str | list[Message], own: str = "") -> list[Message]:
        """A prompt as messages; in front its own system text, else the system prompt if any."""
        if isinstance(prompt, str):
            bos = self.tokenizer.bos_token if self.opens_with_bos else None
            messages: list[Message] = [{"role": "user", "content": prompt.removeprefix(bos or "")}]
        else:
            messages = prompt
        system = own or self.settings.system_prompt
        if system is None or has_system(messages):
            return messages
        return [{"role": "system", "content": system}, *messages]


def build_renderer(
    tokenizer: "PreTrainedTokenizerBase",
    settings: TemplateSettings,
    prompts: Iterable[str | list[Message]] = (),
    tools: Sequence[dict[str, Any]] = (),
) -> Renderer:
    """Choose the template, probe it, and tell whether a file's prompts are rendered already.

    Args:
        tokenizer: The model's tokenizer.
        settings: The user's settings.
        prompts: Of the file; those that are text are looked at.
        tools: As a row of the file has them: a template may not do without.

    Raises:
        ValueError: The template file cannot be used, or a setting has no effect with it.
    """
    template = choose_template(tokenizer, settings)
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    bos_ids = next(full[:i] for i in range(len(full) + 1) if full[i : i + len(plain)] == plain)
    added = tokenizer.added_tokens_decoder.values()
    special = {token.content for token in added if token.special} | {*tokenizer.all_special_tokens}
    terminators = (tokenizer.eos_token,) if tokenizer.eos_token else ()
    line, word, both = tokenizer(["\n", "a", "\na"], add_special_tokens=False)["input_ids"]
    renderer = Renderer(
        tokenizer,
        template,
        bos_ids,
        terminators,
        tuple(sorted(special)),
        answer_lead="" if line + word == both else "\n",
        seams=_seams(tokenizer),
    )
    if template.sources:
        renderer = _with_probe(renderer, tools)
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    if settings.rendered != "auto":
        return replace(renderer, is_rendered=settings.rendered == "yes")
    num_rendered = sum(looks_rendered(text, renderer.marks) for text in texts)
    return replace(renderer, is_rendered=2 * num_rendered > len(texts))


def _seams(tokenizer: "PreTrainedTokenizerBase") -> dict[int, str]:
    """Tokens in front of which text can be cut: the ids of both parts are those of the whole.

    The library `tokenizers` looks for added tokens first, in the text as it stands, and takes what
    is between them apart from the rest. That is true of a token that takes no white space in front
    of it, needs no border of words, is looked for before the text is normalised, is no part of
    another one and cannot begin in one, itself included. Tokenizers written in Python promise
    nothing.
    """
    if not tokenizer.is_fast or getattr(tokenizer, "split_special_tokens", False):
        return {}
    added = tokenizer.added_tokens_decoder
    texts = [token.content for token in added.values()]
    endings = {text[n:] for text in texts for n in range(1, len(text))}
    return {
        i: text
        for (i, token), text in zip(added.items(), texts, strict=True)
        if token.special and not (token.lstrip or token.single_word or token.normalized)
        if sum(text in other for other in texts) == 1
        if not any(text[:n] in endings for n in range(1, len(text)))
    }


def repeats_prompt(preference: Preference) -> bool:
    """Whether both answers of a row of strings begin with the whole prompt."""
    prompt, sides = preference.prompt, (preference.chosen, preference.rejected)
    if not isinstance(prompt, str) or not prompt.strip():
        return False
    return all(isinstance(side, str) and side.startswith(prompt) for side in sides)


def _check_text_stands_alone(preference: Preference, where: str) -> None:
    """Refuse columns that would go to the template beside text that needs none."""
    for column in ("system", *TEMPLATE_COLUMNS):
        if getattr(preference, column):
            raise ValueError(
                f"{where}a {column} column beside a prompt that is already rendered; put its text "
                "into the prompt and remove the column, or set rendered no if the prompt is plain"
            )


def _with_probe(renderer: Renderer, tools: Sequence[dict[str, Any]]) -> Renderer:
    """The renderer with what opens turns and what ends an answer, as its template has them.

    An ending counts only if it holds a token of its own: generation would not stop at plain text.
    A template that refuses the probe may take what the user's rows say: it teaches nothing then.
    """
    system, user, assistant = (
        {"role": "system", "content": "SystemProbe"},
        {"role": "user", "content": USER_PROBE},
        {"role": "assistant", "content": ASSISTANT_PROBE},
    )
    variables = {"tools": list(tools)} if tools else {}
    render = partial(renderer.template.render, variables=variables)
    try:
        before, has_user, rest = render([user, assistant]).partition(USER_PROBE)
    except ValueError:
        return renderer
    between, has_assistant, ending = rest.rpartition(ASSISTANT_PROBE)
    if not (has_user and has_assistant):
        raise ValueError(
            "the chat template leaves out what the user or the assistant says; "
            "name another with --chat_template FILE"
        )
    user_end, openings = "", [before, before.rstrip().rpartition("\n")[2]]
    for messages, probe in (([user], USER_PROBE), ([system, user], "SystemProbe")):
        try:
            left, _, right = render(messages).partition(probe)
        except ValueError:
            continue
        if probe == USER_PROBE:
            user_end = right
        else:
            openings.append(left)
    tokenizer = renderer.tokenizer
    added = tokenizer.added_tokens_decoder.keys() | set(tokenizer.all_special_ids)

    def holds_own_token(text: str) -> bool:
        return bool(added.intersection(tokenizer(text, add_special_tokens=False)["input_ids"]))

    bos, ending = tokenizer.bos_token or "", ending.strip()
    opens_with_bos = not bos or (before + rest).count(bos) <= 1
    openings = [text.strip() for text in openings]
    if opens_with_bos:  # which prompts may lack
        openings += [text.removeprefix(bos).strip() for text in openings]
    openings = sorted({text for text in openings if text and text != bos})
    return replace(
        renderer,
        terminators=renderer.terminators + ((ending,) if holds_own_token(ending) else ()),
        opens_with_bos=opens_with_bos,
        marks=TurnMarks(
            openings=tuple(openings),
            own_tokens=tuple(filter(holds_own_token, openings)),
            user_end=user_end.strip(),
            answer_opening=between.strip(),
        ),
    )

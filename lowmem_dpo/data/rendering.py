"""From preferences to text: which chat template is used, and what is already rendered.

Message lists go through the template. Plain strings are wrapped as one user and one assistant turn
where there is a template, and put together as they are where there is none. Two kinds of text stay
as they are: what is already rendered, with some template's marks in the prompt, and joined text,
where both answers begin with the whole prompt (as implicit prompts have it).

How a template opens a user turn and ends an answer is learnt by rendering a probe conversation, so
that rendered prompts and terminators are recognised for any template.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, TemplateError, meta

from lowmem_dpo.data.formats import Preference
from lowmem_dpo.data.messages import Message, has_system, says_nothing
from lowmem_dpo.settings.groups import TemplateSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What opens a user turn in common templates: text that holds it is rendered, for whichever model.
COMMON_TURN_OPENINGS = (
    "<|im_start|>user",  # ChatML, Qwen
    "<|start_header_id|>user",  # Llama 3
    "<start_of_turn>user",  # Gemma
    "<|turn>user",  # Gemma 4
    "<|start|>user",  # Harmony
    "<|user|>",  # Zephyr, Phi 3
    "<|USER_TOKEN|>",  # Command R
    "<｜User｜>",  # DeepSeek
    "[INST]",  # Llama 2, Mistral
    "### Instruction:",  # Alpaca
)
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")
# What the two sides say in the conversation that a template is tried on.
USER_PROBE, ASSISTANT_PROBE = "UserProbe", "AssistantProbe"
# Arguments of apply_chat_template that are set here, or that would change what it returns.
RESERVED_KWARGS = {
    *("conversation", "chat_template", "add_generation_prompt", "continue_final_message"),
    *("tokenize", "return_dict", "return_tensors", "return_assistant_tokens_mask"),
    *("tokenizer_kwargs", "padding", "truncation", "max_length", "sanitize_control_tokens"),
}


@dataclass(frozen=True)
class PairText:
    """The text of a pair.

    Attributes:
        prompt: The prompt, up to where the answer begins.
        chosen: Prompt and chosen answer.
        rejected: Prompt and rejected answer.
        by_template: Written by the template, which then writes BOS too.
        as_is: The row's text as it stands: rendered already, or answers that repeat the prompt.
    """

    prompt: str
    chosen: str
    rejected: str
    by_template: bool
    as_is: bool = False


@dataclass(frozen=True)
class Renderer:
    """A tokenizer with the template in use and what a probe taught about it.

    Attributes:
        tokenizer: The model's tokenizer.
        settings: The user's settings.
        template: Jinja source; None to join plain text.
        origin: Where the template comes from, in words.
        bos_ids: What the tokenizer puts before text of its own accord: BOS, nothing, seldom more.
        terminators: Texts that end an answer: the EOS token, the template's end of a turn.
        turn_openings: What opens a user's turn; a prompt that holds one is already rendered.
    """

    tokenizer: "PreTrainedTokenizerBase"
    settings: TemplateSettings
    template: str | None
    origin: str
    bos_ids: list[int]
    terminators: tuple[str, ...]
    turn_openings: tuple[str, ...]

    def uses_template(self, prompt: str | list[Message]) -> bool:
        """Whether a prompt goes through the template: messages, and text not yet rendered."""
        if isinstance(prompt, str):
            return self.template is not None and not self.is_rendered(prompt)
        return True

    def is_rendered(self, prompt: str) -> bool:
        """Whether a prompt string holds what opens a user's turn."""
        return any(opening in prompt for opening in self.turn_openings)

    def prompt_text(self, prompt: str | list[Message]) -> str:
        """A prompt up to where the answer begins."""
        if isinstance(prompt, str) and not self.uses_template(prompt):
            return prompt
        return self.render(self._with_system(prompt), {}, opens_answer=True)

    def pair_text(self, preference: Preference, answers_repeat_prompt: bool) -> PairText | None:
        """The text of a pair.

        Args:
            preference: A row.
            answers_repeat_prompt: The answers are joined text: they begin with the whole prompt.

        Returns:
            The text, or None if an answer is empty.
        """
        prompt, chosen, rejected = preference.prompt, preference.chosen, preference.rejected
        where = f"row {preference.row}: "
        if isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str):
            as_is = answers_repeat_prompt or self.is_rendered(prompt)
            if as_is:
                _check_text_stands_alone(preference, where)
            if answers_repeat_prompt:
                chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
            answers = self._without_terminator(chosen), self._without_terminator(rejected)
            if not all(answer.strip() for answer in answers):
                return None
            needs_template = any(getattr(preference, n) for n in ("system", *TEMPLATE_COLUMNS))
            if as_is or (self.template is None and not needs_template):
                return PairText(prompt, prompt + chosen, prompt + rejected, False, as_is)
            # The template writes the terminator.
            chosen, rejected = ([{"role": "assistant", "content": answer}] for answer in answers)
        else:
            assert not isinstance(chosen, str) and not isinstance(rejected, str)
            if says_nothing(chosen) or says_nothing(rejected):
                return None
        messages = self._with_system(prompt, preference.system)
        variables = preference.chat_template_kwargs
        if variables:
            _check_not_reserved(variables, where)
        if preference.tools:
            variables = variables | {"tools": preference.tools}
        return PairText(
            self.render(messages, variables, opens_answer=True, where=where),
            self.render(messages + chosen, variables, where=where),
            self.render(messages + rejected, variables, where=where),
            by_template=True,
        )

    def reads_column(self, preference: Preference, name: str) -> bool:
        """Whether a row's tools or chat_template_kwargs change what the template writes."""
        bare = replace(preference, **{name: type(getattr(preference, name))()})
        try:
            return self.pair_text(bare, False) != self.pair_text(preference, False)
        except ValueError:  # it cannot do without
            return True

    def render(
        self,
        messages: list[Message],
        variables: dict[str, Any],
        opens_answer: bool = False,
        where: str = "",
    ) -> str:
        """Messages as text; `opens_answer` puts behind them what opens an answer.

        Args:
            messages: The conversation.
            variables: The row's own template variables.
            opens_answer: Whether an answer is to follow.
            where: The row, for errors.

        Raises:
            ValueError: There is no template, or it complains: in one line.
        """
        if self.template is None:
            raise ValueError(
                f"{where}messages need a chat template, and none is in use ({self.origin}); "
                "name a Jinja file with --chat_template FILE"
            )
        try:
            text = self.tokenizer.apply_chat_template(
                messages,
                chat_template=self.template,
                add_generation_prompt=opens_answer,
                tokenize=False,
                **self.settings.chat_template_kwargs | variables,
            )
        except (TemplateError, TypeError, ValueError) as error:
            roles, reason = "/".join(m["role"] for m in messages), " ".join(str(error).split())
            raise ValueError(
                f"{where}the chat template cannot render the roles {roles}: {reason}; "
                "change the messages, or name another template with --chat_template FILE"
            ) from error
        assert isinstance(text, str)
        return text

    def _without_terminator(self, text: str) -> str:
        """A plain answer without a terminator written behind it."""
        stripped = text.rstrip()
        end = next((end for end in self.terminators if stripped.endswith(end)), None)
        return stripped.removesuffix(end) if end else text

    def _with_system(self, prompt: str | list[Message], own: str = "") -> list[Message]:
        """A prompt as messages; in front its own system text, else the system prompt if any."""
        if isinstance(prompt, str):  # the template writes BOS
            text = prompt.removeprefix(self.tokenizer.bos_token or "")
            messages: list[Message] = [{"role": "user", "content": text}]
        else:
            messages = prompt
        system = own or self.settings.system_prompt
        if system is None or has_system(messages):
            return messages
        return [{"role": "system", "content": system}, *messages]


def build_renderer(tokenizer: "PreTrainedTokenizerBase", settings: TemplateSettings) -> Renderer:
    """Choose the template and probe it.

    Raises:
        ValueError: The template file cannot be used, or a setting has no effect without a template.
    """
    template, origin = _choose_template(tokenizer, settings)
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    bos_ids = next(full[:i] for i in range(len(full) + 1) if full[i : i + len(plain)] == plain)
    terminators = (tokenizer.eos_token,) if tokenizer.eos_token else ()
    renderer = Renderer(
        tokenizer, settings, template, origin, bos_ids, terminators, COMMON_TURN_OPENINGS
    )
    if template is not None:
        if settings.chat_template_kwargs:
            _check_kwargs_are_read(template, settings)
        return _with_probe(renderer)
    for name in ("system_prompt", "chat_template_kwargs"):
        if getattr(settings, name):
            raise ValueError(
                f"{name} needs a chat template, and none is in use ({origin}); "
                "name a Jinja file with --chat_template FILE, or leave it out"
            )
    return renderer


def _check_kwargs_are_read(template: str, settings: TemplateSettings) -> None:
    """Refuse template variables that the template never reads, as far as plain Jinja can tell."""
    environment = Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        read = meta.find_undeclared_variables(environment.parse(template))
    except TemplateError:  # tags of transformers' own, such as {% generation %}
        return
    if unread := settings.chat_template_kwargs.keys() - read - RESERVED_KWARGS:
        raise ValueError(
            f"chat_template_kwargs {min(unread)} has no effect: the chat template does not read it"
        )


def _check_not_reserved(variables: Mapping[str, Any], where: str = "") -> None:
    """Refuse template variables that are set here."""
    if clash := sorted(RESERVED_KWARGS & variables.keys()):
        raise ValueError(
            f"{where}chat_template_kwargs cannot set {', '.join(clash)}; leave them out"
        )


def _check_text_stands_alone(preference: Preference, where: str) -> None:
    """Refuse columns that would go to the template beside text that needs none."""
    for column in ("system", *TEMPLATE_COLUMNS):
        if getattr(preference, column):
            raise ValueError(
                f"{where}a {column} column beside a prompt that is already rendered; "
                "put its text into the prompt and remove the column"
            )


def repeats_prompt(preference: Preference) -> bool:
    """Whether both answers of a row of strings begin with the whole prompt."""
    prompt, sides = preference.prompt, (preference.chosen, preference.rejected)
    if not isinstance(prompt, str) or not prompt.strip():
        return False
    return all(isinstance(side, str) and side.startswith(prompt) for side in sides)


def _choose_template(
    tokenizer: "PreTrainedTokenizerBase", settings: TemplateSettings
) -> tuple[str | None, str]:
    """Jinja source (None for plain text) and where it comes from, in words."""
    if settings.chat_template_kwargs:
        _check_not_reserved(settings.chat_template_kwargs)
    if settings.chat_template == "none":
        return None, "no chat template, as set"
    if settings.chat_template == "auto":
        if not tokenizer.chat_template:
            return None, "no chat template: the tokenizer has none"
        return tokenizer.get_chat_template(), "the tokenizer's chat template"
    path = Path(settings.chat_template)
    if not path.is_file():
        raise ValueError(
            f"chat_template must be auto, none or a Jinja file, got {settings.chat_template!r}, "
            "which is no file; check the path"
        )
    try:
        return path.read_text(encoding="utf-8-sig"), f"the chat template {path}"
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not valid UTF-8; save the template as UTF-8") from None


def _with_probe(renderer: Renderer) -> Renderer:
    """The renderer with what opens a user turn and what ends an answer, as its template has them.

    An ending counts only if it holds a token of its own: generation would not stop at plain text.
    """
    probe = [
        {"role": "user", "content": USER_PROBE},
        {"role": "assistant", "content": ASSISTANT_PROBE},
    ]
    before, user, rest = renderer.render(probe, {}).partition(USER_PROBE)
    _, assistant, ending = rest.rpartition(ASSISTANT_PROBE)
    if not (user and assistant):
        raise ValueError(
            "the chat template leaves out what the user or the assistant says; "
            "name another with --chat_template FILE"
        )
    tokenizer = renderer.tokenizer
    for token in (tokenizer.bos_token, tokenizer.eos_token):
        before = before.replace(token, "") if token else before
    opening = before.strip().rpartition("\n")[2].strip()
    ending = ending.strip()
    added = tokenizer.added_tokens_decoder.keys() | set(tokenizer.all_special_ids)
    ids = tokenizer(ending, add_special_tokens=False)["input_ids"]
    return replace(
        renderer,
        terminators=renderer.terminators + ((ending,) if added.intersection(ids) else ()),
        turn_openings=renderer.turn_openings + ((opening,) if opening else ()),
    )

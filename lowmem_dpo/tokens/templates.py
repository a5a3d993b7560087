"""The chat template in use: which one, with which date, and how it renders.

A tokenizer may bring several templates by name; rows with tools take `tool_use`, as transformers
does. Some templates write today's date: here it is the date that the renderer was built with, so
that a run which goes on tomorrow writes the same text.
"""

import datetime
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, TemplateError, meta

from lowmem_dpo.data.messages import Message
from lowmem_dpo.settings.groups import EncodingSettings, TemplateSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Arguments of apply_chat_template that are set here, or that would change what it returns.
RESERVED_KWARGS = {
    *("conversation", "chat_template", "add_generation_prompt", "continue_final_message"),
    *("tokenize", "return_dict", "return_tensors", "return_assistant_tokens_mask"),
    *("tokenizer_kwargs", "padding", "truncation", "max_length", "sanitize_control_tokens"),
}
DATE_FUNCTION = "strftime_now"  # transformers' name for it in templates
DATE_DIRECTIVES = "aAbBcCdDeFgGhHIjmMprRSTuUVwWxXyY"


@dataclass(frozen=True)
class ChatTemplate:
    """The chat template of a run, or the lack of one.

    Attributes:
        tokenizer: Whose special tokens it writes.
        settings: The user's settings.
        sources: Jinja texts by name; empty for plain text.
        origin: Where they come from, in words.
        date: What is written for today, as YYYY-MM-DD; None where no date is written.
    """

    tokenizer: "PreTrainedTokenizerBase"
    settings: TemplateSettings
    sources: dict[str, str]
    origin: str
    date: str | None

    @property
    def to_save(self) -> str | dict[str, str] | None:
        """What goes to disk beside an adapter: one text, or several by name."""
        return self.sources if len(self.sources) > 1 else next(iter(self.sources.values()), None)

    @property
    def digest(self) -> str:
        """Of the template's text; the date is not part of it."""
        return hashlib.sha256(json.dumps(self.to_save).encode()).hexdigest()

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
            variables: The row's own template variables, tools among them.
            opens_answer: Whether an answer is to follow.
            where: The row, for errors.

        Raises:
            ValueError: There is no template, or it complains: in one line.
        """
        if not self.sources:
            raise ValueError(
                f"{where}messages need a chat template, and none is in use ({self.origin}); "
                "name a Jinja file with --chat_template FILE"
            )
        name = "tool_use" if variables.get("tools") and "tool_use" in self.sources else "default"
        if name not in self.sources:
            raise ValueError(
                f"{where}the tokenizer has the chat templates {', '.join(self.sources)} and none "
                "is its default; choose one with --chat_template NAME"
            )
        try:
            text = self.tokenizer.apply_chat_template(
                messages,
                chat_template=_with_date(self.sources[name], self.date),
                add_generation_prompt=opens_answer,
                tokenize=False,
                **self.settings.chat_template_kwargs | variables,
            )
        except (TemplateError, TypeError, ValueError) as error:
            roles, reason = "/".join(m["role"] for m in messages), " ".join(str(error).split())
            stops = isinstance(self.settings, EncodingSettings) and where
            skip = ", or leave such rows out with --on_bad_row skip" if stops else ""
            raise ValueError(
                f"{where}the chat template cannot render the roles {roles}: {reason}; change the "
                f"messages, or name another template with --chat_template FILE{skip}"
            ) from error
        assert isinstance(text, str)
        return text


def choose_template(
    tokenizer: "PreTrainedTokenizerBase", settings: TemplateSettings
) -> ChatTemplate:
    """Find the template that the settings ask for.

    Raises:
        ValueError: It cannot be used, or a setting has no effect with it.
    """
    sources, origin = _sources(tokenizer, settings)
    writes_date = any(DATE_FUNCTION in source for source in sources.values())
    for name in ("system_prompt", "chat_template_kwargs", "template_date"):
        if not sources and getattr(settings, name):
            raise ValueError(
                f"{name} needs a chat template, and none is in use ({origin}); "
                "name a Jinja file with --chat_template FILE, or leave it out"
            )
    if settings.template_date and not writes_date:
        raise ValueError("template_date has no effect: the chat template does not write the date")
    check_not_reserved(settings.chat_template_kwargs)
    _check_kwargs_are_read(sources, settings)
    date = (settings.template_date or _today()) if writes_date else None
    return ChatTemplate(tokenizer, settings, sources, origin, date)


def check_not_reserved(variables: Mapping[str, Any], where: str = "") -> None:
    """Refuse template variables that are set here."""
    if clash := sorted(RESERVED_KWARGS & variables.keys()):
        raise ValueError(
            f"{where}chat_template_kwargs cannot set {', '.join(clash)}; leave them out"
        )


def _today() -> str:
    return datetime.date.today().isoformat()


def _sources(
    tokenizer: "PreTrainedTokenizerBase", settings: TemplateSettings
) -> tuple[dict[str, str], str]:
    """Jinja texts by name (none for plain text) and where they come from, in words."""
    own = tokenizer.chat_template or {}
    named = {"default": own} if isinstance(own, str) else dict(own)
    wanted = settings.chat_template
    if wanted == "none":
        return {}, "no chat template, as set"
    if wanted == "auto":
        origin = "the tokenizer's chat template"
        return named, origin if named else "no chat template: the tokenizer has none"
    if wanted in named:
        return {"default": named[wanted]}, f"the tokenizer's chat template {wanted}"
    path = Path(wanted)
    if not path.is_file():
        known = f", and no template of the tokenizer's ({', '.join(named)})" if named else ""
        raise ValueError(
            f"chat_template must be auto, none, the name of a template or a Jinja file, got "
            f"{wanted!r}, which is no file{known}; check the path"
        )
    try:
        return {"default": path.read_text(encoding="utf-8-sig")}, f"the chat template {path}"
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not valid UTF-8; save the template as UTF-8") from None


def _check_kwargs_are_read(sources: Mapping[str, str], settings: TemplateSettings) -> None:
    """Refuse template variables that no template reads, as far as plain Jinja can tell."""
    environment = Environment(extensions=["jinja2.ext.loopcontrols"])
    read: set[str] = set()
    try:
        for source in sources.values():
            read |= meta.find_undeclared_variables(environment.parse(source))
    except TemplateError:  # tags of transformers' own, such as {% generation %}
        return
    if unread := settings.chat_template_kwargs.keys() - read - RESERVED_KWARGS:
        raise ValueError(
            f"chat_template_kwargs {min(unread)} has no effect: the chat template does not read it"
        )


@lru_cache
def _with_date(source: str, date: str | None) -> str:
    """A template whose `strftime_now` writes one date, at midnight.

    transformers lets nothing but plain values into a template, so the function becomes a macro that
    puts the date's parts in place of their directives.
    """
    if date is None or DATE_FUNCTION not in source:
        return source
    day = datetime.datetime.fromisoformat(date)
    parts = {f"%{mark}": day.strftime(f"%{mark}") for mark in DATE_DIRECTIVES}
    parts |= {f"%-{mark[1]}": part.lstrip("0 ") or "0" for mark, part in parts.items()}
    parts["%%"] = "%"
    replaced = "".join(
        f" | replace({json.dumps(mark)}, {json.dumps(part)})" for mark, part in parts.items()
    )
    # The line break is the block's own: Jinja's trim_blocks takes it away.
    macro = f"{{% macro {DATE_FUNCTION}(format) %}}{{{{ format{replaced} }}}}{{% endmacro %}}\n"
    return macro + source

"""Formats: what a row may look like, and how it becomes a `Preference`.

`FORMATS` is the one table of them: a row has the first format whose columns it has and whose
`holds` is true of it; error texts and the table in docs/data.md are made of it too. What is not
known is refused by name: a file that is guessed at trains on the wrong text in silence.

Where chosen and rejected hold whole conversations, the prompt is what both begin with: whole
messages, at least up to a user's. What differs is scored, all of it. In plain strings the prompt is
the longest common text, as TRL takes it (one character less before a space); they are joined text
then and get no chat template. Where exactly that prompt ends matters little: tokens that both sides
share add the same to both log-probs.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lowmem_dpo.data.messages import (
    SYSTEM_ROLES,
    Message,
    common_messages,
    has_system,
    keys_in_words,
    read_messages,
    read_template_kwargs,
    read_tools,
)
from lowmem_dpo.data.rows import RowFault, read_text, type_in_words

Content = str | list[Message]
Sides = tuple[Content, Content, Content]  # prompt, chosen, rejected
Columns = dict[str, Any]

SIDES = ("chosen", "rejected")
# Read in every format. tools and chat_template_kwargs go to the chat template.
COMMON_COLUMNS = ("system", "tools", "chat_template_kwargs")
# Columns that change what the model reads; to drop them in silence would train on another text.
UNSUPPORTED_COLUMNS = ("image", "images", "videos", "audios")
PROMPT_ROLES = ("user", *SYSTEM_ROLES)  # of messages that no answer begins with
PROMPT_PARTS = ("instruction", "input", "history")
HH_TURN = re.compile(r"\n\n(Human|Assistant):")
HH_ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True)
class Preference:
    """One row: a prompt and two answers to it.

    Attributes:
        prompt: Plain text, or messages.
        chosen: The better answer; plain text where `prompt` is, else messages.
        rejected: The worse answer, likewise.
        row: Line in a file of lines, place in a list or data set; counted from 1.
        system: System message for a plain-text prompt; messages hold their own.
        tools: JSON schemas of the tools that the chat template shows the model.
        chat_template_kwargs: The row's own variables for the chat template.
    """

    prompt: Content
    chosen: Content
    rejected: Content
    row: int
    system: str = ""
    tools: list[dict[str, Any]] = field(default_factory=list)
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Format:
    """A layout of rows.

    Attributes:
        name: For messages.
        columns: What a row must have.
        example: A row, for docs/data.md.
        read: Prompt, chosen and rejected of a row.
        holds: What must be true of the values besides.
        parts: Further columns that are read where they are.
    """

    name: str
    columns: tuple[str, ...]
    example: str
    read: Callable[[Columns], Sides]
    holds: Callable[[Columns], bool] = lambda row: True
    parts: tuple[str, ...] = ()


def parse_row(value: Any, row: int) -> tuple[Preference, Format]:
    """Read a row.

    Args:
        value: From the file, under our names of columns.
        row: Its number.

    Returns:
        The preference, and the format it was found to have.

    Raises:
        RowFault: The row cannot be read; says why and how to mend it.
    """
    if not isinstance(value, dict):
        raise RowFault(
            f"a row must be a JSON object, got {type_in_words(value)}; {known_formats()}"
        )
    value = {name: item for name, item in value.items() if item is not None}
    found = next((f for f in FORMATS if set(f.columns) <= value.keys() and f.holds(value)), None)
    if found is None:
        raise RowFault(_what_is_missing(value))
    for column in UNSUPPORTED_COLUMNS:
        if value.get(column):
            raise RowFault(f"the column {column} is not supported yet; remove it")
    for column in PROMPT_PARTS:
        if column not in found.columns + found.parts and value.get(column):
            raise RowFault(
                f"the column {column} beside {found.columns[0]} is not supported; put it into the "
                f"prompt, or set columns {{{found.columns[0]}: {found.columns[0]}}} to leave it out"
            )
    prompt, chosen, rejected = found.read(value)
    system = read_text(value.get("system") or "", "system")
    system = system if system.strip() else ""
    if system and not isinstance(prompt, str):
        if has_system(prompt):
            raise RowFault("a system column and a system message; keep one of them")
        prompt, system = [{"role": "system", "content": system}, *prompt], ""
    tools = read_tools(value["tools"]) if "tools" in value else []
    name = "chat_template_kwargs"
    variables = read_template_kwargs(value[name]) if name in value else {}
    return Preference(prompt, chosen, rejected, row, system, tools, variables), found


def _what_is_missing(value: Columns) -> str:
    """What a row that has no format lacks, and how to mend it."""
    if {"completion", "label"} <= value.keys():
        return (
            "unpaired preferences (prompt, completion, label) are not supported yet; "
            "convert to rows of prompt, chosen and rejected"
        )
    missing = ", ".join(key for key in ("prompt", *SIDES) if key not in value)
    return (
        f"missing {missing}; found {keys_in_words(value)}; {known_formats()}; "
        "name other columns with columns {chosen: NAME}"
    )


def known_formats() -> str:
    """The columns of every format in one line."""
    sets = dict.fromkeys(", ".join(known.columns) for known in FORMATS)
    return "known are " + "; ".join(sets)


def _read_strings(row: Columns) -> Sides:
    prompt, chosen, rejected = (read_text(row[key], key) for key in ("prompt", *SIDES))
    return prompt, chosen, rejected


def _read_message_lists(row: Columns, prompt_column: str = "prompt") -> Sides:
    """A prompt and two answers, each a string, a message or a list of them."""
    prompt = read_messages(row[prompt_column], prompt_column, "user")
    return prompt, _answer(row["chosen"], "chosen"), _answer(row["rejected"], "rejected")


def _read_rejected_response(row: Columns) -> Sides:
    """A conversation whose last answer is the chosen one."""
    messages = read_messages(row["messages"], "messages", "user")
    _check_ends_in_answer(messages, "messages")
    if len(messages) == 1:
        raise RowFault("messages holds an answer alone; put the user's message before it")
    rejected = _answer(row["rejected_response"], "rejected_response")
    return messages[:-1], messages[-1:], rejected


def _read_parts(row: Columns, *keys: str) -> Sides:
    """A prompt in parts: one line each, with the turns before it in history."""
    parts = [read_text(row[key], key) for key in keys if key in row]
    prompt = "\n".join(part for part in parts if part)
    chosen, rejected = row["chosen"], row["rejected"]
    history = _history(row.get("history"))
    if not history and isinstance(chosen, str) and isinstance(rejected, str):
        return prompt, read_text(chosen, "chosen"), read_text(rejected, "rejected")
    messages = [*history, {"role": "user", "content": prompt}]
    return messages, _answer(chosen, "chosen"), _answer(rejected, "rejected")


def _history(value: Any) -> list[Message]:
    """Earlier turns: a list of pairs of what the user and the assistant said."""
    if not value:
        return []
    if not isinstance(value, list) or not all(
        isinstance(pair, list) and len(pair) == 2 for pair in value
    ):
        raise RowFault("history must be a list of pairs [user, assistant]")
    return [
        {"role": role, "content": read_text(text, f"history[{i}]")}
        for i, pair in enumerate(value)
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def _read_conversations(row: Columns) -> Sides:
    """Two whole conversations; a prompt beside them must be how they begin."""
    chosen, rejected = (_conversation(row[side], side) for side in SIDES)
    prompt = row.get("prompt")
    if isinstance(prompt, str):
        for name, messages in (("chosen", chosen), ("rejected", rejected)):
            first = next((m["content"] for m in messages if m["role"] == "user"), None)
            if first is None or first.strip() != read_text(prompt, "prompt").strip():
                raise RowFault(f"the first user message of {name} is not the prompt")
    elif prompt is not None:
        messages = read_messages(prompt, "prompt", "user")
        length = len(messages)
        for name, side in (("chosen", chosen), ("rejected", rejected)):
            if side[:length] != messages or len(side) == length:
                raise RowFault(f"{name} is a whole conversation that does not begin with prompt")
        return messages, chosen[length:], rejected[length:]
    return _split(chosen, rejected)


def _read_hh(row: Columns) -> Sides:
    """Two conversations, each as one text with the turns marked."""
    before = read_text(row.get("prompt") or "", "prompt")
    sides = [read_text(row[side], side) for side in SIDES]
    texts = [text if text.startswith(before) else before + text for text in sides]
    chosen, rejected = (_hh_turns(text, side) for text, side in zip(texts, SIDES, strict=True))
    return _split(chosen, rejected)


def _hh_turns(text: str, name: str) -> list[Message]:
    _, *turns = HH_TURN.split("\n\n" + text.lstrip())
    messages = [
        {"role": HH_ROLES[role], "content": content.strip()}
        for role, content in zip(turns[::2], turns[1::2], strict=True)
    ]
    _check_ends_in_answer(messages, name)
    return messages


def _check_sides_part(chosen: Content, rejected: Content) -> None:
    """Refuse equal sides without a prompt of their own: nothing tells where it ends."""
    if chosen == rejected:
        raise RowFault("chosen and rejected are identical; remove the row")


def _split(chosen: list[Message], rejected: list[Message]) -> Sides:
    """Whole conversations as the messages they share and what follows."""
    _check_sides_part(chosen, rejected)
    shared = common_messages(chosen, rejected)
    if not any(message["role"] == "user" for message in chosen[:shared]):
        raise RowFault(
            "chosen and rejected do not begin with the same user message, so there is no prompt; "
            "put it into a column prompt, or remove the row"
        )
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _read_joined(row: Columns) -> Sides:
    """Two texts that begin alike; the answers keep the prompt, as joined text does."""
    chosen, rejected = (read_text(row[side], side) for side in SIDES)
    _check_sides_part(chosen, rejected)
    limit = min(len(chosen), len(rejected)) - 1
    shared = next((i for i in range(limit) if chosen[i] != rejected[i]), max(limit, 0))
    if shared and chosen[shared - 1] == " ":
        shared -= 1
    if not chosen[:shared].strip():
        raise RowFault(
            "chosen and rejected do not begin with the same text, so there is no prompt; "
            "put it into a column prompt"
        )
    return chosen[:shared], chosen, rejected


def _conversation(value: Any, name: str) -> list[Message]:
    if not isinstance(value, list):
        raise RowFault(
            f"{name} must be a list of messages like the other side, got {type_in_words(value)}"
        )
    messages = read_messages(value, name, "user")
    _check_ends_in_answer(messages, name)
    return messages


def _answer(value: Any, name: str) -> list[Message]:
    """One side of a pair as messages: the answer alone, ending in an assistant turn."""
    messages = read_messages(value, name, "assistant")
    if messages[0]["role"] in PROMPT_ROLES:
        raise RowFault(
            f"{name} begins with a {messages[0]['role']} message; keep only the answer in it, or "
            "whole conversations on both sides"
        )
    _check_ends_in_answer(messages, name)
    return messages


def _check_ends_in_answer(messages: list[Message], name: str) -> None:
    if messages[-1]["role"] != "assistant":
        raise RowFault(f"{name} must end with an assistant message")


def _all_strings(row: Columns) -> bool:
    return all(isinstance(row.get(key, ""), str) for key in ("prompt", *SIDES))


def _begins_with_prompt(row: Columns) -> bool:
    """Whether both sides are lists that begin with something other than an answer."""
    firsts = [row[side][0] for side in SIDES if isinstance(row[side], list) and row[side]]
    roles = [first.get("role", first.get("from")) for first in firsts if isinstance(first, dict)]
    return len(roles) == 2 and all(role in (*PROMPT_ROLES, "human") for role in roles)


def _is_hh(row: Columns) -> bool:
    texts = [row["prompt"]] if row.get("prompt") else [row[side] for side in SIDES]
    return _all_strings(row) and all(text.lstrip().startswith("Human:") for text in texts)


FORMATS = (
    Format(
        "ShareGPT ranking",
        ("conversations", *SIDES),
        '{"conversations": [{"from": "human", "value": ...}, ...], "chosen": {"from": "gpt", ...}, '
        '"rejected": ...}',
        lambda row: _read_message_lists(row, "conversations"),
    ),
    Format(
        "Anthropic HH text",
        SIDES,
        r'{"chosen": "\n\nHuman: ...\n\nAssistant: ...", "rejected": ...}',
        _read_hh,
        _is_hh,
        ("prompt",),
    ),
    Format(
        "prompt/chosen/rejected strings",
        ("prompt", *SIDES),
        '{"prompt": "...", "chosen": "...", "rejected": "..."}',
        _read_strings,
        _all_strings,
    ),
    Format(
        "prompt and whole conversations",
        ("prompt", *SIDES),
        '{"prompt": "...", "chosen": [{"role": "user", ...}, {"role": "assistant", ...}], '
        '"rejected": [...]}',
        _read_conversations,
        _begins_with_prompt,
    ),
    Format(
        "message lists",
        ("prompt", *SIDES),
        '{"prompt": [{"role": "user", "content": "..."}], "chosen": [...], "rejected": [...]}',
        _read_message_lists,
    ),
    Format(
        "instruction and input",
        ("instruction", *SIDES),
        '{"instruction": "...", "input": "...", "history": [["...", "..."]], "chosen": "...", '
        '"rejected": "..."}',
        lambda row: _read_parts(row, "instruction", "input"),
        parts=("input", "history"),
    ),
    Format(
        "question",
        ("question", *SIDES),
        '{"system": "...", "question": "...", "chosen": "...", "rejected": "..."}',
        lambda row: _read_parts(row, "question"),
        parts=("history",),
    ),
    Format(
        "input",
        ("input", *SIDES),
        '{"input": "...", "chosen": "...", "rejected": "..."}',
        lambda row: _read_parts(row, "input"),
        parts=("history",),
    ),
    Format(
        "messages and rejected_response",
        ("messages", "rejected_response"),
        '{"messages": [..., {"role": "assistant", "content": "..."}], "rejected_response": "..."}',
        _read_rejected_response,
    ),
    Format(
        "implicit prompt, whole conversations",
        SIDES,
        '{"chosen": [{"role": "user", ...}, {"role": "assistant", ...}], "rejected": [...]}',
        _read_conversations,
        lambda row: isinstance(row["chosen"], list) or isinstance(row["rejected"], list),
    ),
    Format(
        "implicit prompt, strings",
        SIDES,
        '{"chosen": "What is rain? Water.", "rejected": "What is rain? Wind."}',
        _read_joined,
        _all_strings,
    ),
)
# Columns of which a row's prompt is made.
PROMPT_COLUMNS = {"prompt", "conversations", "messages", "question", *PROMPT_PARTS}
COLUMNS = tuple(
    dict.fromkeys([c for known in FORMATS for c in known.columns + known.parts] + [*COMMON_COLUMNS])
)

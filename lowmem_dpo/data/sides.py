"""Prompt, chosen and rejected of a row: the functions that read them, of which `FORMATS` is made.

Where chosen and rejected hold whole conversations, the prompt is what both begin with: whole
messages, at least up to a user's. What differs is scored, all of it. In plain strings the prompt is
the longest common text, as TRL takes it (one character less before a space); they are joined text
then and get no chat template. Where exactly that prompt ends matters little: tokens that both sides
share add the same to both log-probs.
"""

import re
from typing import Any

from lowmem_dpo.data.messages import (
    SYSTEM_ROLES,
    Message,
    Notes,
    common_messages,
    read_from_text,
    read_messages,
)
from lowmem_dpo.data.rows import RowFault, read_text, type_in_words

Content = str | list[Message]
Sides = tuple[Content, Content, Content]  # prompt, chosen, rejected
Columns = dict[str, Any]

SIDES = ("chosen", "rejected")
PROMPT_ROLES = ("user", *SYSTEM_ROLES)  # of messages that no answer begins with
HH_TURN = re.compile(r"\n\n(Human|Assistant):")
HH_ROLES = {"Human": "user", "Assistant": "assistant"}


def read_strings(row: Columns, notes: Notes) -> Sides:
    """Three strings."""
    prompt, chosen, rejected = (read_text(row[key], key) for key in ("prompt", *SIDES))
    return prompt, chosen, rejected


def read_message_lists(row: Columns, notes: Notes, name: str = "prompt") -> Sides:
    """A prompt and two answers, each a string, a message or a list of them."""
    prompt = read_messages(row[name], name, "user", notes)
    return prompt, _answer(row, "chosen", notes), _answer(row, "rejected", notes)


def read_context(row: Columns, notes: Notes, name: str, sides: tuple[str, str] = SIDES) -> Sides:
    """A prompt under another name, as text (with the turns before it in history) or messages."""
    if isinstance(row[name], str):
        return read_parts(row, notes, name, sides=sides)
    if row.get("history"):
        raise RowFault(f"history beside messages in {name}; put it before them")
    prompt = read_messages(row[name], name, "user", notes)
    chosen, rejected = (_answer(row, side, notes) for side in sides)
    if prompt[-1]["role"] == "assistant":
        if prompt[-1:] not in (chosen, rejected) or len(prompt) == 1:
            raise RowFault(f"{name} ends with an assistant message; end it with the user's")
        prompt = prompt[:-1]
    return prompt, chosen, rejected


def read_rejected_messages(row: Columns, notes: Notes, rejected: str) -> Sides:
    """A conversation whose last answer is the chosen one; the rejected one alone, or as well."""
    messages = read_messages(row["messages"], "messages", "user", notes)
    _check_ends_in_answer(messages, "messages")
    if len(messages) == 1:
        raise RowFault("messages holds an answer alone; put the user's message before it")
    other = read_messages(row[rejected], rejected, "assistant", notes)
    if other[0]["role"] not in PROMPT_ROLES:
        return messages[:-1], messages[-1:], _answer(row, rejected, notes)
    _check_ends_in_answer(other, rejected)
    return _split(messages, other)


def read_parts(row: Columns, notes: Notes, *keys: str, sides: tuple[str, str] = SIDES) -> Sides:
    """A prompt in parts: one line each, with the turns before it in history."""
    parts = [read_text(row[key], key) for key in keys if key in row]
    prompt = "\n".join(part for part in parts if part)
    chosen, rejected = (row[side] for side in sides)
    history = _history(row.get("history"))
    if not history and isinstance(chosen, str) and isinstance(rejected, str):
        return prompt, read_text(chosen, sides[0]), read_text(rejected, sides[1])
    messages = [*history, {"role": "user", "content": prompt}]
    return messages, _answer(row, sides[0], notes), _answer(row, sides[1], notes)


def _history(value: Any) -> list[Message]:
    """Earlier turns: a list of pairs of what the user and the assistant said."""
    if not value:
        return []
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = read_from_text(value, "history")
    if not isinstance(value, list) or not all(
        isinstance(pair, list) and len(pair) == 2 for pair in value
    ):
        raise RowFault("history must be a list of pairs [user, assistant]")
    return [
        {"role": role, "content": read_text(text, f"history[{i}]")}
        for i, pair in enumerate(value)
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def read_conversations(row: Columns, notes: Notes) -> Sides:
    """Two whole conversations; a prompt beside them must be how they begin."""
    chosen, rejected = (_conversation(row[side], side, notes) for side in SIDES)
    prompt = row.get("prompt")
    if isinstance(prompt, str):
        for name, messages in (("chosen", chosen), ("rejected", rejected)):
            first = next((m["content"] for m in messages if m["role"] == "user"), None)
            if first is None or first.strip() != read_text(prompt, "prompt").strip():
                raise RowFault(f"the first user message of {name} is not the prompt")
    elif prompt is not None:
        messages = read_messages(prompt, "prompt", "user", notes)
        length = len(messages)
        for name, side in (("chosen", chosen), ("rejected", rejected)):
            if side[:length] != messages or len(side) == length:
                raise RowFault(f"{name} is a whole conversation that does not begin with prompt")
        return messages, chosen[length:], rejected[length:]
    return _split(chosen, rejected)


def read_hh(row: Columns, notes: Notes) -> Sides:
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


def _split(chosen: list[Message], rejected: list[Message]) -> Sides:
    """Whole conversations as the messages they share and what follows."""
    shared = common_messages(chosen, rejected)
    if not any(message["role"] == "user" for message in chosen[:shared]):
        raise RowFault(
            "chosen and rejected do not begin with the same user message, so there is no prompt; "
            "put it into a column prompt, or remove the row"
        )
    return chosen[:shared], chosen[shared:], rejected[shared:]


def read_joined(row: Columns, notes: Notes) -> Sides:
    """Two texts that begin alike; the answers keep the prompt, as joined text does."""
    chosen, rejected = (read_text(row[side], side) for side in SIDES)
    limit = min(len(chosen), len(rejected)) - 1
    shared = next((i for i in range(limit) if chosen[i] != rejected[i]), max(limit, 0))
    if shared and chosen[shared - 1] == " ":
        shared -= 1
    if not chosen[:shared].strip() and chosen != rejected:
        raise RowFault(
            "chosen and rejected do not begin with the same text, so there is no prompt; "
            "put it into a column prompt"
        )
    return chosen[:shared], chosen, rejected


def _conversation(value: Any, name: str, notes: Notes) -> list[Message]:
    if not isinstance(value, list):
        raise RowFault(
            f"{name} must be a list of messages like the other side, got {type_in_words(value)}"
        )
    messages = read_messages(value, name, "user", notes)
    _check_ends_in_answer(messages, name)
    return messages


def _answer(row: Columns, name: str, notes: Notes) -> list[Message]:
    """One side of a pair as messages: the answer alone, ending in an assistant turn."""
    messages = read_messages(row[name], name, "assistant", notes)
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


def all_strings(row: Columns) -> bool:
    """Whether both sides, and the prompt if there is one, are strings."""
    return all(isinstance(row.get(key, ""), str) for key in ("prompt", *SIDES))


def begins_with_prompt(row: Columns) -> bool:
    """Whether both sides are lists that begin with something other than an answer."""
    firsts = [row[side][0] for side in SIDES if isinstance(row[side], list) and row[side]]
    roles = [first.get("role", first.get("from")) for first in firsts if isinstance(first, dict)]
    return len(roles) == 2 and all(role in (*PROMPT_ROLES, "human") for role in roles)


def is_hh(row: Columns) -> bool:
    """Whether a row holds text with the turns marked, from its beginning on."""
    texts = [row["prompt"]] if row.get("prompt") else [row[side] for side in SIDES]
    return all_strings(row) and all(text.lstrip().startswith("Human:") for text in texts)

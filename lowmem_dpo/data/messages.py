"""Messages, tools and template variables of a row: checked, and in one notation.

A message is {"role", "content"} or ShareGPT's {"from", "value"}; an assistant's may hold
`tool_calls` in place of content, as a chat template wants them. What is wrong is a `RowFault`,
whose text says what and where in the row; the caller knows the row.
"""

import json
from collections.abc import Iterable
from typing import Any

from lowmem_dpo.data.rows import RowFault, printable_line, read_text, type_in_words

Message = dict[str, Any]

ROLES = {
    "human": "user",
    "gpt": "assistant",
    "observation": "tool",
    **{role: role for role in ("user", "assistant", "system", "developer", "tool")},
}
SYSTEM_ROLES = ("system", "developer")
MAX_NAMES = 12  # of a row's keys in a message


def read_messages(value: Any, name: str, role: str) -> list[Message]:
    """Read a string (a turn of `role`), one message or a list of messages.

    Args:
        value: From the file.
        name: Of the column, for messages.
        role: Whose turn a string is.

    Returns:
        Messages with role and content; further text of theirs is kept.

    Raises:
        RowFault: The value is none of these.
    """
    if isinstance(value, str):
        return [{"role": role, "content": read_text(value, name)}]
    items = [value] if isinstance(value, dict) else value
    if not isinstance(items, list):
        raise RowFault(f"{name} must be a string or a list of messages, got {type_in_words(value)}")
    if not items:
        raise RowFault(f"{name} is an empty list; it needs at least one message")
    return [_message(item, f"{name}[{i}]") for i, item in enumerate(items)]


def _message(value: Any, name: str) -> Message:
    """A message with its keys normalised; further keys go to the template as they are."""
    if not isinstance(value, dict):
        raise RowFault(f"{name} must be a message, got {type_in_words(value)}")
    role_key, content_key = ("from", "value") if "from" in value else ("role", "content")
    calls = value.get("tool_calls")
    content = value.get(content_key)
    for key in (role_key, content_key):
        if key not in value and not (calls and key == content_key):
            raise RowFault(
                f"{name} has no {key} (found {keys_in_words(value)}); "
                "a message is role and content, or from and value"
            )
    role = read_text(value[role_key], f"{name}.{role_key}")
    if role not in ROLES:
        raise RowFault(
            f"{name} has the role {printable_line(role)!r}; known are {', '.join(ROLES)}"
        )
    if content is not None or not calls:
        content = read_text(content, f"{name}.{content_key}")
    message: Message = {"role": ROLES[role], "content": content}
    if calls:
        message["tool_calls"] = _objects(calls, f"{name}.tool_calls")
    for key, item in value.items():
        if key not in (role_key, content_key, "tool_calls") and item is not None:
            message[key] = read_text(item, f"{name}.{printable_line(key)}")
    return message


def read_tools(value: Any) -> list[dict[str, Any]]:
    """Read a column of tools: a list of JSON schemas, or JSON text of one; empty for none."""
    value = _from_json_text(value, "tools")
    return _objects(value, "tools") if value else []


def read_template_kwargs(value: Any) -> dict[str, Any]:
    """Read a row's variables for the chat template: an object, or JSON text of one."""
    name = "chat_template_kwargs"
    value = _from_json_text(value, name)
    if not value:
        return {}
    if not isinstance(value, dict):
        raise RowFault(f"{name} must be an object of names and values, got {type_in_words(value)}")
    _check_encodable(value, name)
    return value


def says_nothing(messages: list[Message]) -> bool:
    """Whether no message holds text or a tool call."""
    return not any((m["content"] or "").strip() or m.get("tool_calls") for m in messages)


def has_system(messages: list[Message]) -> bool:
    """Whether a conversation brings a system message of its own."""
    return any(message["role"] in SYSTEM_ROLES for message in messages)


def common_messages(chosen: list[Message], rejected: list[Message]) -> int:
    """Number of leading messages that two conversations share, the last of either left out."""
    limit = min(len(chosen), len(rejected)) - 1
    return next((i for i in range(limit) if chosen[i] != rejected[i]), limit)


def keys_in_words(keys: Iterable[str]) -> str:
    """Keys in one line that can be printed."""
    keys = list(keys)
    text = ", ".join(printable_line(key, 40) for key in keys[:MAX_NAMES])
    return text + (", ..." if len(keys) > MAX_NAMES else "") or "no keys"


def _from_json_text(value: Any, name: str) -> Any:
    """What JSON text holds; any other value, and blank text, as it is."""
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return json.loads(value)
    except (RecursionError, ValueError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "too deep or too long"
        raise RowFault(f"{name} is text, but no JSON ({reason})") from None


def _objects(value: Any, name: str) -> list[dict[str, Any]]:
    """A list of objects that a template can write."""
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        got = "a list of other things" if isinstance(value, list) else type_in_words(value)
        raise RowFault(f"{name} must be a list of objects, got {got}")
    _check_encodable(value, name)
    return value


def _check_encodable(value: Any, name: str) -> None:
    """Refuse values that no JSON can hold, and half characters, wherever in the value."""
    try:
        read_text(json.dumps(value, ensure_ascii=False), name)
    except (TypeError, RecursionError):
        raise RowFault(f"{name} holds something that is neither text, number nor list") from None

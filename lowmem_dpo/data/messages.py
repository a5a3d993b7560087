"""Messages, tools and template variables of a row: checked, and in one notation.

A message is {"role", "content"} or ShareGPT's {"from", "value"}; an assistant's may hold
`tool_calls` in place of content, as a chat template wants them: arguments as objects, and calls
that ms-swift and LLaMA-Factory write as turns of their own within the assistant's turn.
What is wrong is a `RowFault`, whose text says what and where in the row; the caller knows the row.
What is left out or read as something else goes into `Notes`.

Tables hold messages as text, JSON or as Python prints a list, and whole data sets were made by
tools that wrote them so. Nothing is evaluated: Python's notation is read by `ast.literal_eval`, and
only what JSON could hold too.
"""

import ast
import json
import re
import warnings
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from lowmem_dpo.data.rows import RowFault, printable_line, read_text, type_in_words

Message = dict[str, Any]

ROLES = {
    "human": "user",
    "gpt": "assistant",
    "observation": "tool",
    "tool_response": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
    **{role: role for role in ("user", "assistant", "system", "developer", "tool")},
}
SYSTEM_ROLES = ("system", "developer")
CALL_ROLES = ("function_call", "tool_call")  # turns whose text is a tool call
TEXT_PARTS = ("text", "input_text", "output_text")  # types of parts of content
# Columns and keys that change what the model reads; to leave them out would train on another text.
UNSUPPORTED = ("image", "images", "videos", "audios")
EMPTY: tuple[Any, ...] = (None, "", [], {})
# How a message or a list of them begins; NumPy's too, to be refused by name.
MESSAGES_OPENING = re.compile(r"""\s*(?:array\()?\[?\s*\{\s*["']""")
PYTHON_OPENING = re.compile(r"""\s*(?:array\()?[\[({]""")
ROLE_OF_MESSAGE = re.compile(
    r"""["'](?:role|from)["']\s*:\s*["'](?:user|human|assistant|gpt|system|developer|"""
    r"""tool|tool_call|tool_response|function_call|observation)["']"""
)
NO_COMMAS = re.compile(r"\}\s+\{")
MAX_NAMES = 12  # of a row's keys in a message


@dataclass
class Notes:
    """What reading rows left out or read as something else, to be told once a file.

    Attributes:
        decoded: Columns whose messages stood there as text, by its notation.
        kept_text: Texts that look like messages and stay text, by column.
        unused_keys: Keys of messages that are not read, and what they hold.
        said: Whole sentences.
    """

    decoded: dict[str, dict[str, None]] = field(default_factory=dict)
    kept_text: Counter[str] = field(default_factory=Counter)
    unused_keys: dict[str, str] = field(default_factory=dict)
    said: dict[str, None] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """The notes, a line each."""
        lines = [
            f"{keys_in_words(names)}: {notation} text of messages, read as messages"
            for notation, names in self.decoded.items()
        ]
        lines += [
            f"{name}: {count} texts look like messages and stay text, as most there are plain text"
            for name, count in self.kept_text.items()
        ]
        if self.unused_keys:
            keys = keys_in_words(f"{key} ({kind})" for key, kind in self.unused_keys.items())
            lines.append(f"keys of messages not used: {keys}")
        return lines + list(self.said)


def read_messages(value: Any, name: str, role: str, notes: Notes) -> list[Message]:
    """Read a string (a turn of `role`), one message or a list of messages.

    Args:
        value: From the file.
        name: Of the column, for messages.
        role: Whose turn a string is.
        notes: Takes what is left out.

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
    messages: list[Message] = []
    for i, item in enumerate(items):
        message = _message(item, f"{name}[{i}]", notes)
        is_assistants = message["role"] == "assistant"
        if is_assistants and messages and messages[-1]["role"] == "assistant" and _is_call(item):
            calls = messages[-1].get("tool_calls", [])
            messages[-1]["tool_calls"] = calls + message["tool_calls"]
        else:
            messages.append(message)
    return messages


def _is_call(item: dict[str, Any]) -> bool:
    return item.get("from", item.get("role")) in CALL_ROLES


def _message(value: Any, name: str, notes: Notes) -> Message:
    """A message with its keys normalised; further text goes to the template as it is."""
    if not isinstance(value, dict):
        raise RowFault(f"{name} must be a message, got {type_in_words(value)}")
    role_key, content_key = ("from", "value") if "from" in value else ("role", "content")
    calls, read = value.get("tool_calls"), {role_key, content_key, "tool_calls"}
    if not calls and isinstance(value.get("function_call"), dict):  # as OpenAI had it first
        calls = [_as_call(value["function_call"])]
        read.add("function_call")
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
    if role in CALL_ROLES:
        calls, content = _calls_of_turn(content, f"{name}.{content_key}"), ""
    elif content is not None or not calls:
        if isinstance(content, list) and content:
            content = _joined_parts(content, f"{name}.{content_key}", notes)
        content = read_text(content, f"{name}.{content_key}")
    message: Message = {"role": ROLES[role], "content": content}
    if calls:
        message["tool_calls"] = _tool_calls(calls, f"{name}.tool_calls", notes)
    if len(value) > 2:
        message |= _further_text(value, name, read, notes)
    return message


def _further_text(value: Message, name: str, read: set[str], notes: Notes) -> dict[str, str]:
    """The other keys of a message that hold text; what else they hold is left out and noted."""
    further = {}
    for key, item in value.items():
        if key in read:
            continue
        if isinstance(item, str):
            further[key] = read_text(item, f"{name}.{printable_line(key)}")
        elif key in UNSUPPORTED and item:
            raise RowFault(f"{name}.{key} is not supported yet; remove it")
        elif item not in EMPTY:
            notes.unused_keys[key] = type_in_words(item)
    return further


def _joined_parts(parts: list[Any], name: str, notes: Notes) -> str:
    """The text of content that stands in parts, as templates write them: one behind another."""
    texts = []
    for i, part in enumerate(parts):
        if isinstance(part, dict):
            if (kind := part.get("type", "text")) not in TEXT_PARTS or "text" not in part:
                kind = printable_line(str(kind))
                raise RowFault(
                    f"{name}[{i}] is of type {kind}; only parts with text are supported yet"
                )
            part = part["text"]
        texts.append(read_text(part, f"{name}[{i}]"))
    notes.said["content that stands in parts is read as one text, part behind part"] = None
    return "".join(texts)


def _calls_of_turn(content: Any, name: str) -> list[Any]:
    """The tool calls that are a turn's content: an object or a list of them, mostly as text."""
    calls = content
    with suppress(RowFault):
        calls = read_from_text(content, name)
    calls = calls if isinstance(calls, list) else [calls]
    functions = [call.get("function", call) if isinstance(call, dict) else {} for call in calls]
    if not calls or not all(isinstance(f, dict) and f.get("name") for f in functions):
        raise RowFault(f"{name} must be a tool call: JSON with name and arguments, or a list of it")
    return [
        _as_call({"name": f["name"], "arguments": f.get("arguments", f.get("parameters", {}))})
        for f in functions
    ]


def _as_call(function: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": function}


def _tool_calls(calls: Any, name: str, notes: Notes) -> list[dict[str, Any]]:
    """Tool calls as templates want them, arguments as objects."""
    return [_tool_call(call, notes) for call in _objects(read_from_text(calls, name), name)]


def _tool_call(call: dict[str, Any], notes: Notes) -> dict[str, Any]:
    """A tool call with its arguments as an object."""
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    text = function["arguments"]
    try:
        arguments = value_of_text(text)[0] if text.strip() else {}
    except ValueError:
        arguments = None
    if not isinstance(arguments, dict):
        notes.said["arguments of tool calls that hold no JSON object stay text"] = None
        return call
    function = function | {"arguments": arguments}
    return call | {"function": function} if "function" in call else function


def read_tools(value: Any) -> list[dict[str, Any]]:
    """Read a column of tools: a list of JSON schemas, all or each as text; empty for none."""
    value = read_from_text(value, "tools")
    if isinstance(value, list):
        value = [read_from_text(item, f"tools[{i}]") for i, item in enumerate(value)]
    return _objects(value, "tools") if value else []


def read_template_kwargs(value: Any) -> dict[str, Any]:
    """Read a row's variables for the chat template: an object, or JSON text of one."""
    name = "chat_template_kwargs"
    value = read_from_text(value, name)
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


def read_from_text(value: Any, name: str) -> Any:
    """What JSON text holds; any other value, and blank text, as it is."""
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return value_of_text(value)[0]
    except ValueError as error:
        raise RowFault(f"{name} is text, but {error}") from None


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


def looks_like_messages(value: Any) -> bool:
    """Whether a value is text that begins as a message or a list of them, and names a role."""
    return (
        isinstance(value, str)
        and MESSAGES_OPENING.match(value) is not None
        and ROLE_OF_MESSAGE.search(value) is not None
    )


def value_of_text(text: str) -> tuple[Any, str]:
    """Read a value.

    Args:
        text: From a column.

    Returns:
        The value as JSON has it, and the notation: JSON or Python.

    Raises:
        ValueError: The text is neither; says why, to stand behind "is text, but".
    """
    try:
        return json.loads(text), "JSON"
    except (RecursionError, ValueError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "too deep or too long"
        if not (PYTHON_OPENING.match(text) and "'" in text):
            raise ValueError(f"no JSON ({reason})") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd escapes in the text
            value = ast.literal_eval(text.strip())
        return json.loads(json.dumps(value)), "Python"
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        reason = " (NumPy prints arrays without commas)" if NO_COMMAS.search(text) else ""
        raise ValueError(
            f"neither JSON nor a Python list or dict{reason}; write it with json.dumps"
        ) from None

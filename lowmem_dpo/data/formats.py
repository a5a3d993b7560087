"""Preference files: what a row may look like, and how it becomes a `Preference`.

Read are local .jsonl files (one row a line) and .json files (a list of rows, or rows a line).
A row is one of

    {"prompt": "...", "chosen": "...", "rejected": "..."}       strings, message lists, or mixed
    {"conversations": [...], "chosen": ..., "rejected": ...}    ShareGPT ranking (LLaMA-Factory)

with, if need be, a column "system", and a message is {"role", "content"} or {"from", "value"}. What
is not known is refused by name, with the line it stands on: a file that is guessed at trains on the
wrong text in silence. Columns that are left unread are named.
"""

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Message = dict[str, str]

STRINGS = "prompt/chosen/rejected strings"
MESSAGES = "message lists"
SHAREGPT = "ShareGPT ranking"
KNOWN = (
    "known are prompt, chosen, rejected (strings or message lists) "
    "and conversations, chosen, rejected (ShareGPT ranking)"
)
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "observation": "tool",
    **{role: role for role in ("user", "assistant", "system", "developer", "tool")},
}
# Columns that change what the model reads; to drop them in silence would train on another text.
UNSUPPORTED_COLUMNS = ("tools", "chat_template_kwargs", "image", "images", "videos", "audios")
PROMPT_COLUMNS = ("history", "input", "instruction")  # beside a prompt: part of it, or another one


@dataclass(frozen=True)
class Preference:
    """One row: a prompt and two answers to it.

    Attributes:
        prompt: Plain text, or messages.
        chosen: The better answer; plain text where `prompt` is, else messages.
        rejected: The worse answer, likewise.
        row: Line in a file of JSON lines, place in a JSON list; counted from 1.
        system: System message for a plain-text prompt; messages hold their own.
    """

    prompt: str | list[Message]
    chosen: str | list[Message]
    rejected: str | list[Message]
    row: int
    system: str = ""


def read_preferences(path: str | Path) -> tuple[list[Preference], str]:
    """Read every row of a preference file.

    Args:
        path: A .jsonl or .json file, UTF-8.

    Returns:
        The rows in the file's order, and the name of their format with the columns not used.

    Raises:
        ValueError: The file or a row cannot be read; says which, where and how to mend it.
    """
    path = Path(path)
    _check_path(path)
    preferences: list[Preference] = []
    detected = first = ""
    unused: dict[str, None] = {}
    for row, where, value in _read_rows(path):
        preference, name = _parse_row(value, row, where)
        if not preferences:
            detected, first = name, where
        elif name != detected:
            raise ValueError(
                f"{where}: this row is {name}, but the file began with {detected} ({first}); "
                "give all rows of a file the same format"
            )
        preferences.append(preference)
        unused.update(dict.fromkeys(_unused_columns(value, name)))
    if not preferences:
        raise ValueError(f"{path}: the file holds no rows; {KNOWN}")
    return preferences, detected + (f" (columns not used: {_names(unused)})" if unused else "")


def _check_path(path: Path) -> None:
    """Refuse what is no local .jsonl or .json file."""
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; name a .jsonl or .json file in it")
    if path.suffix.lower() not in (".jsonl", ".json"):
        if not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", path.as_posix()):
            what = "no such file, and Hugging Face dataset ids are"
        else:
            what = f"{path.suffix or 'files without a suffix'} is"
        raise ValueError(f"{path}: {what} not supported yet; convert to .jsonl")
    if not path.is_file():
        raise ValueError(f"{path}: no such file; check the path")


def _read_rows(path: Path) -> Iterator[tuple[int, str, Any]]:
    """Yield number, place (for messages) and JSON value of every row."""
    if path.suffix.lower() == ".jsonl":
        with path.open("rb") as file:
            yield from _read_lines(path, file)
        return
    data = path.read_bytes()
    text = _decode(data, str(path))
    if not text.strip():
        return
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            yield from _read_lines(path, data.splitlines())
            return
        raise ValueError(
            f"{path}, line {error.lineno}: broken JSON ({error.msg}, column {error.colno}); "
            "a .json file holds one list of rows"
        ) from None
    except (RecursionError, ValueError) as error:
        raise ValueError(_unreadable(error, f"{path}, row {_failing_row(text)}")) from None
    rows = value if isinstance(value, list) else [value]
    for row, item in enumerate(rows, start=1):
        yield row, f"{path}, row {row}", item


def _read_lines(path: Path, lines: Any) -> Iterator[tuple[int, str, Any]]:
    """Yield the rows of JSON lines given as bytes; blank lines count but hold no row."""
    for row, line in enumerate(lines, start=1):
        where = f"{path}, line {row}"
        text = _decode(line, where)
        if not text.strip():
            continue
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{where}: broken JSON ({error.msg}, column {error.colno}); "
                "each line holds one row, a list of rows belongs in a .json file"
            ) from None
        except (RecursionError, ValueError) as error:
            raise ValueError(_unreadable(error, where)) from None
        yield row, where, value


def _unreadable(error: Exception, where: str) -> str:
    """What Python cannot read although it may be JSON."""
    if isinstance(error, RecursionError):
        return f"{where}: lists or objects nested too deeply; a row holds strings and messages"
    return f"{where}: a number with too many digits; write it as a string or remove it"


def _failing_row(text: str) -> int:
    """The row of a JSON list, counted from 1, at which reading fails."""
    text = text.lstrip()
    decoder, opening = json.JSONDecoder(), re.compile(r"[^\s,]")
    place, row = int(text.startswith("[")), 1
    with suppress(RecursionError, ValueError):
        while found := opening.search(text, place):
            _, place = decoder.raw_decode(text, found.start())
            row += 1
    return row


def _decode(data: bytes, where: str) -> str:
    """UTF-8 with or without a byte order mark."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: not valid UTF-8 (byte {error.start}); save the file as UTF-8"
        ) from None


def _parse_row(value: Any, row: int, where: str) -> tuple[Preference, str]:
    """A row as a `Preference`, and the name of its format."""
    if not isinstance(value, dict):
        raise ValueError(f"{where}: a row must be a JSON object, got {_kind(value)}; {KNOWN}")
    for column in UNSUPPORTED_COLUMNS:
        if value.get(column):
            raise ValueError(f"{where}: the column {column} is not supported yet; remove it")
    sides = ("chosen", "rejected")
    source = "conversations" if "conversations" in value else "prompt"
    if not {source, *sides} <= value.keys():
        raise ValueError(f"{where}: {_unknown(value)}")
    for column in PROMPT_COLUMNS if source == "prompt" else ():
        if value.get(column):
            raise ValueError(
                f"{where}: the column {column} beside prompt is not supported yet; "
                "put it into the prompt"
            )
    system = _text(value.get("system") or "", "system", where)
    system = system if system.strip() else ""
    if source == "prompt" and all(isinstance(value[key], str) for key in (source, *sides)):
        texts = [_text(value[key], key, where) for key in (source, *sides)]
        return Preference(texts[0], texts[1], texts[2], row, system), STRINGS
    messages = _messages(value[source], source, "user", where)
    chosen, rejected = (_completion(value[side], side, where) for side in sides)
    if system and messages[0]["role"] == "system":
        raise ValueError(f"{where}: a system column and a system message; keep one of them")
    if system:
        messages = [{"role": "system", "content": system}, *messages]
    return Preference(messages, chosen, rejected, row), MESSAGES if source == "prompt" else SHAREGPT


def _unused_columns(value: dict[str, Any], name: str) -> list[str]:
    """The columns of a row that hold something and are not read."""
    used = ("conversations" if name == SHAREGPT else "prompt", "chosen", "rejected", "system")
    empty: tuple[Any, ...] = (None, "", [], {})
    return [key for key, item in value.items() if key not in used and item not in empty]


def _names(keys: Iterable[str]) -> str:
    """Keys in one line that can be printed."""
    text = ", ".join(" ".join(key.split()) for key in keys)
    return text.encode("utf-8", "backslashreplace").decode("utf-8") or "no keys"


def _unknown(value: dict[str, Any]) -> str:
    """Name the format of a row that cannot be read, or what it lacks."""
    convert = "is not supported yet; convert to .jsonl rows of prompt, chosen and rejected"
    pair = {"chosen", "rejected"} <= value.keys()
    if pair and all("\n\nHuman:" in str(value[side]) for side in ("chosen", "rejected")):
        return f"the Anthropic HH layout (Human: and Assistant: in one string) {convert}"
    if pair and not value.keys() & {"question", "instruction", "input", "messages"}:
        return f"chosen and rejected without a prompt (implicit prompt) {convert}"
    if {"completion", "label"} <= value.keys():
        return f"unpaired preferences (prompt, completion, label) {convert}"
    missing = ", ".join(key for key in ("prompt", "chosen", "rejected") if key not in value)
    return f"missing {missing}; found {_names(value)}; {KNOWN}"


def _completion(value: Any, name: str, where: str) -> list[Message]:
    """One side of a pair as messages: the answer alone, ending in an assistant turn."""
    messages = _messages(value, name, "assistant", where)
    if messages[0]["role"] in ("system", "developer", "user"):
        raise ValueError(
            f"{where}: {name} begins with a {messages[0]['role']} message (whole conversations, as "
            "UltraFeedback stores them, are not supported yet); keep only the answer in it"
        )
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"{where}: {name} must end with an assistant message")
    return messages


def _messages(value: Any, name: str, role: str, where: str) -> list[Message]:
    """A string (a turn of `role`), one message or a list of messages, as role/content messages."""
    if isinstance(value, str):
        return [{"role": role, "content": _text(value, name, where)}]
    items = [value] if isinstance(value, dict) else value
    if not isinstance(items, list):
        raise ValueError(
            f"{where}: {name} must be a string or a list of messages, got {_kind(value)}"
        )
    if not items:
        raise ValueError(f"{where}: {name} is an empty list; it needs at least one message")
    return [_message(item, f"{name}[{i}]", where) for i, item in enumerate(items)]


def _message(value: Any, name: str, where: str) -> Message:
    """A message with its keys normalised; further keys with text go to the template as they are."""
    if not isinstance(value, dict):
        raise ValueError(f"{where}: {name} must be a message, got {_kind(value)}")
    keys = ("from", "value") if "from" in value else ("role", "content")
    for key in keys:
        if key not in value:
            raise ValueError(
                f"{where}: {name} has no {key} (found {_names(value)}); "
                "a message is role and content, or from and value"
            )
    role = _text(value[keys[0]], f"{name}.{keys[0]}", where)
    if role not in ROLES:
        raise ValueError(f"{where}: {name} has the role {role!r}; known are {', '.join(ROLES)}")
    message = {"role": ROLES[role], "content": _text(value[keys[1]], f"{name}.{keys[1]}", where)}
    for key, item in value.items():
        if key not in keys and item is not None:
            message[key] = _text(item, f"{name}.{key}", where)
    return message


def _text(value: Any, name: str, where: str) -> str:
    """A string that can be written as UTF-8."""
    if not isinstance(value, str):
        raise ValueError(f"{where}: {name} must be a string, got {_kind(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: {name} holds half a character (a lone surrogate, character {error.start}); "
            "remove it"
        ) from None
    return value


def _kind(value: Any) -> str:
    """The type of a JSON value in words."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number")

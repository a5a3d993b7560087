"""A row's columns under our names: from objects within objects, and from text that holds messages.

Which columns hold messages as text is decided once a file, by its first rows: an answer may well be
JSON that its user asked for.
"""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from lowmem_dpo.data.formats import ANSWER_COLUMNS, PROMPT_COLUMNS
from lowmem_dpo.data.messages import (
    EMPTY,
    MESSAGES_OPENING,
    Notes,
    keys_in_words,
    looks_like_messages,
    value_of_text,
)
from lowmem_dpo.data.rows import RowFault

MESSAGE_COLUMNS = PROMPT_COLUMNS | ANSWER_COLUMNS
OPENAI_PATH = "input.messages"


def open_columns(row: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """A row with the objects apart that a path leads into: {"a": {"b": 1}} has the column a.b.

    Args:
        row: From the file.
        columns: Our names of columns to the file's, which may be paths.

    Returns:
        The row itself where no path leads anywhere.
    """
    if not columns and "input" not in row:
        return row
    paths = [path for path in columns.values() if "." in path]
    if _holds_messages(row.get("input")):
        paths.append(OPENAI_PATH)
    for path in paths:
        steps = path.split(".")
        for i in range(1, len(steps)) if path not in row else ():
            name = ".".join(steps[:i])
            inner = _decoded(row.get(name))
            if isinstance(inner, list):
                inner = {str(place): item for place, item in enumerate(inner)}
            if isinstance(inner, dict):
                row = {key: item for key, item in row.items() if key != name}
                row |= {f"{name}.{key}": item for key, item in inner.items()}
    return row


def rename_columns(row: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """A row under our names of columns.

    Who names a column of the prompt chooses it: the others are left out.

    Args:
        row: What `open_columns` returned.
        columns: Our names of columns to the file's.

    Raises:
        RowFault: The row lacks a column that was named.
    """
    if not columns:
        return row
    for name, theirs in columns.items():
        if theirs not in row:
            close = difflib.get_close_matches(theirs[:80], list(row)[:50], 1)
            meant = f" (did you mean {keys_in_words(close)}?)" if close else ""
            raise RowFault(
                f"no column {theirs}{meant}, which columns gives for {name}; "
                f"found {keys_in_words(row)}"
            )
    chosen = PROMPT_COLUMNS if PROMPT_COLUMNS & columns.keys() else frozenset()
    kept = {
        name: item
        for name, item in row.items()
        if name not in columns.values() and name not in columns and name not in chosen
    }
    return kept | {name: row[theirs] for name, theirs in columns.items()}


def columns_of_messages(rows: Iterable[dict[str, Any]]) -> frozenset[str]:
    """The columns that hold messages as text: messages in at least half of the rows, some as text.

    Args:
        rows: The first rows of a file, under our names of columns.
    """
    rows, names = list(rows), []
    for name in MESSAGE_COLUMNS:
        values = [row[name] for row in rows if row.get(name) not in EMPTY]
        as_text = sum(map(looks_like_messages, values))
        as_lists = sum(isinstance(value, list | dict) for value in values)
        if as_text and 2 * (as_text + as_lists) >= len(values):
            names.append(name)
    return frozenset(names)


def decode_messages(row: dict[str, Any], names: frozenset[str], notes: Notes) -> dict[str, Any]:
    """A row with the messages read that stand as text in some columns.

    Args:
        row: Under our names of columns.
        names: Which columns hold messages as text.
        notes: Takes what was decoded, and what stays text although it looks like messages.

    Raises:
        RowFault: A text cannot be read.
    """
    for name, text in row.items():
        if name not in MESSAGE_COLUMNS:
            continue
        if isinstance(text, dict) and isinstance(text.get("role", text.get("from")), list):
            row = row | {name: _rows_of_lists(text)}
        if not isinstance(text, str) or not MESSAGES_OPENING.match(text):
            continue
        if name not in names:
            if looks_like_messages(text):
                notes.kept_text[name] += 1
            continue
        try:
            value, notation = value_of_text(text)
        except ValueError as error:
            raise RowFault(f"{name} is text that begins like messages, but {error}") from None
        notes.decoded.setdefault(notation, {})[name] = None
        row = row | {name: value}
    return row


def _rows_of_lists(value: dict[str, list[Any]]) -> Any:
    """Messages from an object of lists, as columnar data sets have them; another value as it is."""
    lengths = {len(item) if isinstance(item, list) else -1 for item in value.values()}
    if len(lengths) > 1:
        return value
    return [dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)]


def _holds_messages(value: Any) -> bool:
    """Whether a column is OpenAI's input: an object, or text of one, with messages in it."""
    value = _decoded(value)
    return isinstance(value, dict) and "messages" in value


def _decoded(value: Any) -> Any:
    """What text of an object or list holds; any other value as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            return value_of_text(value)[0]
        except ValueError:
            return value
    return value

"""Rows of local files, one at a time: `READERS` has the suffixes; text files may end in .gz too.

Every reader yields `Row`s: a value, or what is wrong with that row. What is wrong with one row only
is told in the row (by whoever reads its values, in a `RowFault`), so that the caller may leave it
out and go on; what ends the reading of a file is raised. No reader holds more than one row
(.parquet: one batch; a list in .json: its text), and rows and lists have an upper limit, so that a
file of any size without a line break costs one message, not the memory of the machine.
"""

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_ROW_BYTES = 64 * 2**20  # an answer of a million words has 6 MiB
# A list in a .json file is held as text beside its rows: 1 GiB costs up to 4 GiB of host memory.
MAX_JSON_BYTES = 2**30
CHUNK_BYTES = 2**20
BATCH_ROWS = 256
JSON_SPACE = re.compile(r"[ \t\r\n]*")
HALF_CHARACTERS = re.compile("[\ud800-\udfff]")
NOT_UTF8 = "not valid UTF-8; save the file as UTF-8"
DELIMITERS = {"tabs": "\t", "commas": ","}
UTF_16 = "holds NUL bytes, as UTF-16 does; save the file as UTF-8"


@dataclass(frozen=True)
class Row:
    """A row as it stands in its file.

    Attributes:
        number: Line in a file of lines, else place in the list; counted from 1.
        place: File and row in words, for messages.
        value: What it holds; a dict if all is well.
        fault: Why it cannot be read; empty if it can.
    """

    number: int
    place: str
    value: Any = None
    fault: str = ""


class RowFault(ValueError):
    """What is wrong with one row; the others may be fine."""


def read_rows(path: Path, max_row_bytes: int = MAX_ROW_BYTES) -> Iterator[Row]:
    """Read the rows of a file, by its suffix.

    Args:
        path: A file of which `is_row_file` is true.
        max_row_bytes: Longest row; in .csv counted in characters, in a .json list not looked at.

    Returns:
        The rows in the file's order; blank lines are none, but count.

    Raises:
        ValueError: The rest of the file cannot be read; names the file and the place.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; check the path")
    return _unpacked(path, READERS[_suffix(path)](path, max_row_bytes))


def is_row_file(path: Path) -> bool:
    """Whether a file's name says that it holds rows that are read here."""
    return _suffix(path) in READERS and not (_is_packed(path) and _suffix(path) == ".parquet")


def file_kinds() -> str:
    """The suffixes of files that are read here, in words."""
    return f"{', '.join(READERS)} (.gz behind it too)"


def _suffix(path: Path) -> str:
    """The suffix that says how a file's rows are written, without .gz."""
    return (path.with_suffix("") if _is_packed(path) else path).suffix.lower()


def _is_packed(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


def _open(path: Path) -> gzip.GzipFile | io.BufferedReader:
    """A file's bytes, unpacked."""
    return gzip.open(path) if _is_packed(path) else path.open("rb")


def _unpacked(path: Path, rows: Iterator[Row]) -> Iterator[Row]:
    """Rows of a file; what is wrong with the packing of a .gz file is told in one line."""
    if not _is_packed(path):
        yield from rows
        return
    place = f"{path}, line 1"
    try:
        for row in rows:
            yield row
            place = row.place
    except gzip.BadGzipFile as error:
        raise ValueError(
            f"{place}: no gzip file, or a broken one ({printable_line(str(error))}); "
            "if it is unpacked already, take .gz off its name"
        ) from None
    except (EOFError, zlib.error):
        raise ValueError(
            f"{place}: behind it the gzip file is cut off or broken; fetch it again"
        ) from None


def read_text_lines(path: Path, max_row_bytes: int = MAX_ROW_BYTES) -> Iterator[Row]:
    """The lines of a text file that are not blank, each a row whose value is its text.

    Raises:
        OSError: The file cannot be opened.
    """
    return _unpacked(path, _text_lines(path, max_row_bytes))


def _text_lines(path: Path, max_row_bytes: int) -> Iterator[Row]:
    for number, line in _lines(path, max_row_bytes):
        place = f"{path}, line {number}"
        if line is None:
            yield Row(number, place, fault=_too_long(max_row_bytes))
        elif not _is_blank(line):
            try:
                text = line.decode("utf-8-sig").strip("\r\n")
            except UnicodeDecodeError as error:
                yield Row(number, place, fault=_not_utf8(error))
            else:
                yield Row(number, place, text, UTF_16 if "\0" in text else "")


def drop_nulls(value: Any) -> Any:
    """A value without the keys that hold null.

    In columnar files every object of a column has the keys of all; null is how they lack them.
    """
    if isinstance(value, dict):
        return {key: drop_nulls(item) for key, item in value.items() if item is not None}
    return [drop_nulls(item) for item in value] if isinstance(value, list) else value


def _read_jsonl(path: Path, max_row_bytes: int) -> Iterator[Row]:
    """A row a line."""
    for number, line in _lines(path, max_row_bytes):
        place = f"{path}, line {number}"
        if line is None:
            yield Row(number, place, fault=_too_long(max_row_bytes))
        elif not _is_blank(line):
            yield Row(number, place, *_parse_line(line))


def _lines(path: Path, max_row_bytes: int) -> Iterator[tuple[int, bytes | None]]:
    """Number and bytes of every line; None for one that is too long, whose rest is passed over."""
    number = 0
    with _open(path) as file:
        while line := file.readline(max_row_bytes + 1):
            number += 1
            if len(line) <= max_row_bytes:
                yield number, line
                continue
            yield number, None
            while line and not line.endswith(b"\n"):
                line = file.readline(CHUNK_BYTES)


def _too_long(max_row_bytes: int) -> str:
    return f"longer than {max_row_bytes // 2**20} MiB without an end; give each row its own line"


def _is_blank(line: bytes) -> bool:
    return not line.removeprefix(codecs.BOM_UTF8).strip()


def _parse_line(line: bytes) -> tuple[Any, str]:
    """The JSON value of a line and an empty fault, or None and the fault."""
    try:
        return json.loads(line.decode("utf-8-sig")), ""
    except UnicodeDecodeError as error:
        return None, _not_utf8(error)
    except json.JSONDecodeError as error:
        if b"\0" in line:
            return None, UTF_16
        return None, (
            f"broken JSON ({error.msg}, column {error.colno}); "
            "each line holds one row, a list of rows belongs in a .json file"
        )
    except (RecursionError, ValueError) as error:
        return None, _unreadable(error)


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"not valid UTF-8 (byte {error.start} of the row); save the file as UTF-8"


def _unreadable(error: Exception) -> str:
    """What Python cannot read although it may be JSON."""
    if isinstance(error, RecursionError):
        return "lists or objects nested too deeply; a row holds strings and messages"
    return "a number with too many digits; write it as a string or remove it"


def _read_json(path: Path, max_row_bytes: int) -> Iterator[Row]:
    """The items of one list, one object, or rows a line that go by the name of .json."""
    lines = (line for _, line in _lines(path, max_row_bytes) if line and not _is_blank(line))
    first = next(lines, b"").removeprefix(codecs.BOM_UTF8).lstrip()
    if not first.startswith(b"[") and not _parse_line(first)[1]:
        yield from _read_jsonl(path, max_row_bytes)
        return
    # One byte a character; as UTF-8 a single emoji would make every character take four.
    with _open(path) as file, io.TextIOWrapper(file, "latin-1", newline="") as characters:
        is_short = path.stat().st_size <= MAX_JSON_BYTES
        text = characters.read(MAX_JSON_BYTES + 1) if is_short else ""
    if not is_short or len(text) > MAX_JSON_BYTES:
        raise ValueError(
            f"{path}: one list or object longer than {MAX_JSON_BYTES // 2**20} MiB, which would "
            "be held in memory whole; write it as .jsonl, each row on its own line"
        )
    yield from _json_rows(path, text.removeprefix(codecs.BOM_UTF8.decode("latin-1")))


def _json_rows(path: Path, text: str) -> Iterator[Row]:
    """The items of a list, or the one value there is.

    Args:
        path: For messages.
        text: The file's bytes as Latin-1. JSON's own signs are ASCII, so values end where they do.
    """
    row, decode = 1, json.JSONDecoder().raw_decode
    place = _behind_space(text, 0)
    is_list = text.startswith("[", place)
    try:
        place = _behind_space(text, place + is_list)
        follows = text[place : place + 1] != ("]" if is_list else "")
        while follows:
            value, end = decode(text, place)
            item, fault = text[place:end], ""
            if not item.isascii():
                value, fault = _parse_line(item.encode("latin-1"))
            yield Row(row, f"{path}, row {row}", value, fault)
            place = _behind_space(text, end)
            follows = is_list and text.startswith(",", place)
            if follows:
                row, place = row + 1, _behind_space(text, place + 1)
        if is_list and not text.startswith("]", place):
            what = "Expecting ',' delimiter" if place < len(text) else "The list has no ]"
            raise json.JSONDecodeError(what, text, place)
        place = _behind_space(text, place + is_list)
        if place < len(text):
            raise json.JSONDecodeError("Extra data", text, place)
    except json.JSONDecodeError as error:
        raise ValueError(_broken_json(path, row, error)) from None
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{path}, row {row}: {_unreadable(error)}") from None


def _behind_space(text: str, place: int) -> int:
    """The first place at or behind `place` that holds no white space."""
    space = JSON_SPACE.match(text, place)
    assert space is not None  # it matches an empty text too
    return space.end()


def _broken_json(path: Path, row: int, error: json.JSONDecodeError) -> str:
    """What is wrong with a .json file behind its first good rows, and where."""
    if "\0" in error.doc:
        return f"{path}, row {row}: {UTF_16}"
    try:
        error.doc[error.pos :].encode("latin-1").decode("utf-8")
    except UnicodeDecodeError:
        return f"{path}, row {row}: {NOT_UTF8}"
    return (
        f"{path}, line {error.lineno}: broken JSON ({error.msg}, in row {row}); "
        "a .json file holds one list of rows"
    )


def _read_csv(path: Path, max_row_bytes: int) -> Iterator[Row]:
    """The records of a table under a header, its cells apart by commas (.tsv: tabs)."""
    lines = _csv_lines(path, max_row_bytes)
    apart = "tabs" if _suffix(path) == ".tsv" else "commas"
    usual = csv.field_size_limit(max_row_bytes)
    try:
        reader = csv.reader(lines, strict=True, delimiter=DELIMITERS[apart])
        header = next(reader, [])
        _check_header(path, header, apart)
        if len(set(header)) < len(header) or (header and "" in header[1:]):
            raise ValueError(f"{path}, line 1: names of columns are empty or stand there twice")
        while True:
            number = reader.line_num + 1
            cells = next(reader, None)
            if cells is None:
                return
            if cells:
                yield _csv_row(number, f"{path}, line {number}", header, cells)
    except csv.Error as error:
        raise ValueError(
            f"{path}, line {reader.line_num}: broken CSV ({error}); cells are separated by "
            f'{apart}, those with {apart}, quotes or line breaks in "...", quotes in them doubled'
        ) from None
    finally:
        csv.field_size_limit(usual)


def _check_header(path: Path, header: list[str], apart: str) -> None:
    """Refuse a header that was read wrongly: another encoding, cells that are apart otherwise."""
    text = "".join(header)
    if HALF_CHARACTERS.search(text):
        raise ValueError(f"{path}, line 1: {NOT_UTF8}")
    if len(header) == 1 and re.search("[;\t]" if apart == "commas" else "[;,]", text):
        other = ", or name the file .tsv" if "\t" in text else ""
        raise ValueError(
            f"{path}, line 1: the header is one cell ({printable_line(text)}); "
            f"separate cells by {apart}{other}"
        )


def _csv_lines(path: Path, max_row_bytes: int) -> Iterator[str]:
    """Lines as text, with line breaks; bytes that are no UTF-8 become half characters."""
    for number, line in _lines(path, max_row_bytes):
        if line is None:
            raise ValueError(f"{path}, line {number}: {_too_long(max_row_bytes)}")
        if number == 1 and b"\0" in line:
            raise ValueError(f"{path}, line 1: {UTF_16}")
        encoding = "utf-8-sig" if number == 1 else "utf-8"
        yield line.decode(encoding, "surrogateescape")


def _csv_row(number: int, place: str, header: list[str], cells: list[str]) -> Row:
    """A record as a row."""
    if len(cells) != len(header):
        fault = f"has {len(cells)} cells, the header names {len(header)} columns"
        return Row(number, place, fault=fault + '; put cells with commas or line breaks in "..."')
    if any(map(HALF_CHARACTERS.search, cells)):
        return Row(number, place, fault=NOT_UTF8)
    return Row(number, place, dict(zip(header, cells, strict=True)))


def _read_parquet(path: Path, max_row_bytes: int) -> Iterator[Row]:
    """The rows of a Parquet file, a batch at a time."""
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=BATCH_ROWS):
                for value in batch.to_pylist():
                    number += 1
                    yield Row(number, f"{path}, row {number}", drop_nulls(value))
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = printable_line(str(error))
        raise ValueError(
            f"{path}, behind row {number}: no Parquet file, or a broken one ({reason})"
        ) from None


def printable_line(text: str, length: int = 80) -> str:
    """Text from a file in one short line that can be printed."""
    text = " ".join(text[: 4 * length].split())
    text = text if len(text) <= length else text[: length - 3] + "..."
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def read_text(value: Any, name: str) -> str:
    """A string that can be written as UTF-8."""
    if not isinstance(value, str):
        raise RowFault(f"{name} must be a string, got {type_in_words(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowFault(
            f"{name} holds half a character (a lone surrogate, character {error.start}); remove it"
        ) from None
    return value


def type_in_words(value: Any) -> str:
    """The type of a value in words."""
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    kinds |= {int: "a number", float: "a number", type(None): "null"}
    return kinds.get(type(value), f"a value of type {type(value).__name__}")


READERS: dict[str, Callable[[Path, int], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}

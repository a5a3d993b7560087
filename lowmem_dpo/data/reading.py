"""From a file, a folder or a Hugging Face data set to preferences, and what was found there.

Here rows get our names of columns, bad rows stop the run or are left out, and all rows are held to
one format.
"""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from lowmem_dpo.data.columns import (
    columns_of_messages,
    decode_messages,
    open_columns,
    rename_columns,
)
from lowmem_dpo.data.formats import (
    COLUMNS,
    COMMON_COLUMNS,
    PROMPT_COLUMNS,
    Format,
    Preference,
    close_name,
    known_formats,
    parse_row,
)
from lowmem_dpo.data.messages import EMPTY, Notes, keys_in_words
from lowmem_dpo.data.repositories import read_dataset
from lowmem_dpo.data.rows import Row, RowFault, is_row_file, read_rows

SHOWN_FAULTS = 3
# Rows of which most decide the format.
FIRST_ROWS = 100


@dataclass
class ReadReport:
    """What a source of pairs holds.

    Attributes:
        format: Name of the rows' format.
        unused: Columns that hold something and are not read.
        meant: Columns that some of these may be meant to be.
        num_rows: Rows found.
        num_skipped: Bad rows that were left out.
        faults: Place and reason of the first of them.
        notes: What was left out of messages or read as something else, in sentences.
    """

    format: str = ""
    unused: list[str] = field(default_factory=list)
    meant: dict[str, str] = field(default_factory=dict)
    num_rows: int = 0
    num_skipped: int = 0
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The report in words, a line each."""
        unused = f" (columns not used: {keys_in_words(self.unused)})" if self.unused else ""
        lines = [f"{self.num_rows - self.num_skipped} pairs, {self.format}{unused}", *self.notes]
        for theirs, ours in self.meant.items():
            theirs = keys_in_words([theirs])
            lines.append(
                f"{theirs} is not used: did you mean {ours}? then set columns {{{ours}: {theirs}}}"
            )
        if self.num_skipped:
            lines.append(f"{self.num_skipped} of {self.num_rows} rows are bad and left out, as set")
            lines += self.faults
            if self.num_skipped > len(self.faults):
                lines.append(f"... and {self.num_skipped - len(self.faults)} more")
        return lines


def is_single_file(source: str | Path) -> bool:
    """Whether a source is a file of rows; else it is a folder or a data set on the hub."""
    path = Path(source)
    return is_row_file(path) and not path.is_dir()


@dataclass(frozen=True)
class Source:
    """Rows that were found, to be read once.

    Attributes:
        name: A path or an id, as the user wrote it.
        rows: In the source's order.
        files: The files they are read from.
        fingerprint: Of a data set of the library `datasets`; empty elsewhere.
    """

    name: str
    rows: Iterator[Row]
    files: list[Path]
    fingerprint: str = ""

    def num_bytes(self) -> int:
        """Size of the files; 0 where there are none."""
        return sum(path.stat().st_size for path in self.files)

    def digest(self) -> str:
        """SHA-256 (hex) of what the rows are read from; empty where that is not known."""
        if not (self.files or self.fingerprint):
            return ""
        digest = hashlib.sha256(self.fingerprint.encode())
        for path in self.files:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()


def open_source(
    name: str | Path,
    *,
    dataset_config: str | None = None,
    split: str | None = None,
    purpose: str = "train",
) -> Source:
    """Find the rows that a source of preference pairs holds.

    Args:
        name: A file that `read_rows` reads, a folder of them or of `save_to_disk`, or a Hugging
            Face data set id.
        dataset_config: Configuration of a data set; not for single files.
        split: Split of a data set or folder; by default the one named `purpose`, or the only one.
        purpose: train or test.

    Raises:
        ValueError: There is no such source; says which and how to mend it.
    """
    if not is_single_file(name):
        return Source(str(name), *read_dataset(str(name), dataset_config, split, purpose))
    if split is not None:
        raise ValueError(f"dataset_{purpose}_split={split} has no effect on the file {name}")
    return Source(str(name), read_rows(Path(name)), [Path(name)])


def read_preferences(
    source: Source | str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    on_bad_row: str = "error",
    max_rows: int | None = None,
) -> tuple[list[Preference], ReadReport]:
    """Read the rows of a source of preference pairs.

    Args:
        source: Opened, or the name of one to open.
        columns: Our names of columns to the source's.
        on_bad_row: error stops at the first bad row, skip leaves bad rows out.
        max_rows: How many to read, the first; None for all.

    Returns:
        The rows in the source's order, and what was found.

    Raises:
        ValueError: The source or a row cannot be read; says which, where and how to mend it.
    """
    columns = columns or {}
    if unknown := [name for name in columns if name not in COLUMNS]:
        raise ValueError(
            f"columns names {keys_in_words(unknown)}, which no format reads; known are "
            f"{', '.join(COLUMNS)}; write {{our name: the file's name}}"
        )
    if not isinstance(source, Source):
        source = open_source(source)
    report = ReadReport()
    rows = islice(source.rows, max_rows)
    preferences = list(_preferences(rows, columns, on_bad_row, report))
    if not preferences and report.num_rows:
        raise ValueError(
            f"{source.name}: every one of the {report.num_rows} rows is bad; {report.faults[0]}"
        )
    if not preferences:
        raise ValueError(f"{source.name}: holds no rows, it is empty; {known_formats()}")
    return preferences, report


def _preferences(
    rows: Iterator[Row], columns: Mapping[str, str], on_bad_row: str, report: ReadReport
) -> Iterator[Preference]:
    """Yield the good rows and write the report."""
    first_rows = list(islice(rows, FIRST_ROWS))
    as_text = columns_of_messages(_good_values(first_rows, columns))
    usual = _usual_format(first_rows, columns, as_text)
    notes, unused, read = Notes(), dict[str, str](), frozenset[str]()
    for row in chain(first_rows, rows):
        report.num_rows += 1
        try:
            theirs = _columns(row, columns)
            value = theirs
            if isinstance(theirs, dict):
                value = decode_messages(rename_columns(theirs, columns), as_text, notes)
            preference, found = parse_row(value, row.number, notes)
            usual = usual or (found, row.place)
            report.format = usual[0].name
            if found is not usual[0]:
                null = ", its prompt is null" if value.get("prompt", "") is None else ""
                raise RowFault(
                    f"this row is {found.name}{null}, but others are {usual[0].name} ({usual[1]}); "
                    "give all rows of a file the same format"
                )
        except RowFault as fault:
            if on_bad_row == "error":
                raise ValueError(
                    f"{row.place}: {fault} (on_bad_row skip leaves bad rows out)"
                ) from None
            report.num_skipped += 1
            if len(report.faults) < SHOWN_FAULTS:
                report.faults.append(f"{row.place}: {fault}")
            continue
        read = read or _names_read(found, columns)
        for name, item in theirs.items():
            if name not in read and name not in unused and item not in EMPTY:
                unused[name] = close_name(name, item, _names_lacking(found, columns, value))
        yield preference
    report.unused = list(unused)
    report.meant = {name: meant for name, meant in unused.items() if meant}
    report.notes = notes.lines()


def _columns(row: Row, columns: Mapping[str, str]) -> Any:
    """A row's value, with the objects apart that a path leads into.

    Raises:
        RowFault: The row cannot be read.
    """
    if row.fault:
        raise RowFault(row.fault)
    return open_columns(row.value, columns) if isinstance(row.value, dict) else row.value


def _good_values(rows: list[Row], columns: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """What the rows hold that can be read, under our names of columns."""
    for row in rows:
        with suppress(RowFault):
            value = _columns(row, columns)
            if isinstance(value, dict):
                yield rename_columns(value, columns)


def _names_read(found: Format, columns: Mapping[str, str]) -> frozenset[str]:
    """The file's names of columns that are read."""
    read = {columns.get(name, name) for name in found.columns + found.parts + COMMON_COLUMNS}
    if PROMPT_COLUMNS & columns.keys():
        read -= PROMPT_COLUMNS - set(columns.values())
    return frozenset(read)


def _names_lacking(
    found: Format, columns: Mapping[str, str], value: Mapping[str, Any]
) -> tuple[str, ...]:
    """Our columns that a row could have beside those it has: a prompt, if it has none."""
    has_prompt = PROMPT_COLUMNS & ({*found.columns} | columns.keys())
    names = {*found.parts, *COMMON_COLUMNS, *(() if has_prompt else ("prompt",))}
    return tuple(sorted(name for name in names if name not in value))


def _usual_format(
    rows: list[Row], columns: Mapping[str, str], as_text: frozenset[str]
) -> tuple[Format, str] | None:
    """The format that most of some rows have, and where one stands; None if all are bad.

    Rows whose prompt is null have no say: they lack a prompt, they are no other layout. Where all
    prompts are null, the first good row decides.
    """
    places: dict[Format, list[str]] = {}
    for row in rows:
        with suppress(RowFault):
            for value in _good_values([row], columns):
                value = decode_messages(value, as_text, Notes())
                found = parse_row(value, row.number)[1]
                if value.get("prompt", "") is not None:
                    places.setdefault(found, []).append(row.place)
    if not places:
        return None
    usual = max(places, key=lambda found: len(places[found]))
    return usual, places[usual][0]

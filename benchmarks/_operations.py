"""What the benchmarks of single operations share: their options, and the table that they print.

A row is what one implementation took on one shape. Its results are checked first: where they are
wrong, no speed is printed and the exit code is 1.
"""

import argparse
import ctypes
import re
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from _common import (
    StepClock,
    add_memory_limit,
    attempt,
    commit,
    device_name,
    exit_code,
    hold_memory,
    peak_mib,
    reset_peak,
    write_record,
)

from lowmem_dpo.machine.device import DTYPES

NUMBER_FORMATS = {"ms": ".3f", "tflops": ".3g", "gb_per_s": ".1f", "peak_mib": ".0f"}
WIDTHS = {"op": 15, "impl": 26, "shape": 30, "dtype": 9, "device": 24}

Row = dict[str, Any]


def parse_options(
    arguments: list[str] | None,
    description: str | None,
    shapes: dict[str, list[str]],
    shape_form: str,
    shape_pattern: str,
    *,
    repeats: int,
) -> argparse.Namespace:
    """The options of a benchmark.

    Args:
        arguments: Of the command line.
        description: The benchmark's docstring.
        shapes: Those that are run by default: quick, and by kind of device.
        shape_form: What a shape looks like, in words.
        shape_pattern: The regular expression of one.
        repeats: Default number of runs that are timed.

    Returns:
        Shapes, device, dtypes (or None), repeats, memory limit and output.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", metavar="SHAPE", help=shape_form)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--quick", action="store_true", help="a toy shape, once: does it run?")
    add_memory_limit(parser)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    options.device = torch.device(options.device)
    options.shapes = options.shapes or shapes["quick" if options.quick else options.device.type]
    options.repeats = 1 if options.quick else options.repeats
    for shape in options.shapes:
        if not re.fullmatch(shape_pattern, shape):
            parser.error(f"a shape must be {shape_form}, got {shape}")
    hold_memory(parser, options, options.device)
    return options


def measure(
    impl: str,
    dtype: torch.dtype,
    check: Callable[[], tuple[dict[str, float], bool]],
    action: Callable[[], object],
    options: argparse.Namespace,
) -> Row:
    """Check, then measure memory, then time.

    Args:
        impl: Name of the implementation.
        dtype: Of its inputs.
        check: Gives the errors of its results by name, and whether they are small enough.
        action: A run.
        options: Device and repeats.

    Returns:
        Names, ms, peak_mib and errors; ms is None where `failure` says why.
    """
    device = options.device
    row: Row = {"impl": impl, "dtype": str(dtype).removeprefix("torch.")}
    row |= {"ms": None, "peak_mib": None, "device": device_name(device), "commit": commit()}

    def check_and_time() -> None:
        errors, is_right = check()
        row.update(errors)
        if is_right:
            row["peak_mib"] = extra_mib(action, device)
            row["ms"] = median_ms(action, device, options.repeats)

    row["failure"] = attempt(check_and_time) or ("wrong" if row["ms"] is None else "")
    return row


def run_table(
    op: str,
    numbers: tuple[str, ...],
    options: argparse.Namespace,
    dtypes: Iterable[str],
    rows_of: Callable[[str, torch.dtype], Iterable[Row]],
) -> int:
    """Print and record the rows of every shape and dtype.

    Args:
        op: The operation.
        numbers: Columns of the table between dtype and device.
        options: From `parse_options`.
        dtypes: Names of those that are run.
        rows_of: The rows of a shape and a dtype, as `measure` makes them.

    Returns:
        The exit code: 1 if any row was wrong or failed.
    """
    columns = ("op", "impl", "shape", "dtype", *numbers, "device", "commit")
    print_line(columns, columns)
    rows: list[Row] = []
    for shape in options.shapes:
        for dtype in dtypes:
            for row in rows_of(shape, DTYPES[dtype]):
                rows.append({"op": op, "shape": shape} | row)
                print_row(rows[-1], columns)
        if options.output:  # after every shape: a crash loses one
            settings = {name: vars(options)[name] for name in ("shapes", "repeats", "memory_limit")}
            write_record(options.output, op, options.device, settings, rows)
    return exit_code([row["failure"] for row in rows])


def print_row(row: Row, columns: tuple[str, ...]) -> None:
    """A line of the table, and below it what was wrong; no numbers of what failed."""
    values = []
    for column in columns:
        value = row[column]
        if column in NUMBER_FORMATS:
            absent = value is None or row["failure"]
            value = "-" if absent else format(value, NUMBER_FORMATS[column])
        if column == "ms" and row["failure"]:
            value = row["failure"].split(":")[0]
        values.append(value)
    print_line(columns, values)
    if row["failure"].startswith("failed"):
        print(f"  {row['failure']}")
    errors = [f"{name} {value:.1e}" for name, value in row.items() if name.endswith("error")]
    if row["failure"] == "wrong" and errors:
        print(f"  refused: {', '.join(errors)}")


def print_line(columns: Iterable[str], values: Iterable[str]) -> None:
    """Values in their columns; numbers to the right."""
    cells = [
        f"{value:>9}" if column in NUMBER_FORMATS else f"{value:<{WIDTHS.get(column, 0)}}"
        for column, value in zip(columns, values, strict=True)
    ]
    print(" ".join(cells), flush=True)


def extra_mib(action: Callable[[], object], device: torch.device) -> float | None:
    """Most memory beyond what was held before, in MiB: the card's, or the process's (on Linux)."""
    if device.type == "cpu" and sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # or memory that earlier runs freed would be used unseen
    reset_peak(device)
    before = peak_mib(device)
    action()
    after = peak_mib(device)
    return None if before is None or after is None else after - before


def median_ms(action: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median wall time; the card is idle before and after each run."""
    clock = StepClock(device)
    for _ in range(repeats):
        clock.start()
        action()
        clock.stop()
    return statistics.median(clock.steps_ms)

"""What a run says while it works: a progress bar where there is a terminal, else lines."""

import contextlib
import errno
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column


class _Console(Console):
    only_prints = False
    """Whether what is printed is all that is done, so that it ends with its reader."""

    def on_broken_pipe(self) -> None:
        """Go on: that nobody reads the output, as after `| head`, is no reason to stop a run.

        Raises:
            BrokenPipeError: If `only_prints`.
        """
        if self.only_prints:
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
        drop_output()
        note("nobody reads the output any more; going on without it")


console = _Console(highlight=False, soft_wrap=True)

SECONDS_BETWEEN_LINES = 10.0
SECONDS_BEFORE_A_WAIT_IS_SAID = 2.0


def say(message: Any = "", style: str | None = None) -> None:
    """Print a line, or anything that rich can draw; square brackets are left as they are.

    What the terminal cannot show is escaped: a path or a prompt stops no run.

    Raises:
        BrokenPipeError: If nobody reads the output of what only prints.
    """
    if isinstance(message, str):
        encoding = console.encoding
        message = message.encode(encoding, "backslashreplace").decode(encoding)
    try:
        console.print(message, style=style, markup=False)
    except BrokenPipeError:  # of a program that ends with its reader
        raise
    except OSError as error:
        drop_output()
        note(f"cannot write the output: {error.strerror}; going on without it")


@contextlib.contextmanager
def say_if_slow(message: str) -> Iterator[None]:
    """Print a line, while inside, once that has taken `SECONDS_BEFORE_A_WAIT_IS_SAID`."""
    timer = threading.Timer(SECONDS_BEFORE_A_WAIT_IS_SAID, say, [message])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def warn(message: str) -> None:
    """Print a line that the user should not miss."""
    say(f"warning: {message}", "yellow")


def note(line: str) -> None:
    """Print a line to stderr, in the program's name: what is no result of the verb."""
    with contextlib.suppress(OSError):
        print(f"lowmem_dpo: {line}", file=sys.stderr)


def drop_output() -> None:
    """Let what is still printed to stdout go nowhere."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@dataclass
class ProgressBar:
    """Progress through a known number of units; `progress` opens it.

    Attributes:
        title: What is being done.
        total: Number of units.
        unit: Their name, for the rate.
        done: Units that are done; those of before too (a resumed run).
        lines: Where there is no terminal, print a line from time to time.
        bar: What is drawn where there is a terminal.
        task: What it knows the title by.
        begun: When it was opened.
        start: Units that were done then.
        last_line: When a line was printed last.
        time_left: Predicted time to the end, as text.
    """

    title: str
    total: int
    unit: str
    done: int
    lines: bool
    bar: Progress | None
    task: TaskID
    begun: float
    start: int
    last_line: float
    time_left: str = "unknown time"

    def advance(self, units: int, note: str = "") -> None:
        """Count finished units; `note` is shown beside the bar."""
        self.done += units
        now = time.perf_counter()
        rate = (self.done - self.start) / max(now - self.begun, 1e-9)  # since the bar was opened
        if rate > 0:
            self.time_left = duration((self.total - self.done) / rate)
        note = note or f"{speed(rate)} {self.unit}/s"
        if self.bar:
            self.bar.update(self.task, completed=self.done, note=note)
        elif self.lines and (
            self.done == self.total or now - self.last_line > SECONDS_BETWEEN_LINES
        ):
            self.last_line = now
            say(f"{self.title}: {self.done}/{self.total}, {note}, {self.time_left} left")


@contextlib.contextmanager
def progress(
    title: str, total: int, unit: str, *, done: int = 0, lines: bool = True
) -> Iterator[ProgressBar]:
    """Show progress while inside; the arguments are the bar's attributes."""
    begun, bar, task = time.perf_counter(), None, TaskID(0)
    if console.is_terminal:
        one_line = Column(no_wrap=True, min_width=9)
        bar = Progress(
            TextColumn("{task.description}", table_column=one_line),
            BarColumn(bar_width=10),
            MofNCompleteColumn(table_column=one_line),
            TextColumn("{task.fields[note]}", table_column=Column(ratio=1)),
            TimeRemainingColumn(compact=True, table_column=one_line),
            console=console,
            expand=True,
        )
        bar.start()
        task = bar.add_task(title, total=total, completed=done, note="")
    try:
        yield ProgressBar(title, total, unit, done, lines, bar, task, begun, done, begun)
    finally:
        if bar:
            bar.stop()


def duration(seconds: float) -> str:
    """A time span as people say it: 42 s, 3 min 20 s, 2 h 05 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


def speed(rate: float) -> str:
    """A rate with two or three digits: 0.031, 4.2, 170."""
    return f"{rate:.0f}" if rate >= 100 else f"{rate:.2g}"


def size(num_bytes: float) -> str:
    """A number of bytes as people say it: 12 KiB, 512 MiB, 5.3 GiB."""
    mib = num_bytes / 2**20
    if mib < 1:
        return f"{num_bytes / 2**10:.0f} KiB"
    return f"{mib:.0f} MiB" if mib < 1024 else f"{mib / 1024:.1f} GiB"


def name_rows(rows: Iterable[int]) -> str:
    """Data rows for a message, in order, the first 32 of them: `data rows 3, 17`."""
    ordered = sorted(set(rows))
    named = ", ".join(map(str, ordered[:32])) + (" and more" if len(ordered) > 32 else "")
    return f"data row{'s' if len(ordered) > 1 else ''} {named}"

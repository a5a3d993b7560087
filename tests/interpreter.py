"""Cases that run in Triton's interpreter, which a process takes or leaves when it starts.

Importing torch and Triton costs more than many of the cases. So one process, started when the first
file of cases is wanted, runs all of them, file by file as they are wanted (under pytest-xdist one
for each worker). It ends with the process that started it.
"""

import contextlib
import functools
import io
import multiprocessing
import os
from multiprocessing.connection import Connection
from pathlib import Path


def assert_passes_in_the_interpreter(cases: Path) -> None:
    """Run a file of tests in Triton's interpreter; every one must pass, and none be skipped."""
    connection = _interpreting_process()
    connection.send(str(cases))
    exit_code, output = connection.recv()
    assert exit_code == 0, output[-4000:]
    assert " passed" in output
    assert "skipped" not in output


@functools.cache
def _interpreting_process() -> Connection:
    """The process that runs files of cases: it takes paths and answers as `_run_files` does."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    context.Process(target=_run_files, args=(theirs,), daemon=True).start()
    theirs.close()  # so that the end of either process is the end of the other's waiting
    return ours


def _run_files(connection: Connection) -> None:
    """Answer every path with pytest's exit code and output."""
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
    import pytest

    with contextlib.suppress(EOFError):
        while True:
            path = connection.recv()
            with contextlib.redirect_stdout(io.StringIO()) as output:
                exit_code = pytest.main(["-q", "-p", "no:cacheprovider", path])
            connection.send((int(exit_code), output.getvalue()))

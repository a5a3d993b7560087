"""Writing so that a file or folder with its final name is always whole."""

import importlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO


def replace_file(path: Path, data: bytes) -> None:
    """Write a file so that it holds the old bytes or the new ones, never half of them."""
    temporary = path.with_name(f".{path.name[:64]}.{os.getpid()}.{id(data)}.part")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def replace_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Write a folder under a temporary name, then put it in `target`'s place.

    The old folder is moved aside first and deleted last, so that a kill leaves one of them.
    """
    new, old = (target.with_name(f".{target.name}.{kind}") for kind in ("part", "old"))
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        write(new)
        if target.exists():
            os.replace(target, old)
        os.replace(new, target)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def lock_file(path: Path) -> IO[bytes] | None:
    """Hold a file until it is closed or the process ends, however it ends.

    Returns:
        The open file; None if another process holds it.
    """
    file = path.open("ab")
    try:
        if os.name == "nt":
            msvcrt = importlib.import_module("msvcrt")
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl = importlib.import_module("fcntl")
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file

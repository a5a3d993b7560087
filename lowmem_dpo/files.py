"""Writing so that a file or folder with its final name is always whole.

What is being written or deleted is hidden: `.NAME....part`, and `.NAME.old` for a folder that is
being replaced. After a kill, `recover` puts back what a replacement had moved aside and deletes the
rest.
"""

import contextlib
import errno
import importlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, BinaryIO

# On Windows nothing is replaced while a virus scanner or an indexer reads it, which is soon over.
_PATIENCE_SECONDS = 2.0 if os.name == "nt" else 0.0
_HELD_BY_ANOTHER = {errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK}


def replace_file(path: Path, data: bytes | Callable[[BinaryIO], None]) -> None:
    """Write a file so that it holds the old bytes or the new ones, never half of them.

    Args:
        path: The file.
        data: Its content, or what writes it.

    Raises:
        OSError: Naming the file; what it held before is still there.
    """
    temporary = path.with_name(f".{path.name[:64]}.{os.getpid()}.{id(data)}.part")
    try:
        with temporary.open("wb") as file:
            file.write(data) if isinstance(data, bytes) else data(file)
            file.flush()
            os.fsync(file.fileno())
        move(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):  # a full disk does not say which file it was
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def append(path: Path, data: bytes) -> None:
    """Add to a file's end, in one write; a kill or a full disk may leave the first part of it.

    Raises:
        OSError: Naming the file.
    """
    try:
        with path.open("ab") as file:
            file.write(data)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def replace_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Write a folder under a temporary name, then put it in `target`'s place.

    The old folder is moved aside first and deleted last, so that a kill leaves one of them whole:
    under its name, or for `recover` to put back.
    """
    _recover(target)
    new, old = _hidden(target, "part"), _hidden(target, "old")
    new.mkdir(parents=True)
    try:
        write(new)
        for path in (*new.rglob("*"), new):
            _sync(path)
        if target.exists():
            move(target, old)
        move(new, target)
    except BaseException:
        _recover(target)
        raise
    _sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def move(source: Path, target: Path) -> None:
    """Give a file or folder another name, and wait for those who look into it on Windows."""
    begun = time.monotonic()
    while True:
        try:
            return os.replace(source, target)
        except PermissionError:
            if time.monotonic() - begun >= _PATIENCE_SECONDS:
                raise
            time.sleep(0.05)


def remove_folder(path: Path) -> None:
    """Delete a folder so that it is never seen in part under its name."""
    hidden = _hidden(path, "part")
    shutil.rmtree(hidden, ignore_errors=True)
    move(path, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def recover(directory: Path, *names: str) -> None:
    """Clear away what a killed process left half done; nobody else may be writing there.

    Args:
        directory: The folder.
        names: How the files and folders begin that are written here.
    """
    for name in names:
        for old in directory.glob(f".{name}*.old"):
            _recover(old.with_name(old.name[1:-4]))
        for part in directory.glob(f".{name}*.part"):
            if part.is_dir():
                shutil.rmtree(part, ignore_errors=True)
            else:
                part.unlink(missing_ok=True)


class NoLocksError(OSError):
    """A file system that gives no locks to anybody, as network file systems may."""


def lock_file(path: Path) -> IO[bytes] | None:
    """Hold a file until `unlock_file`, or until the process ends, however it ends.

    Returns:
        The open file; None if another process holds it.

    Raises:
        NoLocksError: If nobody can hold it.
        OSError: If it cannot be written.
    """
    while True:
        file = path.open("ab")
        try:
            if os.name == "nt":
                msvcrt = importlib.import_module("msvcrt")
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                fcntl = importlib.import_module("fcntl")
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            if error.errno in _HELD_BY_ANOTHER:
                return None
            why = f"its file system gives no locks ({error.strerror})"
            raise NoLocksError(error.errno, why, str(path)) from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # its holder deleted it between our opening and our locking it


def unlock_file(file: IO[bytes]) -> None:
    """Let go of what `lock_file` gave, and delete it."""
    path = Path(file.name)
    if os.name == "nt":  # an open file cannot be deleted there
        file.close()
    with contextlib.suppress(OSError):
        path.unlink()
    file.close()


@contextlib.contextmanager
def in_use(path: Path) -> Iterator[None]:
    """Let `is_in_use` say so of a file or folder while inside, where the file system gives locks.

    Any number of processes may use it.
    """
    lock = None
    with contextlib.suppress(OSError):  # a folder that cannot be written holds nothing to lose
        path.parent.mkdir(parents=True, exist_ok=True)
        is_in_use(path)
        lock = lock_file(path.with_name(f".{path.name}.{os.getpid()}.lock"))
    try:
        yield
    finally:
        if lock is not None:
            unlock_file(lock)


def is_in_use(path: Path) -> bool:
    """Whether a process holds a file or folder by `in_use`; locks that a kill left are deleted."""
    held = [is_held(lock) for lock in path.parent.glob(f".{path.name}.*.lock")]
    return any(held)


def is_held(path: Path) -> bool:
    """Whether a process holds a file by `lock_file`; if not, it is deleted."""
    with contextlib.suppress(OSError):
        if path.exists():
            if (lock := lock_file(path)) is None:
                return True
            unlock_file(lock)
    return False


def cache_folder(given: str | None) -> Path:
    """The folder of caches: the one given, that of the environment, or the usual one."""
    in_environment = os.environ.get("LOWMEM_DPO_CACHE")
    return Path(given or in_environment or Path.home() / ".cache" / "lowmem_dpo")


def _hidden(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.{kind}")


def _recover(target: Path) -> None:
    """Put an old folder back if its replacement never arrived; delete what is left over."""
    old = _hidden(target, "old")
    if old.exists() and not target.exists():
        move(old, target)
    for leftover in (_hidden(target, "part"), old):
        shutil.rmtree(leftover, ignore_errors=True)


def _sync(path: Path) -> None:
    """Let a file's content, or the names in a folder, outlast a power cut."""
    with contextlib.suppress(OSError):  # Windows syncs neither through a handle for reading
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

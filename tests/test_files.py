import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lowmem_dpo.files import (
    NoLocksError,
    append,
    lock_file,
    recover,
    replace_file,
    replace_folder,
    unlock_file,
)


def interrupted(*arguments):
    raise KeyboardInterrupt


def test_replace_file_leaves_the_old_bytes_and_no_litter_when_interrupted(tmp_path, monkeypatch):
    path = tmp_path / "file"
    replace_file(path, b"old")
    monkeypatch.setattr("os.fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        replace_file(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_replace_folder_puts_the_new_one_in_place_of_the_old(tmp_path):
    target = tmp_path / "best"
    for content in ("first", "second"):
        replace_folder(target, lambda folder, text=content: (folder / "a").write_text(text))
    assert (target / "a").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_replace_folder_keeps_the_old_one_when_interrupted(tmp_path):
    target = tmp_path / "best"
    replace_folder(target, lambda folder: (folder / "a").write_text("old"))
    with pytest.raises(KeyboardInterrupt):
        replace_folder(target, interrupted)
    assert (target / "a").read_text() == "old" and list(tmp_path.iterdir()) == [target]


def test_lock_file_holds_against_another_process_until_it_is_closed(tmp_path):
    path = tmp_path / ".lock"
    code = "from pathlib import Path; from lowmem_dpo.files import lock_file; "
    code += f"print(lock_file(Path({str(path)!r})) is None)"

    def refused() -> bool:
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        return {"True\n": True, "False\n": False}[run.stdout]

    lock = lock_file(path)
    assert refused()
    unlock_file(lock)
    assert not path.exists() and not refused()


@pytest.mark.skipif(os.name == "nt", reason="locks by another function there")
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_lock_file_tells_a_file_system_without_locks_from_a_held_one(tmp_path, monkeypatch, number):
    def refuse(*arguments):
        raise OSError(number, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(NoLocksError, match=r"gives no locks \(No locks available\)"):
        lock_file(tmp_path / ".lock")
    number = errno.EWOULDBLOCK
    assert lock_file(tmp_path / ".lock") is None


def die_at(number: int) -> None:
    """Let this process end, as by kill -9, before its n-th change to the file system."""
    left = number

    def hook(event, arguments):
        nonlocal left
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes or event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir"):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def killed(action, number: int) -> bool:
    """Whether an action in a fork of this process reached its n-th change, and died there."""
    pid = os.fork()
    if pid == 0:
        try:
            die_at(number)
            action()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


@pytest.mark.skipif(os.name == "nt", reason="an open file cannot be deleted there")
def test_lock_file_is_not_content_with_a_file_that_its_holder_deleted(tmp_path, monkeypatch):
    path = tmp_path / ".lock"
    opened = Path.open
    holders = [lock_file(path)]

    def open_before_the_holder_lets_go(self, mode):
        file = opened(self, mode)
        if holders:
            unlock_file(holders.pop())
        return file

    monkeypatch.setattr(Path, "open", open_before_the_holder_lets_go)
    lock = lock_file(path)
    monkeypatch.undo()
    assert os.path.samestat(os.fstat(lock.fileno()), path.stat())
    assert lock_file(path) is None
    lock.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_at_any_change_leaves_one_whole_folder_once_recovered(tmp_path):
    def write(text):
        def files(folder):
            for name in ("a", "b"):
                replace_file(folder / name, text)

        return files

    seen, number = set(), 0
    while number < 50:
        number += 1
        root = tmp_path / str(number)
        root.mkdir()
        replace_folder(root / "best", write(b"old"))
        if not killed(lambda root=root: replace_folder(root / "best", write(b"new")), number):
            break
        if number % 2:  # the next replacement recovers by itself
            recover(root, "best")
            assert [path.name for path in root.iterdir()] == ["best"]
            a, b = ((root / "best" / name).read_bytes() for name in ("a", "b"))
            assert a == b
            seen.add(a)
        else:
            with pytest.raises(KeyboardInterrupt):
                replace_folder(root / "best", interrupted)
            assert [path.name for path in root.iterdir()] == ["best"]
            seen.add((root / "best" / "a").read_bytes())
    assert seen == {b"old", b"new"} and 8 < number < 50


def test_replace_folder_puts_the_old_one_back_if_the_new_one_cannot_be_moved(tmp_path, monkeypatch):
    target = tmp_path / "best"
    replace_folder(target, lambda folder: (folder / "a").write_text("old"))
    replace = os.replace

    def failing(source, to):
        if str(source).endswith(".part"):
            raise OSError(5, "Input/output error")
        replace(source, to)

    monkeypatch.setattr("os.replace", failing)
    with pytest.raises(OSError, match="Input/output"):
        replace_folder(target, lambda folder: (folder / "a").mkdir())
    assert (target / "a").read_text() == "old" and list(tmp_path.iterdir()) == [target]


def test_recover_leaves_what_is_not_its_own(tmp_path):
    for name in (".bashrc.old", ".mine.part"):
        (tmp_path / name).write_text("precious")
    (tmp_path / ".best.part").mkdir()
    (tmp_path / ".run.json.12.34.part").write_text("half")
    recover(tmp_path, "best", "run.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".bashrc.old", ".mine.part"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_append_to_a_full_disk_names_the_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as caught:
        append(path, b"line\n")
    assert caught.value.filename == str(path)


def test_replace_file_on_a_full_disk_names_the_file_and_keeps_the_old_bytes(tmp_path, monkeypatch):
    path = tmp_path / "file"
    replace_file(path, b"old")
    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left") as caught:
        replace_file(path, b"new")
    assert caught.value.filename == str(path) and caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def full_disk(*arguments):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_replace_file_closes_before_it_replaces(tmp_path, monkeypatch):
    """An open file cannot be replaced on Windows."""
    opened, real_open, real_replace = [], Path.open, os.replace

    def open_file(path, *arguments, **settings):
        opened.append(real_open(path, *arguments, **settings))
        return opened[-1]

    def replace(source, target):
        assert opened and all(file.closed for file in opened)
        real_replace(source, target)

    monkeypatch.setattr(Path, "open", open_file)
    monkeypatch.setattr("os.replace", replace)
    replace_file(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"


@pytest.mark.parametrize("patience", [0.0, 5.0])
def test_replace_file_waits_where_a_scanner_may_hold_the_target(tmp_path, monkeypatch, patience):
    real, refusals = os.replace, [PermissionError(13, "in use"), PermissionError(13, "in use")]

    def replace(source, target):
        if refusals:
            raise refusals.pop()
        real(source, target)

    monkeypatch.setattr("os.replace", replace)
    monkeypatch.setattr("lowmem_dpo.files._PATIENCE_SECONDS", patience)
    if patience:
        replace_file(tmp_path / "file", b"new")
        assert (tmp_path / "file").read_bytes() == b"new"
    else:
        with pytest.raises(PermissionError):
            replace_file(tmp_path / "file", b"new")
        assert list(tmp_path.iterdir()) == []

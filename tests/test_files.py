import subprocess
import sys

import pytest

from lowmem_dpo.files import lock_file, replace_file, replace_folder


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
    lock.close()
    assert not refused()

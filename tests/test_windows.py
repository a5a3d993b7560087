"""What would stop a run on Windows: POSIX modules, terminals without Unicode, no Triton."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_structure import PACKAGES, source_files

ROOT = Path(__file__).parent.parent
# Replacing is os.replace's: os.rename fails on Windows where the target is there already.
POSIX_ONLY = {"os.fork", "os.rename", "os.geteuid"}


def modules() -> dict[str, Path]:
    """Every module of both packages by its name."""
    return {
        ".".join(path.relative_to(folder.parent).with_suffix("").parts).removesuffix(
            ".__init__"
        ): path
        for folder in PACKAGES.values()
        for path in sorted(folder.rglob("*.py"))
        if path.name != "__main__.py"
    }


def needs_triton(path: Path) -> bool:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = [a.name for node in tree.body if isinstance(node, ast.Import) for a in node.names]
    return "triton" in names


def python(code: str, **variables: str) -> subprocess.CompletedProcess[bytes]:
    paths = os.pathsep.join(str(folder.parent) for folder in PACKAGES.values())
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)


@pytest.mark.parametrize(
    "triton",
    [pytest.param(True, id="triton", marks=pytest.mark.slow), pytest.param(False, id="no triton")],
)
def test_every_module_is_imported_without_what_windows_lacks(triton):
    names = [name for name, path in modules().items() if triton or not needs_triton(path)]
    assert len(names) > 50 and "lowmem_dpo.cli" in names
    blocked = ["fcntl", "resource"] + ([] if triton else ["triton"])
    # Libraries whose Linux builds need them have other files on Windows: they are imported before.
    code = f"""
import contextlib, importlib, os, sys
for name in ("filelock", "psutil", "torch"):
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
for name in {blocked}:
    sys.modules[name] = None
del os.fork
for name in {names}:
    importlib.import_module(name)
"""
    result = python(code)
    assert result.returncode == 0 and not result.stderr, result.stderr.decode()


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_sources_neither_fork_nor_rename(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
            assert "multiprocessing" not in names, f"{path}:{node.lineno}"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert f"{node.value.id}.{node.attr}" not in POSIX_ONLY, f"{path}:{node.lineno}"


@pytest.fixture
def foreign_pairs(tmp_path) -> Path:
    """Pairs, in a folder, that no Western Windows code page can write."""
    path = tmp_path / "日本" / "pairs.jsonl"
    path.parent.mkdir()
    row = '{"prompt": "%d 天気は? 🌧", "chosen": "雨 🌧🌧", "rejected": "晴れ — naïve"}\n'
    path.write_text("".join(row % i for i in range(4)), encoding="utf-8")
    return path


@pytest.mark.slow
def test_terminals_without_unicode_get_help_previews_and_progress(
    llama_dir, foreign_pairs, tmp_path
):
    run = ["train", "--model", str(llama_dir), "--data", str(foreign_pairs), "--batch_size", "2"]
    commands = [
        ["train", "--help"],
        ["demo", "--help"],
        [*run, "--output_dir", str(tmp_path / "outputs-é日")],
        ["generate", "--adapter", str(tmp_path / "outputs-é日" / "best"), "--prompt", "雨 🌧"],
    ]
    commands[-1] += ["--max_new_tokens", "4"]
    code = f"""
import sys
from lowmem_dpo.cli import main
codes = [main(words) for words in {commands!r}]
sys.exit(codes != [0, 0, 0, 0])
"""
    # FORCE_COLOR lets rich take the pipe for a terminal, and draw its progress bar.
    narrow = {"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0", "FORCE_COLOR": "1"}
    result = python(code, **narrow)
    assert result.returncode == 0 and b"Traceback" not in result.stderr, result.stderr.decode()
    printed = result.stdout.decode("cp1252")
    assert "--learning_rate" in printed and "step zero" in printed
    assert r"\u5929\u6c17\u306f? \U0001f327" in printed  # of the preview
    assert "training  \x1b" in printed and "2/2" in printed  # of the progress bar
    assert r"prompt: \u96e8 \U0001f327" in printed


def test_say_writes_escapes_to_a_narrow_terminal_that_nobody_prepared():
    code = """
from lowmem_dpo.console import say, warn
say("日本 [x]")
warn("naïve 🌧")
"""
    result = python(code, PYTHONIOENCODING="cp1252", PYTHONUTF8="0")
    assert result.returncode == 0, result.stderr
    assert r"\u65e5\u672c [x]" in result.stdout.decode("cp1252")
    assert r"naïve \U0001f327" in result.stdout.decode("cp1252")

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from lowmem_dpo.cli import main
from lowmem_dpo.files import in_use, is_in_use, lock_file, unlock_file
from lowmem_dpo.pipeline import cache as cache_verb
from lowmem_dpo.reference.cache import ReferenceCache
from lowmem_dpo.tokens.cache import code_digest, read_entry, write_entry
from lowmem_dpo.tokens.trees import TokenPair, build_tree
from lowmem_dpo.training import fit
from lowmem_dpo_kernels import NUMERICS_VERSION
from tests.errors import one_line_error
from tests.weights.loading_lines import load_and_listen

A_DAY = 24 * 3600
PAIRS = f"{'1' * 32}.npz"
KEYS = ["a" * 64, "b" * 64, "c" * 64]


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def run(folder, capsys):
    """Run the verb; gives what it printed."""

    def run(*words: str, code: int = 0) -> str:
        assert main(["cache", "--cache_dir", str(folder), *words]) == code
        return capsys.readouterr().out

    return run


def copy_of(source: Path, folder: Path) -> Path:
    """Load a base, so that its quantised copy is made or used."""
    options = {"quantization": "nf4", "dtype": torch.float32, "cache_dir": folder}
    identity = load_and_listen(source, **options).identity
    (copy,) = (folder / "models").glob(f"{identity[:32]}-*")
    return copy


def shard(folder: Path, key: str, *, kernels: int = NUMERICS_VERSION, base: str = "x") -> Path:
    """Write a shard of a reference; gives its file."""
    reference = ReferenceCache(folder, {"base": base}, f"org/{base}")
    before = set(reference.directory.glob("*.safetensors"))
    reference.write({key: torch.zeros(3)}, {"kernels": kernels, "pack_tokens": 8})
    (path,) = set(reference.directory.glob("*.safetensors")) - before
    return path


def leave_unused(path: Path, days: float) -> None:
    """Let a file, or all in a folder, be as old as that."""
    then = time.time() - days * A_DAY
    for each in (path, *path.rglob("*")):
        os.utime(each, (then, then))


def encoded(folder: Path, code: str | None = None) -> Path:
    """Encoded pairs of a file of that name."""
    path = folder / "pairs" / PAIRS
    tree = build_tree(TokenPair(1, [1, 2], [1, 3], 1, 1))
    write_entry(path, [tree], {"source": "/home/x.jsonl", "code": code or code_digest()})
    return path


def files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


def bytes_in(*paths: Path) -> int:
    found = [file for path in paths for file in (path.rglob("*") if path.is_dir() else [path])]
    return sum(file.stat().st_size for file in found if file.is_file())


def test_list_names_kind_owner_day_and_size(tiny_checkpoint, folder, run, monkeypatch):
    monkeypatch.setattr(cache_verb, "size", lambda nbytes: f"{nbytes} bytes")
    source, _ = tiny_checkpoint()
    copy, reference = copy_of(source, folder), shard(folder, KEYS[0]).parent
    pairs = encoded(folder)
    leave_unused(reference, days=40)
    printed = run()
    used = time.strftime("%Y-%m-%d", time.localtime(time.time() - 40 * A_DAY))
    today = time.strftime("%Y-%m-%d", time.localtime((copy / "manifest.json").stat().st_mtime))
    assert f"cache {folder}\n" in printed
    assert f"{used}  {bytes_in(reference)} bytes  reference: org/x\n" in printed
    assert f"{today}  {bytes_in(copy)} bytes  quantised copy: {source}\n" in printed
    assert f"{pairs.stat().st_size} bytes  encoded pairs: /home/x.jsonl\n" in printed
    assert f"total: {bytes_in(folder)} bytes in 3 entries\n" in printed
    assert "--prune" not in printed


def test_prune_removes_nothing_that_a_run_may_read(tiny_checkpoint, folder, run):
    copy_of(tiny_checkpoint()[0], folder)
    shard(folder, KEYS[0])
    encoded(folder)
    (folder / "digests.json").write_text("{}", encoding="utf-8")
    before = files(folder)
    assert f"freed 0 KiB in 0 entries of {folder}" in run("--prune")
    assert files(folder) == before


def harmed(copy: Path) -> Path:
    (copy / "manifest.json").write_text("{}", encoding="utf-8")
    return copy


def without_a_layer(copy: Path) -> Path:
    (copy / "model.layers.0.safetensors").unlink()
    return copy


def earlier(copy: Path) -> Path:
    (copy / "manifest.json").rename(copy / "digests.json")
    return copy.rename(copy.with_name("0" * 64))


@pytest.mark.parametrize(
    ("harm", "why"),
    [(harmed, "damaged"), (without_a_layer, "damaged"), (earlier, "of an earlier release")],
)
def test_prune_removes_a_copy_that_would_be_made_again(
    tiny_checkpoint, folder, run, monkeypatch, harm, why
):
    monkeypatch.setattr(cache_verb, "size", lambda nbytes: f"{nbytes} bytes")
    copy = harm(copy_of(tiny_checkpoint()[0], folder))
    size = bytes_in(copy)
    assert f"of no use: {size} bytes in 1 entry; --prune removes that" in run()
    assert copy.exists()
    printed = run("--prune")
    assert f"({why})" in printed and f"freed {size} bytes in 1 entry" in printed
    assert not list((folder / "models").iterdir())


def test_prune_removes_copies_of_bases_that_are_gone_or_another_now(
    tiny_checkpoint, folder, run, tmp_path
):
    gone, _ = tiny_checkpoint(name="gone")
    of_gone = copy_of(gone, folder)
    changed, _ = tiny_checkpoint(name="changed", initializer_range=0.1)
    of_before = copy_of(changed, folder)
    leave_unused(of_before, days=1)
    shutil.rmtree(changed)
    tiny_checkpoint(name="changed", initializer_range=0.2)
    kept = copy_of(changed, folder)
    shutil.rmtree(gone)
    printed = run("--prune")
    assert f"quantised copy: {gone} (its base is gone)" in printed
    assert f"quantised copy: {changed} (its base has changed)" in printed
    assert not of_gone.exists() and not of_before.exists() and kept.exists()


def test_copy_of_another_quantiser_is_of_no_use(tiny_checkpoint, folder, run, monkeypatch):
    copy_of(tiny_checkpoint()[0], folder)
    monkeypatch.setattr(cache_verb, "QUANTISER_VERSION", 99)
    assert "(of an earlier release)" in run()


def test_prune_removes_shards_of_other_kernels_and_damaged_ones_alone(folder, run):
    good, old = shard(folder, KEYS[0]), shard(folder, KEYS[1], kernels=NUMERICS_VERSION - 1)
    aside = shard(folder, KEYS[2])
    aside = aside.rename(aside.with_suffix(".damaged"))
    only_old = shard(folder, KEYS[0], kernels=NUMERICS_VERSION - 1, base="y")
    broken = shard(folder, KEYS[0], base="z")
    broken.write_bytes(b"no header")
    printed = run("--prune")
    assert "3 entries" not in printed and "freed" in printed and "in 4 entries" in printed
    assert files(folder) == {good, good.parent / "manifest.json"}
    assert not old.exists() and not aside.exists()
    assert not only_old.parent.exists() and not broken.parent.exists()


def test_prune_removes_references_of_another_layout(folder, run):
    kept, old, odd = (shard(folder, KEYS[0], base=base).parent for base in "xyz")
    record = json.loads((old / "manifest.json").read_text(encoding="utf-8"))
    (old / "manifest.json").write_text(json.dumps(record | {"schema_version": 0}))
    (odd / "manifest.json").write_text(json.dumps({"identity": "odd"}))
    assert "reference: org/y (of an earlier release)" in run("--prune")
    assert kept.exists() and odd.exists() and not old.exists()


def test_prune_removes_encoded_pairs_of_other_code_and_damaged_ones(folder, run):
    path = encoded(folder, code="of another release")
    assert "encoded pairs: /home/x.jsonl (of an earlier release)" in run("--prune")
    assert not path.exists()
    encoded(folder).write_bytes(b"12345")
    assert f"encoded pairs: {PAIRS} (damaged)" in run("--prune")
    assert not path.exists()


def test_unused_days_counts_from_the_last_use(tiny_checkpoint, folder, run):
    source, _ = tiny_checkpoint()
    copy, reference = copy_of(source, folder), shard(folder, KEYS[0]).parent
    pairs = encoded(folder)
    for path in (copy, reference, pairs):
        leave_unused(path, days=31)
    assert "of no use" not in run("--unused_days", "32")
    assert "of no use" in run("--unused_days", "30") and copy.exists()
    assert copy_of(source, folder) == copy  # reads it
    assert read_entry(pairs) is not None
    ReferenceCache(folder, {"base": "x"})
    run("--prune", "--unused_days", "30")
    assert copy.exists() and reference.exists() and pairs.exists()
    for path in (copy, reference, pairs):
        leave_unused(path, days=31)
    run("--prune", "--unused_days", "30")
    assert not copy.exists() and not reference.exists() and not pairs.exists()


def test_prune_removes_what_a_kill_left_and_nothing_that_is_being_written(folder, run):
    places = [folder / "models" / ".a.part", folder / "reference" / ("0" * 32) / ".b.1.part"]
    places += [folder / "pairs" / ".c.npz.part", folder / ".digests.json.7.part"]
    for path in places:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"1")
    run("--prune")
    assert all(path.exists() for path in places if path.parent.name != "0" * 32)
    for path in places:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"1")
        leave_unused(path, days=1)
    writer = lock_file(folder / "models" / ".lock")
    run("--prune")
    assert [path for path in places if path.exists()] == [folder / "models" / ".a.part"]
    unlock_file(writer)
    run("--prune")
    assert not files(folder)


def test_prune_keeps_what_a_run_holds(tiny_checkpoint, folder, run):
    copy = copy_of(tiny_checkpoint()[0], folder)
    reference, old = shard(folder, KEYS[0]).parent, shard(folder, KEYS[1], kernels=-1)
    for path in (copy, reference):
        leave_unused(path, days=9)
    with ExitStack() as stack:
        for path in (copy, reference):
            stack.enter_context(in_use(path))
        printed = run("--prune", "--unused_days", "1")
        assert printed.count("kept, a run is using it") == 3 and "freed 0 KiB" in printed
        assert copy.exists() and old.exists()
    run("--prune", "--unused_days", "1")
    assert not files(folder)


HOLDS = """
import sys, time
from pathlib import Path
from lowmem_dpo.files import in_use
with in_use(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_lock_of_a_killed_run_holds_nothing(folder, run):
    reference = shard(folder, KEYS[0]).parent
    leave_unused(reference, days=9)
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root)}
    words = [sys.executable, "-c", HOLDS, str(reference)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout and process.stdout.readline().strip() == b"held"
        assert "kept" in run("--prune", "--unused_days", "1")
        process.kill()
    assert list(reference.parent.glob(".*.lock"))
    run("--prune", "--unused_days", "1")
    assert not files(folder)


def test_a_run_holds_what_it_reads(tiny_checkpoint, folder, monkeypatch):
    source, _ = tiny_checkpoint()
    copy, held = copy_of(source, folder), []
    read = cache_verb.read_manifest

    def looked_at(path):
        held.append(is_in_use(path))
        return read(path)

    monkeypatch.setattr("lowmem_dpo.weights.quantized_copy.read_manifest", looked_at)
    copy_of(source, folder)
    assert held == [True] and not is_in_use(copy)


def test_folder_of_something_else_is_left_alone(folder, run):
    for name in (
        "models/llama/model.safetensors",
        "reference/book.pdf",
        "photo.jpg",
        "a/b.npz",
        "pairs/a.npz",
    ):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"1")
        leave_unused(path, days=999)
    (folder / "models" / ("0" * 64)).symlink_to(folder / "a")
    before = files(folder)
    assert "total: 0 KiB in 0 entries" in run()
    run("--prune", "--unused_days", "1")
    assert files(folder) == before


def test_missing_and_empty_folders_hold_nothing(folder, run):
    assert "total: 0 KiB in 0 entries" in run()
    assert "freed 0 KiB" in run("--prune") and not folder.exists()
    folder.mkdir()
    assert "total: 0 KiB in 0 entries" in run() and not list(folder.iterdir())


def test_folder_that_cannot_be_looked_into_is_said(folder, run):
    shard(folder, KEYS[0])
    (folder / "models").write_bytes(b"a file in its place")
    printed = run()
    assert f"warning: {folder / 'models'} is left out: " in printed
    assert "reference: org/x" in printed and printed.count("warning") == 1


def test_what_cannot_be_removed_is_one_line(folder, run, monkeypatch, capsys):
    paths = [shard(folder, KEYS[0], kernels=-1, base=base).parent for base in "xy"]

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(cache_verb, "remove_folder", refuse)
    assert main(["cache", "--cache_dir", str(folder), "--prune"]) == 2
    error = one_line_error(capsys)
    assert "2 of 2 cannot be removed" in error and "Permission denied" in error
    assert any(str(path) in error for path in paths)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--unused_days", "0"], "unused_days"),
        (["--unused_days", "-1"], "unused_days"),
        (["--unused_days", "soon"], "unused_days"),
        (["--prune", "all"], "prune"),
        (["--cache_dir", ""], "cache_dir"),
        (["--cache_dir", __file__], "is a file"),
    ],
    ids=str,
)
def test_cache_refuses_in_one_line(words, message, capsys):
    assert main(["cache", *words]) == 2
    assert message in one_line_error(capsys)


def test_cache_lists_what_a_run_left_which_it_held(
    llama_dir, pairs_file, tmp_path, folder, run, monkeypatch
):
    score, held = fit.score_reference, []

    def looked_at(trees, policy, cache, *arguments, **options):
        held.append(is_in_use(cache.directory))
        return score(trees, policy, cache, *arguments, **options)

    monkeypatch.setattr(fit, "score_reference", looked_at)
    words = ["precompute", "--model", str(llama_dir), "--data", str(pairs_file())]
    assert main([*words, "--cache_dir", str(folder)]) == 0
    assert held == [True] and not list(folder.rglob("*.lock"))
    printed = run()
    assert f"quantised copy: {llama_dir}\n" in printed and f"reference: {llama_dir}\n" in printed
    (manifest,) = (folder / "reference").glob("*/manifest.json")
    assert json.loads(manifest.read_text(encoding="utf-8"))["source"] == str(llama_dir)

import os
import threading
from pathlib import Path

import pytest
import torch

from lowmem_dpo.reference.cache import ReferenceCache, fingerprint_difference

IDENTITY = {"base": "abc", "init_adapter": None}
FINGERPRINT = {"dtype": "float32", "pack_tokens": 512, "torch": "2.13"}


def key(number: int) -> str:
    return f"{number:064x}"


def logps(number: int) -> torch.Tensor:
    return torch.randn(number % 5 + 1, generator=torch.Generator().manual_seed(number))


def entries(*numbers: int) -> dict[str, torch.Tensor]:
    return {key(n): logps(n) for n in numbers}


def equal(found: dict[str, torch.Tensor], *numbers: int) -> bool:
    wanted = entries(*numbers)
    return found.keys() == wanted.keys() and all(torch.equal(found[k], wanted[k]) for k in wanted)


@pytest.fixture
def cache(tmp_path):
    return ReferenceCache(tmp_path, IDENTITY)


def test_read_returns_what_was_written_to_the_bit(tmp_path, cache):
    cache.write(entries(1, 2, 3), FINGERPRINT)
    cache.write(entries(4), FINGERPRINT)
    found = ReferenceCache(tmp_path, IDENTITY).read([key(n) for n in (1, 2, 4, 9)], FINGERPRINT)
    assert equal(found.same, 1, 2, 4) and not found.other


def test_read_in_another_process_finds_the_same_folder(tmp_path, cache):
    cache.write(entries(1), FINGERPRINT)
    again = ReferenceCache(tmp_path, dict(reversed(IDENTITY.items())))
    assert equal(again.read([key(1)], FINGERPRINT).same, 1)


@pytest.mark.parametrize("change", [{"base": "abd"}, {"init_adapter": "x"}, {"logit_scale": 2.0}])
def test_another_identity_shares_nothing(tmp_path, cache, change):
    cache.write(entries(1), FINGERPRINT)
    other = ReferenceCache(tmp_path, {**IDENTITY, **change})
    found = other.read([key(1)], FINGERPRINT)
    assert not found.same and not found.other


def test_numbers_of_another_fingerprint_are_kept_apart(tmp_path, cache):
    cache.write(entries(1, 2), {**FINGERPRINT, "dtype": "bfloat16"})
    cache.write(entries(2), FINGERPRINT)
    found = ReferenceCache(tmp_path, IDENTITY).read([key(1), key(2)], FINGERPRINT)
    assert equal(found.same, 2) and equal(found.other, 1)
    assert found.other_fingerprint["dtype"] == "bfloat16"
    assert (
        fingerprint_difference(found.other_fingerprint, FINGERPRINT) == "dtype bfloat16 -> float32"
    )


def test_every_flipped_byte_is_found_and_the_shard_set_aside(tmp_path, cache, capsys):
    def read_afresh():
        return ReferenceCache(tmp_path, IDENTITY).read([key(1)], FINGERPRINT)

    cache.write(entries(1, 2), FINGERPRINT)
    (path,) = cache.directory.glob("*.safetensors")
    content = path.read_bytes()
    for place in range(0, len(content), 37):
        damaged = bytearray(content)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        capsys.readouterr()
        assert not read_afresh().same
        assert "damaged" in capsys.readouterr().out and not path.exists()
    path.write_bytes(content[:-1])
    assert not read_afresh().same
    path.write_bytes(content)
    assert equal(read_afresh().same, 1)


def test_pack_tokens_is_the_size_most_pairs_were_scored_with(tmp_path, cache):
    cache.write(entries(1, 2), {**FINGERPRINT, "pack_tokens": 256})
    cache.write(entries(3), FINGERPRINT)
    cache.write(entries(4, 5, 6), {**FINGERPRINT, "pack_tokens": 1024, "torch": "2.11"})
    cache, keys = ReferenceCache(tmp_path, IDENTITY), [key(n) for n in range(9)]
    assert cache.pack_tokens(keys, {**FINGERPRINT, "pack_tokens": 0}) == 256
    assert cache.pack_tokens([key(3)], FINGERPRINT) == 512
    assert cache.pack_tokens([key(4)], FINGERPRINT) is None


def test_writers_at_once_lose_nothing(tmp_path):
    def work(offset: int) -> None:
        cache = ReferenceCache(tmp_path, IDENTITY)
        for n in range(offset, offset + 20):
            cache.write(entries(n, n + 1), FINGERPRINT)

    threads = [threading.Thread(target=work, args=(offset,)) for offset in (0, 10, 20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cache = ReferenceCache(tmp_path, IDENTITY)
    assert equal(cache.read([key(n) for n in range(99)], FINGERPRINT).same, *range(41))
    assert not list(cache.directory.glob("*.part")) and not list(cache.directory.glob("*.damaged"))


def test_a_failed_write_leaves_no_file_behind(cache, monkeypatch):
    cache.write(entries(1), FINGERPRINT)
    monkeypatch.setattr(
        "os.fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left"))
    )
    with pytest.raises(OSError, match="No space"):
        cache.write(entries(2), FINGERPRINT)
    assert len(list(cache.directory.iterdir())) == 2  # the manifest and the first shard


def test_a_shard_that_another_run_has_just_repaired_is_not_lost(tmp_path, cache, monkeypatch):
    cache.write(entries(1, 2), FINGERPRINT)
    (path,) = cache.directory.glob("*.safetensors")
    good = path.read_bytes()
    path.write_bytes(good[:-1])
    rename = Path.replace

    def after_the_other_run(self, target):
        if self == path:  # between our reading the damaged file and our setting it aside
            path.write_bytes(good)
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", after_the_other_run)
    reader = ReferenceCache(tmp_path, IDENTITY)
    assert equal(reader.read([key(1), key(2)], FINGERPRINT).same, 1, 2)
    assert path.read_bytes() == good and not list(cache.directory.glob("*.damaged"))


def test_a_shard_that_another_run_sets_aside_first_is_absent(tmp_path, cache, monkeypatch):
    cache.write(entries(1), FINGERPRINT)
    (path,) = cache.directory.glob("*.safetensors")
    path.write_bytes(b"damaged")
    rename = Path.replace

    def after_the_other_run(self, target):
        path.unlink()
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", after_the_other_run)
    assert not ReferenceCache(tmp_path, IDENTITY).read([key(1)], FINGERPRINT).same


def test_a_damaged_shard_that_cannot_be_set_aside_is_left_out_and_said(
    tmp_path, cache, monkeypatch, capsys
):
    cache.write(entries(1), FINGERPRINT)
    cache.write(entries(2), FINGERPRINT)
    path = min(cache.directory.glob("*.safetensors"))
    path.write_bytes(b"damaged")

    def refused(self, target):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "replace", refused)
    found = ReferenceCache(tmp_path, IDENTITY).read([key(1), key(2)], FINGERPRINT)
    assert len(found.same) == 1 and "Permission denied" in capsys.readouterr().out


def test_what_a_killed_writer_left_is_cleared_once_it_is_old(cache):
    cache.write(entries(1), FINGERPRINT)
    old, young = (cache.directory / f".{name}.1.2.part" for name in ("old", "young"))
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    cache.write(entries(2), FINGERPRINT)
    assert young.exists() and not old.exists()

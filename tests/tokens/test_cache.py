"""Encoded pairs on disk: equal when read, absent when damaged, under another key when anything
that makes token ids is another."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowmem_dpo.tokens import cache
from lowmem_dpo.tokens.cache import entry_path, read_entry, write_entry
from lowmem_dpo.tokens.trees import TokenPair, build_tree

ids = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=5)
KEY = "0123456789abcdef" * 2


def tree(row, chosen, rejected):
    return build_tree(TokenPair(row, chosen, rejected, 1, 1, KEY))


@given(st.lists(st.tuples(st.integers(1, 2**40), ids, ids), min_size=1, max_size=9))
def test_trees_are_read_as_they_were_written(tmp_path_factory, parts):
    trees = [tree(*part) for part in parts]
    path = tmp_path_factory.mktemp("cache") / "pairs" / "entry.npz"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "CHUNK_TREES", 4)
        write_entry(path, trees, {"found": "é"})
        assert read_entry(path) == (trees, {"found": "é"})
    assert [file.name for file in path.parent.iterdir()] == ["entry.npz"]


def test_an_entry_that_is_not_there_is_none(tmp_path):
    assert read_entry(tmp_path / "pairs" / "entry.npz") is None


@pytest.mark.parametrize("place", [0, 90, 400, -200, -1])
def test_a_damaged_entry_is_said_and_absent(tmp_path, capsys, place):
    path = tmp_path / "entry.npz"
    write_entry(path, [tree(i, [1, 2, i], [1, 3, i]) for i in range(50)], {})
    content = bytearray(path.read_bytes())
    content[place] ^= 0xFF
    path.write_bytes(content)
    kept = read_entry(path)
    if kept is not None:  # a byte of the archive that holds nothing
        assert kept[0] == [tree(i, [1, 2, i], [1, 3, i]) for i in range(50)]
        return
    assert "entry.npz is left out: damaged" in capsys.readouterr().out


def test_damage_to_any_byte_of_the_archives_directory_loses_no_pair(tmp_path, monkeypatch):
    path = tmp_path / "entry.npz"
    monkeypatch.setattr(cache, "CHUNK_TREES", 2)
    monkeypatch.setattr(cache, "warn", lambda line: None)
    trees = [tree(i, [1, 2, i], [1, 3, i]) for i in range(3)]
    write_entry(path, trees, {})
    content = path.read_bytes()
    for place in range(content.index(b"PK\1\2"), len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert read_entry(path) in (None, (trees, {})), place


def test_an_array_in_the_place_of_an_entry_is_absent(tmp_path, capsys):
    path = tmp_path / "entry.npz"
    with path.open("wb") as file:
        np.save(file, np.arange(3))
    assert read_entry(path) is None
    assert "entry.npz is left out: damaged" in capsys.readouterr().out


@pytest.mark.parametrize("length", [0, 1, 100, 1000])
def test_an_entry_cut_off_is_absent(tmp_path, capsys, length):
    path = tmp_path / "entry.npz"
    write_entry(path, [tree(i, [1, 2, i], [1, 3, i]) for i in range(50)], {})
    path.write_bytes(path.read_bytes()[:length])
    assert read_entry(path) is None
    assert "is left out" in capsys.readouterr().out


def test_the_key_is_of_the_tokenizer_and_all_that_is_named(tmp_path, build_tokenizer):
    what = {"source": "a", "encoding": {"max_length": 5}}
    first = entry_path(tmp_path, build_tokenizer(), what)
    assert first == entry_path(tmp_path, build_tokenizer(), dict(what))
    larger = build_tokenizer()
    larger.add_tokens(["xyz"])
    splitting = build_tokenizer()
    splitting.split_special_tokens = True
    others = [
        entry_path(tmp_path, build_tokenizer(eos_token="<|im_end|>"), what),
        entry_path(tmp_path, build_tokenizer(bos=True), what),
        entry_path(tmp_path, larger, what),
        entry_path(tmp_path, splitting, what),
        entry_path(tmp_path, build_tokenizer(), what | {"source": "b"}),
        entry_path(tmp_path, build_tokenizer(), what | {"encoding": {"max_length": 6}}),
    ]
    assert len({first, *others}) == 7


def test_the_key_is_of_the_code_too(tmp_path, build_tokenizer, monkeypatch):
    first = entry_path(tmp_path, build_tokenizer(), {})
    monkeypatch.setattr(cache, "ROOMS", ("data",))
    assert entry_path(tmp_path, build_tokenizer(), {}) != first

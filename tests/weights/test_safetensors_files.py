import hashlib
import json
import os
import struct
import time

import pytest
import torch
from safetensors.torch import save_file

from lowmem_dpo.weights import safetensors_files
from lowmem_dpo.weights.safetensors_files import (
    file_digest,
    hash_file,
    read_header,
    read_headers,
    weight_files,
)

TENSORS = {
    "matrix": torch.arange(12, dtype=torch.float32).view(3, 4),
    "half": torch.randn(5).bfloat16(),
    "fp16": torch.randn(2, 1, 3).half(),
    "double": torch.randn(2).double(),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 4),
}


@pytest.fixture
def path(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "model.safetensors"


def write_raw(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def refusal(call, *args):
    with pytest.raises(ValueError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_read_gives_what_was_written(path):
    header = read_header(path)
    assert header.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        read = header[name].read()
        assert read.dtype == tensor.dtype and torch.equal(read, tensor)


def test_read_header_lists_tensors_in_the_order_they_lie_in(path):
    offsets = [stored.offset for stored in read_header(path).values()]
    assert offsets == sorted(offsets)


def test_read_header_refuses_every_truncation(path):
    content = path.read_bytes()
    for size in (0, 5, 8, 20, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        assert "is damaged" in refusal(read_header, path)


@pytest.mark.parametrize(
    "header",
    [
        b"{not json",
        b"\xff\xfe\x00\x00",
        [1, 2],
        {"a": 3},
        {"a": {"dtype": "F32", "shape": [2]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}},
    ],
)
def test_read_header_refuses_nonsense(tmp_path, header):
    assert "is damaged" in refusal(read_header, write_raw(tmp_path / "x", header, bytes(8)))


def test_read_header_refuses_other_numbers_and_missing_files(tmp_path):
    header = {"a": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}
    assert "F8_E4M3; only F64, F32, F16, BF16" in refusal(
        read_header, write_raw(tmp_path / "x", header, bytes(4))
    )
    assert "cannot read" in refusal(read_header, tmp_path / "absent")


def test_read_refuses_a_file_that_shrank_meanwhile(path):
    stored = read_header(path)["matrix"]
    path.write_bytes(path.read_bytes()[: stored.offset + 3])
    assert "ends inside a tensor" in refusal(stored.read)


def test_weight_files_finds_one_file_or_the_shards(tmp_path):
    assert "holds no weights" in refusal(weight_files, tmp_path)
    names = ["model-00002-of-00002.safetensors", "model-00001-of-00002.safetensors"]
    index = {"weight_map": {"a": names[0], "b": names[1], "c": names[0]}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    save_file({"a": torch.ones(1)}, tmp_path / names[0])
    assert f"lacks {names[1]}" in refusal(weight_files, tmp_path)
    save_file({"b": torch.ones(1)}, tmp_path / names[1])
    assert [path.name for path in weight_files(tmp_path)] == sorted(names)
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    assert [path.name for path in weight_files(tmp_path)] == ["model.safetensors"]


def test_weight_files_reads_shards_without_an_index_and_names_what_lies_there(tmp_path):
    names = [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    save_file({"a": torch.ones(1)}, tmp_path / "consolidated.safetensors")
    assert "there is consolidated.safetensors, in another layout" in refusal(weight_files, tmp_path)
    for name in names[:2]:
        save_file({name: torch.ones(1)}, tmp_path / name)
    assert f"lacks {names[2]} of its 3 shards" in refusal(weight_files, tmp_path)
    save_file({names[2]: torch.ones(1)}, tmp_path / names[2])
    assert [path.name for path in weight_files(tmp_path)] == names


def test_weight_files_refuses_pickles_and_says_how_to_convert(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    assert "save_pretrained" in refusal(weight_files, tmp_path)


def test_weight_files_refuses_a_damaged_index(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text("[]", encoding="utf-8")
    assert "is damaged" in refusal(weight_files, tmp_path)


def test_read_headers_refuses_a_tensor_stored_twice(tmp_path):
    files = [tmp_path / "a", tmp_path / "b"]
    for path in files:
        save_file({"same": torch.ones(1)}, path)
    assert "same is stored twice" in refusal(read_headers, files)


def test_file_digest_depends_on_the_content_alone(tmp_path):
    (tmp_path / "a").write_bytes(b"1")
    (tmp_path / "b").write_bytes(b"1")
    (tmp_path / "c").write_bytes(b"2")
    a, b, c = (file_digest(tmp_path / name) for name in "abc")
    assert a == b != c
    assert a == "6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b"


def test_content_digest_is_that_of_the_bytes_and_notices_a_short_file(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    tensors = {"a": torch.arange(9.0), "b": torch.arange(5.0)}
    save_file(tensors, path)
    monkeypatch.setattr(safetensors_files, "_PIECE_BYTES", 7)
    header = read_header(path)
    for name, tensor in tensors.items():
        expected = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
        assert header[name].content_digest() == expected
    path.write_bytes(path.read_bytes()[:-1])
    assert "it ends inside a tensor" in refusal(header["b"].content_digest)


@pytest.fixture
def later(monkeypatch):
    """Lets the clock stand well after what the tests write."""
    now = time.time_ns() + 10**11
    monkeypatch.setattr(safetensors_files.time, "time_ns", lambda: now)


def count_readings(monkeypatch):
    read = []
    digest = safetensors_files.hashlib.file_digest
    monkeypatch.setattr(
        safetensors_files.hashlib, "file_digest", lambda *args: (read.append(1), digest(*args))[1]
    )
    return read


def test_hash_file_notices_another_content_of_equal_size_and_mtime(tmp_path, later):
    path, cache = tmp_path / "a", tmp_path / "cache"
    path.write_bytes(b"1")
    hashed = hash_file(path, cache)
    stat = path.stat()
    time.sleep(0.02)  # ctime advances in ticks of the kernel's clock
    path.write_bytes(b"2")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_mtime_ns == stat.st_mtime_ns
    assert hash_file(path, cache).digest == file_digest(path) and not hashed.is_unchanged()


def test_hash_file_notices_another_file_under_the_name(tmp_path, later):
    path, cache = tmp_path / "a", tmp_path / "cache"
    path.write_bytes(b"1")
    hash_file(path, cache)
    (tmp_path / "b").write_bytes(b"2")
    os.replace(tmp_path / "b", path)
    assert hash_file(path, cache).digest == file_digest(path)


def test_hash_file_reads_a_file_once_until_it_changes(tmp_path, monkeypatch, later):
    read = count_readings(monkeypatch)
    path, cache = tmp_path / "a", tmp_path / "cache"
    path.write_bytes(b"1")
    first = hash_file(path, cache)
    assert hash_file(path, cache) == first and len(read) == 1
    path.write_bytes(b"22")
    assert hash_file(path, cache).digest != first.digest and len(read) == 2


@pytest.mark.parametrize("digest", [None, 7, "", "zz", "0" * 63, ["0" * 64]])
def test_hash_file_does_not_believe_what_is_no_digest(tmp_path, later, digest):
    path, memory = tmp_path / "a", tmp_path / "cache" / "digests.json"
    path.write_bytes(b"1")
    hash_file(path, memory.parent)
    entries = json.loads(memory.read_text(encoding="utf-8"))
    entries[str(path.resolve())][-1] = digest
    for text in (json.dumps(entries), "{damaged", "[]", json.dumps({str(path.resolve()): 1})):
        memory.write_text(text, encoding="utf-8")
        assert hash_file(path, memory.parent).digest == file_digest(path)


def test_hash_file_remembers_nothing_of_a_file_that_was_only_just_written(tmp_path):
    path, cache = tmp_path / "a", tmp_path / "cache"
    path.write_bytes(b"1")
    hashed = hash_file(path, cache)
    assert not (cache / "digests.json").exists()
    path.write_bytes(b"2")  # which the stamp need not show, within a tick
    assert not hashed.is_unchanged()


def test_hashed_file_is_not_read_again_while_its_stamp_stays(tmp_path, monkeypatch, later):
    read = count_readings(monkeypatch)
    path = tmp_path / "a"
    path.write_bytes(b"1")
    hashed = hash_file(path)  # no cache remembers it
    assert hashed.is_unchanged() and len(read) == 1
    os.link(path, tmp_path / "b")  # another ctime, the same content
    assert hashed.is_unchanged() and len(read) == 2

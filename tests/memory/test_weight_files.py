"""Weights in files: the bytes that lie there, or an error; never others."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from lowmem_dpo.memory import weight_files
from lowmem_dpo.memory.weight_files import FileRange, LayerOnDisk, WeightFile
from lowmem_dpo.stopping import RunStopped

CONTENT = bytes(range(251)) * 40


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(CONTENT)
    os.utime(path, ns=(10**18, 10**18))
    return path


def read(file, start, count):
    target = bytearray(count)
    file.read_into(memoryview(target), start)
    return bytes(target)


@pytest.fixture(params=["at a place", "by seeking"])
def _way_to_read(request, monkeypatch):
    monkeypatch.setattr(weight_files, "_HAS_PREADV", request.param == "at a place")


@pytest.mark.usefixtures("_way_to_read")
def test_any_thread_reads_at_any_place(path):
    file = WeightFile(path)
    starts = [(37 * i) % 9000 for i in range(400)]
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda start: read(file, start, 700), starts))
    assert found == [CONTENT[start : start + 700] for start in starts]


def test_a_system_that_hands_out_less_is_asked_again(path, monkeypatch):
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, parts, at: preadv(fd, [parts[0][:3]], at))
    assert read(WeightFile(path), 5, 100) == CONTENT[5:105]


@pytest.mark.usefixtures("_way_to_read")
@pytest.mark.skipif(os.name == "nt", reason="an open file cannot be deleted there")
def test_a_file_that_lost_its_name_or_was_replaced_is_read_as_it_was(path, tmp_path):
    file = WeightFile(path)
    other = tmp_path / "other"
    other.write_bytes(bytes(len(CONTENT)))
    os.replace(other, path)
    assert read(file, 3, 50) == CONTENT[3:53]
    path.unlink()
    assert read(file, 3, 50) == CONTENT[3:53]


def cut_off(path):
    os.truncate(path, 60)


def write_over(path):
    with path.open("r+b") as file:
        file.write(b"other")


@pytest.mark.usefixtures("_way_to_read")
@pytest.mark.parametrize("damage", [cut_off, write_over])
@pytest.mark.parametrize("start", [0, 40, 5000])
def test_a_file_that_is_changed_in_place_stops_the_run(path, damage, start):
    file = WeightFile(path)
    assert read(file, start, 50) == CONTENT[start : start + 50]
    damage(path)
    with pytest.raises(RunStopped, match=f"{path} was changed or cut off"):
        read(file, start, 50)


def test_what_the_system_cannot_read_names_the_file(path, monkeypatch):
    file = WeightFile(path)

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(OSError) as caught:
        read(file, 0, 5)
    assert caught.value.filename == str(path)


def test_the_file_is_closed_with_its_last_reader(path):
    file = WeightFile(path)
    number = file._file.fileno()
    del file
    with pytest.raises(OSError):
        os.fstat(number)


def test_a_layer_is_read_whole_or_in_pieces(path):
    file = WeightFile(path)
    places = [(0, 1000, 300), (512, 10, 7), (768, 4000, 500)]
    ranges = [
        (start, FileRange(file, at, torch.uint8, torch.Size([count])))
        for start, at, count in places
    ]
    layer = LayerOnDisk(1500, tuple(ranges))
    expected = bytearray(b"\xee" * len(layer))
    for start, at, count in places:
        expected[start : start + count] = CONTENT[at : at + count]
    for size in (1500, 400, 256, 101, 1):
        found = bytearray(b"\xee" * len(layer))
        for first in range(0, len(layer), size):
            layer.read_into(memoryview(found)[first : first + size], first)
        assert found == expected

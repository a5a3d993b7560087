"""Lanes to a card, by streams that do their work when somebody waits for it."""

import pytest
import torch

from lowmem_dpo.memory import lanes as lanes_of_memory
from lowmem_dpo.memory.lanes import COMPUTE, UPLOAD, ReadingCudaLanes
from lowmem_dpo.memory.weight_files import FileRange, LayerOnDisk, WeightFile
from tests.memory.test_weight_slots import on_disk, pass_through


class Stream:
    """A queue of a card, worked off as far as somebody waits for it."""

    def __init__(self, *_) -> None:
        self.work, self.num_done = [], 0

    def run(self, end):
        for target, source in self.work[self.num_done : end]:
            target.copy_(source)
        self.num_done = max(self.num_done, end)

    def wait_event(self, event):
        event.synchronize()


class Event:
    def __init__(self) -> None:
        self.stream, self.end = Stream(), 0

    def record(self, stream):
        self.stream, self.end = stream, len(stream.work)

    def synchronize(self):
        self.stream.run(self.end)


@pytest.fixture
def lanes_to_a_card(monkeypatch):
    """Those of layers on the disk, whose streams are `Stream`s."""
    compute = Stream()
    for name, fake in (
        ("Stream", Stream),
        ("Event", Event),
        ("current_stream", lambda device: compute),
    ):
        monkeypatch.setattr(torch.cuda, name, fake)
    used_by = []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda _, stream: used_by.append(stream))
    monkeypatch.setattr(lanes_of_memory, "PIECE_BYTES", 64)  # a layer has eight and more

    class OnTheHost(ReadingCudaLanes):
        def _send(self, target, piece):
            target.fill_(0xFF)
            self.uploads.work.append((target, piece))

    staging = [torch.empty(64, dtype=torch.uint8) for _ in range(2)]
    lanes = OnTheHost(torch.device("cpu"), staging)
    yield lanes
    assert used_by and set(used_by) == {lanes.uploads}  # who may still read a slot that goes


@pytest.mark.parametrize("slots", [2, 3])
def test_pieces_on_their_way_to_a_card_are_not_filled_again_before_they_are_sent(
    tmp_path, lanes_to_a_card, slots
):
    pass_through(*on_disk(tmp_path, 5, slots, lanes_to_a_card), [True, False, True])
    assert lanes_to_a_card.uploads.num_done > 5 * 8


@pytest.mark.parametrize("num_bytes", [1, 64, 65, 640, 700])
def test_a_layer_that_computation_waited_for_is_on_the_card_to_its_last_byte(
    tmp_path, lanes_to_a_card, num_bytes
):
    """Of bytes that differ, in every piece."""
    content = torch.arange(num_bytes).mul(7).remainder(251).to(torch.uint8)
    (tmp_path / "layer").write_bytes(content.numpy().tobytes())
    where = FileRange(WeightFile(tmp_path / "layer"), 0, torch.uint8, content.shape)
    slot = torch.zeros(num_bytes, dtype=torch.uint8)
    lanes_to_a_card.upload(slot, LayerOnDisk(num_bytes, ((0, where),)))
    lanes_to_a_card.wait(COMPUTE, lanes_to_a_card.record(UPLOAD))
    assert torch.equal(slot, content)

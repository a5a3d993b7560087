import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowmem_dpo.machine.device import SMALLEST_PIECE, PinnedCopy, piece_sizes, to_device
from lowmem_dpo.memory.fake_card import CARD, FakeCard
from lowmem_dpo.memory.trace import Follower

TENSORS = [
    torch.arange(7),
    torch.tensor([0.5, -2.0]),
    torch.arange(300, dtype=torch.int32).view(3, 100),
    torch.empty(0, dtype=torch.int64),
]


def test_on_a_cpu_nothing_is_copied():
    found = to_device(TENSORS, torch.device("cpu"))
    assert all(got is given for got, given in zip(found, TENSORS, strict=True))


def test_all_go_to_a_card_in_one_copy_from_pinned_memory(monkeypatch):
    follower, asked, to = Follower("cuda", {}), [], torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda *args, **how: asked.append(how) or to(*args))
    with FakeCard() as mode:
        given = [mode.from_tensor(tensor) for tensor in TENSORS]
        with follower:
            found = to_device(given, CARD)
    for got, tensor in zip(found, TENSORS, strict=True):
        assert (got.dtype, got.shape, got.device) == (tensor.dtype, tensor.shape, CARD)
    assert len({got.untyped_storage()._cdata for got in found}) == 1
    assert asked == [{"non_blocking": True}]
    offsets = [got.storage_offset() * got.element_size() for got in found]
    assert offsets == [0, 256, 512, 256 + 256 + 1280]
    assert [work.link_bytes for work in follower.work] == [256 + 256 + 1280]
    events = [event for section in follower.sections for event in section.events]
    assert [(each.storage.maker, each.storage.nbytes) for each in events if each.is_birth] == [
        ("empty in device: to_device", 2048),  # pinned: a power of two
        ("_to_copy in device: to_device", 256 + 256 + 1280),
    ]


@pytest.mark.gpu
def test_what_arrives_is_what_was_sent():
    for got, tensor in zip(to_device(TENSORS, torch.device("cuda")), TENSORS, strict=True):
        assert torch.equal(got.cpu(), tensor)


@given(st.integers(0, 2**28), st.sampled_from([2, 4]))
def test_pieces_of_pinned_memory_lose_less_than_the_smallest(numel, element_size):
    sizes = piece_sizes(numel, element_size)
    assert sum(sizes) == numel
    assert sizes == sorted(sizes, reverse=True)
    taken = sum(1 << max(0, size * element_size - 1).bit_length() for size in sizes)
    assert taken - numel * element_size < SMALLEST_PIECE


def test_a_pinned_copy_comes_back_as_it_was(monkeypatch):
    pinned = []
    empty = torch.empty

    def unpinned(*shape, pin_memory=False, **how):
        pinned.append(pin_memory)
        return empty(*shape, **how)

    monkeypatch.setattr(torch, "empty", unpinned)
    x = torch.arange(3 * 2**19 + 12, dtype=torch.float32).view(1, -1, 12)
    copy = PinnedCopy(x)
    assert pinned == [True, True, True]
    assert [piece.nbytes for piece in copy.pieces] == [2**22, 2**21, 48]
    assert torch.equal(copy.to(torch.device("cpu")), x)
    assert copy.to(torch.device("cpu")).shape == x.shape

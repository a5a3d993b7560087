import pytest
import torch

from lowmem_dpo.machine.uploads import to_device
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
        ("empty in uploads: to_device", 2048),  # pinned: a power of two
        ("_to_copy in uploads: to_device", 256 + 256 + 1280),
    ]


@pytest.mark.gpu
def test_what_arrives_is_what_was_sent():
    for got, tensor in zip(to_device(TENSORS, torch.device("cuda")), TENSORS, strict=True):
        assert torch.equal(got.cpu(), tensor)

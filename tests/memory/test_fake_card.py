"""Tensors without memory answer as those of a card would."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lowmem_dpo.memory.fake_card import CARD, FakeCard
from lowmem_dpo.model.attention import AttentionKind, segment_attention
from lowmem_dpo_kernels.triton_support import RehearsedCard, rehearsing


class Names(TorchDispatchMode):
    """The operations that ran."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "capability, dtype, kernel",
    [
        ((8, 6), torch.bfloat16, "flash"),
        ((8, 6), torch.float32, "efficient"),
        ((7, 5), torch.float16, "efficient"),
    ],
)
def test_attention_is_rehearsed_by_the_kernel_that_the_card_would_get(capability, dtype, kernel):
    with rehearsing(RehearsedCard(capability, lambda *_: None)), FakeCard(), Names() as names:
        query = torch.empty(1, 4, 64, 32, dtype=dtype, device=CARD)
        key = torch.empty(1, 2, 64, 32, dtype=dtype, device=CARD)
        layout = ((0, 20, 10, 9),)
        out = segment_attention(query, key, key, layout, AttentionKind(0.1, None, None))
    assert (out.shape, out.device) == ((1, 64, 4, 32), CARD)
    kernels = {name for name in names.found if "attention" in name}
    assert kernels == {f"_scaled_dot_product_{kernel}_attention"}
    # Only flash takes grouped heads: for the other, keys are repeated.
    assert ("repeat" in " ".join(names.found) or "expand" in names.found) == (kernel != "flash")


def test_what_is_read_on_the_host_says_that_nothing_is_wrong():
    with FakeCard():
        assert torch.empty(3, device=CARD).isfinite().all()
        assert torch.empty((), device=CARD).item() == 0.0
        assert torch.empty((), dtype=torch.int64, device=CARD).item() == 0


def test_a_copy_to_where_it_is_takes_no_memory():
    with FakeCard():
        x = torch.empty(4, device=CARD)
        same, other = x.to(CARD), x.to(CARD, torch.float16)
        storages = [each.untyped_storage()._cdata for each in (x, same, other)]
    assert storages[0] == storages[1] != storages[2]

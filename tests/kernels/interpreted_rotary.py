"""Cases of the rotary kernel for Triton's interpreter."""

import pytest
import torch

from lowmem_dpo.machine.trial import value_and_gradients
from lowmem_dpo_kernels import twins
from lowmem_dpo_kernels.rotary import rotary

NUM_TOKENS = 5


def tables(head_size, dtype):
    """cos and sin of some angles, their halves alike as in transformers."""
    angles = torch.randn(NUM_TOKENS, head_size // 2)
    return [torch.cat((table, table), dim=-1).to(dtype) for table in (angles.cos(), angles.sin())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("heads, head_size", [(4, 64), (3, 12), (1, 2), (14, 96)])
@pytest.mark.parametrize("layout", ["contiguous", "heads first", "strided"])
def test_values_and_gradients_have_the_bits_of_the_twin(dtype, heads, head_size, layout):
    torch.manual_seed(0)
    x, upstream = torch.randn(2, NUM_TOKENS, heads, head_size).to(dtype)
    if layout == "heads first":
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
        upstream = upstream.transpose(0, 1).contiguous().transpose(0, 1)
    elif layout == "strided":
        x = torch.stack((x, torch.full_like(x, torch.nan)), dim=-1)[..., 0]
    cos_sin = tables(head_size, dtype)
    found = value_and_gradients(rotary, [x], upstream, *cos_sin)
    wanted = value_and_gradients(twins.rotary, [x], upstream, *cos_sin)
    for got, want in zip(found, wanted, strict=True):
        assert torch.equal(got, want)


def test_the_gradient_is_the_exact_one_where_halves_of_the_tables_are_alike():
    torch.manual_seed(0)
    x, upstream = torch.randn(2, NUM_TOKENS, 3, 8)
    cos, sin = tables(8, torch.float32)
    found = value_and_gradients(rotary, [x], upstream, cos, sin)[1]
    exact = [t.double() for t in (x, upstream, cos, sin)]
    want = value_and_gradients(twins.rotary, exact[:1], exact[1], *exact[2:])[1]
    torch.testing.assert_close(found.double(), want, atol=1e-6, rtol=1e-6)


def test_tables_that_do_not_fit_are_refused():
    x, (cos, sin) = torch.zeros(NUM_TOKENS, 2, 8), tables(8, torch.float32)
    for bad in (cos[:4], cos[:, :4], cos.repeat(1, 2)[:, ::2]):
        with pytest.raises(ValueError, match="cos and sin must be"):
            rotary(x, bad, sin)

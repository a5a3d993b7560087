"""Tests of the NF4 kernel on the CPU. They need TRITON_INTERPRET=1 before triton is imported.

`test_nf4.py` starts it, in the process that all such files share.
"""

import pytest
import torch

from lowmem_dpo.linears import nf4 as model_nf4
from lowmem_dpo_kernels import nf4, twins
from tests.kernels.test_nf4 import make_state

SIZES = [8, 64, 1000, 64 * 256, 64 * 300 + 24]


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_nf4_dequantize_has_the_bits_of_its_twin(dtype, numel, double):
    state = make_state(numel, double=double)
    expected = twins.nf4_dequantize(*state, torch.empty(numel, dtype=dtype))
    out = torch.full((numel,), torch.nan, dtype=dtype)
    assert nf4.nf4_dequantize(*state, out) is out
    assert torch.equal(out, expected)


def test_nf4_dequantize_writes_bfloat16_too():
    """The interpreter cuts off where cards round: up to one step of bfloat16."""
    state = make_state(1000, double=True)
    expected = twins.nf4_dequantize(*state, torch.empty(1000))
    out = nf4.nf4_dequantize(*state, torch.full((1000,), torch.nan, dtype=torch.bfloat16))
    assert ((out - expected).abs() <= expected.abs() * 2**-7).all()


@pytest.mark.parametrize("numel, message", [(12, "multiple of 8"), (1008, "half as many bytes")])
def test_nf4_dequantize_refuses_sizes_that_do_not_fit(numel, message):
    packed, *rest = make_state(1000 if numel != 12 else 12, double=True)
    with pytest.raises(ValueError, match=message):
        nf4.nf4_dequantize(packed, *rest, torch.empty(numel))


@pytest.mark.parametrize("shape", [(33, 24), (128, 200), (7, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_dequantize_has_the_same_bits_through_the_kernel(monkeypatch, dtype, shape):
    """As on a card with Triton; sizes that the kernel does not take go to bitsandbytes."""
    weight = model_nf4.quantize_nf4(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    expected, calls = weight.dequantize(dtype), []
    kernel = nf4.nf4_dequantize
    monkeypatch.setattr(model_nf4, "_has_kernel", lambda *case: True)
    monkeypatch.setattr(nf4, "nf4_dequantize", lambda *a: calls.append(a) or kernel(*a))
    assert torch.equal(weight.dequantize(dtype), expected)
    assert len(calls) == (shape != (7, 6))

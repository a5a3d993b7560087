from pathlib import Path

import pytest
import torch
from bitsandbytes import functional as bnb

from lowmem_dpo.linears.nf4 import quantize_nf4
from lowmem_dpo_kernels import twins
from tests.interpreter import assert_passes_in_the_interpreter


def make_state(numel, *, double):
    """A weight of `numel` numbers as bitsandbytes stores it: packed, scales and tables."""
    generator = torch.Generator().manual_seed(0)
    weight = quantize_nf4(torch.randn(1, numel, generator=generator) * 0.03)
    code, levels = bnb.create_dynamic_map(), bnb.get_4bit_type("nf4", device="cpu")
    if double:
        return weight.packed, weight.absmax, weight.absmax2, weight.offset, code, levels
    return weight.packed, torch.rand(-(-numel // 64)), None, None, code, levels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(33, 24), (96, 80), (7, 6), (300, 64)])
def test_nf4_twin_has_the_bits_of_bitsandbytes(dtype, shape):
    weight = quantize_nf4(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    state = weight.packed, weight.absmax, weight.absmax2, weight.offset
    tables = bnb.create_dynamic_map(), bnb.get_4bit_type("nf4", device="cpu")
    out = twins.nf4_dequantize(*state, *tables, torch.empty(shape, dtype=dtype))
    assert torch.equal(out, weight.dequantize(dtype))


def test_nf4_kernel_is_right_in_the_interpreter():
    pytest.importorskip("triton", reason="Triton is not installed")
    assert_passes_in_the_interpreter(Path(__file__).with_name("interpreted_nf4.py"))


@pytest.mark.gpu
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_nf4_kernel_has_the_bits_of_its_twin_on_a_card(dtype, double):
    from lowmem_dpo_kernels import nf4

    state = make_state(64 * 300 + 24, double=double)
    expected = twins.nf4_dequantize(*state, torch.empty(64 * 300 + 24, dtype=dtype))
    state = [None if part is None else part.cuda() for part in state]
    out = nf4.nf4_dequantize(*state, torch.empty(64 * 300 + 24, dtype=dtype, device="cuda"))
    assert torch.equal(out.cpu(), expected)

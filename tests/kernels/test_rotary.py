from pathlib import Path

import pytest
import torch

from lowmem_dpo.machine.trial import value_and_gradients
from lowmem_dpo_kernels import twins
from tests.interpreter import assert_passes_in_the_interpreter


def test_rotary_twin_is_transformers_function():
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    torch.manual_seed(0)
    x, angles = torch.randn(5, 3, 8), torch.randn(5, 4)
    tables = [torch.cat((t, t), dim=-1) for t in (angles.cos(), angles.sin())]
    queries = x.transpose(0, 1)[None]
    wanted, _ = modeling.apply_rotary_pos_emb(queries, queries, *(t[None] for t in tables))
    assert torch.equal(twins.rotary(x, *tables), wanted[0].transpose(0, 1))


def test_rotary_kernel_is_right_in_the_interpreter():
    pytest.importorskip("triton", reason="Triton is not installed")
    assert_passes_in_the_interpreter(Path(__file__).with_name("interpreted_rotary.py"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads, head_size", [(32, 128), (8, 128), (3, 12)])
def test_rotary_on_a_card_has_the_bits_of_the_twin(dtype, heads, head_size):
    from lowmem_dpo_kernels.rotary import rotary

    torch.manual_seed(0)
    x, upstream = torch.randn(2, 300, heads, head_size).to("cuda", dtype)
    angles = torch.randn(300, head_size // 2)
    tables = [torch.cat((t, t), -1).to("cuda", dtype) for t in (angles.cos(), angles.sin())]
    results = [value_and_gradients(f, [x], upstream, *tables) for f in (rotary, twins.rotary)]
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)

from pathlib import Path

import pytest
import torch

from lowmem_dpo_kernels import twins
from tests.interpreter import assert_passes_in_the_interpreter

NAMES = ["silu", "gelu_tanh"]


def make_inputs(shape, dtype, in_one=False):
    """Gate and up, apart or the halves of one product, and a gradient from above."""
    generator = torch.Generator().manual_seed(0)
    both = (3 * torch.randn(*shape[:-1], 2 * shape[-1], generator=generator)).to(dtype)
    gate, up = both.chunk(2, dim=-1)
    grad = torch.randn(shape, generator=generator).to(dtype)
    return (gate, up, grad) if in_one else (gate.contiguous(), up.contiguous(), grad)


def value_and_gradients(product, gate, up, grad, activation):
    leaves = [part.detach().requires_grad_() for part in (gate, up)]
    out = product(*leaves, activation)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.clone())]


def exact(gate, up, grad, activation):
    """Output and gradients of the plain twin in float64."""
    wide = (part.double() for part in (gate, up, grad))
    return value_and_gradients(twins.gated_product, *wide, activation)


def test_gated_product_twin_is_its_equation_in_value_and_gradients():
    gate, up, grad = (part.double() for part in make_inputs((5, 33), torch.float32))
    cubic = (2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)
    slope = (2 / torch.pi) ** 0.5 * (1 + 3 * 0.044715 * gate**2)
    half = (1 + cubic.tanh()) / 2
    wanted = {
        "silu": (gate * gate.sigmoid(), gate.sigmoid() * (1 + gate * (1 - gate.sigmoid()))),
        "gelu_tanh": (gate * half, half + gate * (1 - cubic.tanh() ** 2) / 2 * slope),
    }
    for activation, (value, derivative) in wanted.items():
        found = exact(gate, up, grad, activation)
        for got, want in zip(
            found, (value * up, derivative * up * grad, value * grad), strict=True
        ):
            torch.testing.assert_close(got, want)


def test_gated_product_kernels_are_right_in_the_interpreter():
    pytest.importorskip("triton", reason="Triton is not installed")
    assert_passes_in_the_interpreter(Path(__file__).with_name("interpreted_gated_product.py"))


@pytest.mark.gpu
@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize("in_one", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 300, 14336), (5, 33)])
def test_gated_product_on_a_card_is_right_and_repeats(activation, in_one, dtype, shape):
    from lowmem_dpo_kernels.gated_product import gated_product

    inputs = [part.cuda() for part in make_inputs(shape, dtype)]
    if in_one:
        inputs[:2] = torch.cat(inputs[:2], -1).chunk(2, -1)
    results = [value_and_gradients(gated_product, *inputs, activation) for _ in range(2)]
    bound = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    for got, again, want in zip(*results, exact(*inputs, activation), strict=True):
        assert torch.equal(got, again)
        assert (got.double() - want).norm() <= bound * want.norm()

"""Tests of the gated product's kernels on the CPU. They need TRITON_INTERPRET=1 before triton.

`test_gated_product.py` runs this file in a process of its own.
"""

import pytest
import torch

from lowmem_dpo.model import layer
from lowmem_dpo.model.layer import GatedMlp
from lowmem_dpo_kernels import twins
from lowmem_dpo_kernels.gated_product import ACTIVATIONS, gated_product
from tests.kernels.test_gated_product import NAMES, exact, make_inputs, value_and_gradients
from tests.model.test_layer_mlp import Mlp, gradients

CPU = torch.device("cpu")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape, in_one", [((1, 5), True), ((2, 3, 40), False), ((3, 1500), True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kernels_are_the_twin_in_float64(activation, shape, in_one, dtype):
    inputs = make_inputs(shape, dtype, in_one)
    bound = 3e-6 if dtype == torch.float32 else 2e-3
    for got, want in zip(
        value_and_gradients(gated_product, *inputs, activation),
        exact(*inputs, activation),
        strict=True,
    ):
        assert (got.double() - want).norm() <= bound * want.norm()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_kernels_round_where_ordinary_operations_do(activation):
    """Then only the activation itself differs, here and there; without, one number in four."""
    inputs = make_inputs((4, 600), torch.float16)
    found = value_and_gradients(gated_product, *inputs, activation)
    plain = value_and_gradients(twins.gated_product, *inputs, activation)
    for got, want in zip(found, plain, strict=True):
        assert (got != want).float().mean() < 0.1


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_kernels_take_what_is_far_from_zero(activation):
    far = torch.tensor([[-1e4, -100.0, -20.0, 0.0, 20.0, 100.0, 1e4]])
    inputs = (far, torch.ones_like(far), torch.ones_like(far))
    for got, want in zip(
        value_and_gradients(gated_product, *inputs, activation),
        exact(*inputs, activation),
        strict=True,
    ):
        torch.testing.assert_close(got, want.float())


def test_gated_product_takes_operands_and_gradients_with_gaps():
    inputs = make_inputs((3, 24), torch.float32)
    spread = [torch.zeros(3, 48)[:, ::2].copy_(part) for part in inputs]
    leaves = [part.requires_grad_() for part in spread[:2]]
    out = gated_product(*leaves, "silu")
    found = [out.detach(), *torch.autograd.grad(out, leaves, spread[2])]
    for got, want in zip(found, exact(*inputs, "silu"), strict=True):
        torch.testing.assert_close(got, want.float())


def test_gated_product_keeps_gate_and_up_alone_and_uses_up_its_gradient():
    gate, up, grad = make_inputs((5, 16), torch.float32)
    leaves, kept = [part.requires_grad_() for part in (gate, up)], []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = gated_product(*leaves, "silu")
    assert {t.data_ptr() for t in kept} == {gate.data_ptr(), up.data_ptr()}
    grad_gate, _ = torch.autograd.grad(out, leaves, grad)
    assert grad_gate.data_ptr() == grad.data_ptr()


def test_gated_product_refuses_what_does_not_fit_together():
    gate = torch.ones(3, 8)
    with pytest.raises(ValueError, match=r"must be alike, got \[3, 8\] in torch.float32 and \[3"):
        gated_product(gate, torch.ones(3, 4), "silu")
    with pytest.raises(ValueError, match="bfloat16"):
        gated_product(gate, gate.bfloat16(), "silu")
    with pytest.raises(ValueError, match="must be of silu, gelu_tanh, got relu"):
        gated_product(gate, gate, "relu")


@pytest.mark.parametrize("in_one", [False, True])
@pytest.mark.parametrize("act", ["silu", "gelu_pytorch_tanh"])
def test_gated_mlp_by_its_kernels_is_the_plain_one(act, in_one, monkeypatch):
    """As on a card: its own trial is passed first."""
    layer._kernels_agree.cache_clear()
    mlp, plain = GatedMlp(Mlp(act, in_one), (CPU, torch.float32)), GatedMlp(Mlp(act, in_one))
    assert mlp.by_kernel and not plain.by_kernel
    want = gradients(plain, plain)
    monkeypatch.setattr(layer._GatedProduct, "apply", pytest.fail)
    for got, expected in zip(gradients(mlp, mlp), want, strict=True):
        torch.testing.assert_close(got, expected)


def test_every_activation_has_a_name_of_the_kernels():
    assert {activation.name for activation in layer._ACTIVATIONS.values()} == {*ACTIVATIONS}
    assert list(ACTIVATIONS) == NAMES

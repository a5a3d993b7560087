import sys
from pathlib import Path

import pytest
import torch

from lowmem_dpo_kernels import NormKind, rms_norm, twins
from tests.interpreter import assert_passes_in_the_interpreter

KINDS = {
    "llama": NormKind(1e-5),
    "olmo2": NormKind(1e-6, rounds_first=False),
    "gemma": NormKind(1e-6, offset=1.0, rounds_first=False),
}


def make_inputs(shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, grad = (3 * torch.randn(2, *shape, generator=generator)).to(dtype)
    return x, torch.randn(shape[-1], generator=generator).to(dtype), grad


def exact(x, weight, grad, kind):
    """Output and gradient of the plain twin in float64."""
    wide = x.double().requires_grad_()
    out = twins.rms_norm(wide, weight.double(), kind)
    return out.detach(), torch.autograd.grad(out, wide, grad.double())[0]


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("shape", [(1, 130, 64), (5, 33), (1, 2), (0, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rms_norm_has_the_bits_of_its_twin_and_the_gradient_of_float64(kind, shape, dtype):
    x, weight, grad = make_inputs(shape, dtype)
    x.requires_grad_()
    out = rms_norm(x, weight, kind)
    out.backward(grad)
    assert torch.equal(out, twins.rms_norm(x, weight, kind))
    want = exact(x.detach(), weight, grad, kind)[1]
    bound = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    assert (x.grad.double() - want).norm() <= bound * want.norm()


def test_rms_norm_of_heads_keeps_their_memory_order(monkeypatch):
    x, weight, grad = make_inputs((1, 6, 4, 16), torch.float32)
    plain = x.clone().requires_grad_()
    want = rms_norm(plain, weight, KINDS["llama"])
    want.backward(grad)
    heads = x.clone().transpose(1, 2).requires_grad_()
    out = rms_norm(heads, weight, KINDS["llama"])
    out.backward(grad.transpose(1, 2))
    assert out.stride() == heads.stride()
    assert torch.equal(out.transpose(1, 2), want)
    assert torch.equal(heads.grad.transpose(1, 2), plain.grad)


def test_rms_norm_takes_gradients_and_rows_that_do_not_lie_in_order():
    x, weight, grad = make_inputs((7, 16), torch.float32)
    want = exact(x, weight, grad, KINDS["llama"])[1]
    spread = torch.zeros(7, 32)[:, ::2].copy_(x).requires_grad_()
    out = rms_norm(spread, weight, KINDS["llama"])
    out.backward(torch.zeros(16, 7).T.copy_(grad))
    torch.testing.assert_close(spread.grad, want.float())
    rows = x.clone().requires_grad_()
    rms_norm(rows, weight, KINDS["llama"]).sum().backward()  # a gradient without memory of its own
    want = exact(x, weight, torch.ones_like(grad), KINDS["llama"])[1]
    torch.testing.assert_close(rows.grad, want.float())


def test_rows_have_the_same_bits_whatever_their_neighbours(monkeypatch):
    monkeypatch.setattr(sys.modules[rms_norm.__module__], "_BLOCK_NUMBERS", 1)
    x, weight, _ = make_inputs((200, 96), torch.float32)
    whole = rms_norm(x, weight, KINDS["llama"])
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    assert torch.equal(rms_norm(x[order], weight, KINDS["llama"]), whole[order])
    for start, stop in ((0, 1), (63, 65), (7, 72), (199, 200)):
        assert torch.equal(rms_norm(x[start:stop], weight, KINDS["llama"]), whole[start:stop])


def test_rms_norm_keeps_its_input_and_a_number_a_row():
    kept = []
    x, weight, _ = make_inputs((50, 32), torch.bfloat16)
    x.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        rms_norm(x, weight, KINDS["llama"])
    owners = {x.data_ptr(), weight.data_ptr()}
    assert sum(t.nbytes for t in kept if t.data_ptr() not in owners) == 50 * 4


@pytest.mark.parametrize(
    "weight, message",
    [
        (torch.ones(8, requires_grad=True), "must be frozen"),
        (torch.ones(4), r"must be \[8\]"),
        (torch.ones(8).bfloat16(), "torch.float32"),
    ],
)
def test_rms_norm_refuses_weights_that_train_or_do_not_fit(weight, message):
    with pytest.raises(ValueError, match=message):
        rms_norm(torch.ones(3, 8), weight, NormKind(1e-6))


def test_rms_norm_kernels_are_right_in_the_interpreter():
    pytest.importorskip("triton", reason="Triton is not installed")
    assert_passes_in_the_interpreter(Path(__file__).with_name("interpreted_rms_norm.py"))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(300, 4096), (1, 70, 8, 128), (5, 33)])
def test_rms_norm_on_a_card_is_right_and_repeats(kind, dtype, shape):
    x, weight, grad = (t.cuda() for t in make_inputs(shape, dtype))
    results = []
    for _ in range(2):
        leaf = x.clone().requires_grad_()
        out = rms_norm(leaf, weight, kind, implementation="triton")
        out.backward(grad)
        results.append((out.detach(), leaf.grad))
    bound = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    for got, again, want in zip(*results, exact(x, weight, grad, kind), strict=True):
        assert torch.equal(got, again)
        assert (got.double() - want).norm() <= bound * want.norm()

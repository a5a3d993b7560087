"""Tests of the Triton path on the CPU. They need TRITON_INTERPRET=1 before triton is imported.

`test_token_logps_triton.py` runs this file in a process of its own.
"""

import pytest
import torch

from lowmem_dpo_kernels import reference, token_logps, token_logps_pass

VARIANTS = [
    {},
    {"bias": True},
    {"logit_scale": 0.0625},
    {"logit_softcap": 4.0},
    {"bias": True, "logit_scale": 1.7, "logit_softcap": 6.0},
]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """The interpreter takes milliseconds a row: blocks of 16 rows, slices of 128 tokens."""
    monkeypatch.setattr(token_logps_pass, "tile", lambda device: (16, 128))


def make_case(dtype, *, vocabulary=300, bias=False, **settings):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, 19, generator=generator).to(dtype)
    weight = (0.5 * torch.randn(vocabulary, 19, generator=generator)).to(dtype)
    rows = torch.randint(9, (13,), generator=generator)
    targets = torch.randint(vocabulary, (13,), generator=generator)
    targets[3], targets[4] = -100, vocabulary - 1
    if bias:
        settings["bias"] = torch.randn(vocabulary, generator=generator).to(dtype)
    return (hidden, rows, weight, targets), settings


def values_and_grad(function, inputs, settings):
    hidden = inputs[0].detach().requires_grad_()
    logps = function(hidden, *inputs[1:], **settings)
    upstream = torch.linspace(-1, 1, len(logps), dtype=logps.dtype)
    (grad,) = torch.autograd.grad(logps, hidden, upstream)
    return logps.detach(), grad


@pytest.mark.parametrize("variant", VARIANTS, ids=" ".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_triton_path_matches_float64(dtype, variant):
    inputs, settings = make_case(dtype, **variant)
    logps, grad = values_and_grad(token_logps, inputs, settings | {"implementation": "triton"})
    inputs = [t.double() if t.is_floating_point() else t for t in inputs]
    settings = {k: v.double() if torch.is_tensor(v) else v for k, v in settings.items()}
    expected_logps, expected_grad = values_and_grad(reference.token_logps, inputs, settings)
    assert logps.dtype == torch.float32
    torch.testing.assert_close(logps.double(), expected_logps, atol=1e-5, rtol=0)
    error = (grad.double() - expected_grad).norm() / expected_grad.norm()
    assert error <= (1e-5 if dtype == torch.float32 else 2**-8)


@pytest.mark.parametrize("variant", VARIANTS, ids=" ".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_path_has_the_same_bits_without_gradient(dtype, variant):
    inputs, settings = make_case(dtype, **variant)
    settings["implementation"] = "triton"
    logps, _ = values_and_grad(token_logps, inputs, settings)
    assert torch.equal(token_logps(*inputs, **settings), logps)


def test_triton_path_keeps_nan_in_its_row():
    (hidden, _, weight, targets), _ = make_case(torch.float32, vocabulary=70)
    inputs = (hidden, torch.arange(9), weight, targets[4:])
    clean, clean_grad = values_and_grad(token_logps, inputs, {"implementation": "triton"})
    hidden[5] = torch.nan
    logps, grad = values_and_grad(token_logps, inputs, {"implementation": "triton"})
    others = torch.arange(9) != 5
    assert logps[5].isnan()
    assert grad[5].isnan().all()
    assert torch.equal(logps[others], clean[others])
    assert torch.equal(grad[others], clean_grad[others])


def fold_one_slice(logits, weights, *, with_weights=True, headroom=0.0, logit_softcap=None):
    """Statistics of rows that hold no target, all of whose logits are in this slice."""
    from lowmem_dpo_kernels.token_logps_triton import fold_slice

    rows, width = logits.shape
    top, rest, target_logit = torch.full((rows,), -1e30), torch.zeros(rows), torch.zeros(rows)
    rescale = fold_slice(
        logits,
        torch.full((rows,), -1),
        top,
        rest,
        target_logit,
        weights,
        with_weights=with_weights,
        bias=None,
        width=width,
        logit_scale=1.0,
        logit_softcap=logit_softcap,
        headroom=headroom,
    )
    return top, rest, target_logit, rescale


@pytest.mark.parametrize("logit_softcap", [None, 4.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_fold_slice_has_the_same_bits_without_weights_and_writes_none(dtype, logit_softcap):
    logits = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    before, weights = logits.clone(), torch.full((3, 64), 7.0, dtype=dtype)
    # fp32 weights take the logits' place, as in `token_logps`.
    unwanted = logits if dtype == torch.float32 else weights.clone()
    without = fold_one_slice(logits, unwanted, with_weights=False, logit_softcap=logit_softcap)
    expected = fold_one_slice(logits, weights, logit_softcap=logit_softcap)
    assert all(torch.equal(a, b) for a, b in zip(without, expected, strict=True))
    assert torch.equal(unwanted, before if dtype == torch.float32 else torch.full_like(weights, 7))
    assert not (weights == 7).any()


def test_fold_slice_keeps_the_tail_of_float16_weights():
    """With headroom, a token 19 nats below the maximum still weighs something in float16."""
    logits = torch.full((1, 64), -19.0)
    logits[0, 0] = 0.0
    weights = torch.empty(1, 64, dtype=torch.float16)
    top, rest, _, _ = fold_one_slice(logits, weights, headroom=10.0)
    assert top.item() == -10.0
    torch.testing.assert_close(weights.double().sum(1), rest.double(), rtol=1e-3, atol=0)
    torch.testing.assert_close(weights[0, 1].double().item(), 2.718281828**-9, rtol=1e-3, atol=0)

from types import SimpleNamespace

import pytest
import torch

from lowmem_dpo.model.head import Int8Head
from lowmem_dpo.model.scoring import WIDTH, plain_gradients, plain_logps
from lowmem_dpo_kernels import twins

RULES = [
    {},
    {"bias": True, "logit_scale": 1.7, "logit_softcap": 3.0},
    {"logit_scale": 0.25},
]


def make_model(weight, bias=None, logit_scale=1.0, logit_softcap=None):
    return SimpleNamespace(
        head_weight=weight,
        head_bias=bias,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
    )


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("vocabulary", [50, 2 * WIDTH + 37])
def test_plain_head_equals_the_reference_in_value_and_gradient(vocabulary, rule):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(vocabulary, 12, generator=generator, dtype=torch.float64)
    hidden = torch.randn(6, 12, generator=generator, dtype=torch.float64).requires_grad_()
    targets = torch.tensor([0, 7, 49, vocabulary - 1, vocabulary // 2, 3])
    settings = dict(rule)
    if settings.pop("bias", False):
        settings["bias"] = torch.randn(vocabulary, generator=generator, dtype=torch.float64)
    expected = twins.token_logps(hidden, torch.arange(6), weight, targets, **settings)
    (gradients,) = torch.autograd.grad(expected.sum(), hidden)
    model = make_model(weight, **settings)
    logps, log_sums = plain_logps(model, hidden.detach(), targets)
    torch.testing.assert_close(logps, expected.detach())
    found = plain_gradients(model, hidden.detach(), targets, log_sums)
    torch.testing.assert_close(found, gradients)


def test_plain_head_reads_a_head_that_is_no_tensor():
    """Its slices share one buffer."""
    weight = torch.randn(3 * WIDTH, 8, generator=torch.Generator().manual_seed(0))
    head = Int8Head(weight, None)
    dense = torch.cat([part.clone() for part in head.split(WIDTH)])
    hidden, targets = torch.randn(4, 8), torch.tensor([0, WIDTH, 3 * WIDTH - 1, 5])
    results = []
    for model in (make_model(head), make_model(dense)):
        logps, log_sums = plain_logps(model, hidden, targets)
        results.append((logps, plain_gradients(model, hidden, targets, log_sums)))
    assert all(torch.equal(found, wanted) for found, wanted in zip(*results, strict=True))


def test_plain_head_computes_half_numbers_in_fp32():
    weight, hidden = torch.randn(100, 8).bfloat16(), torch.randn(3, 8).bfloat16()
    targets = torch.tensor([1, 2, 3])
    found, _ = plain_logps(make_model(weight), hidden, targets)
    assert found.dtype == torch.float32
    exact = twins.token_logps(hidden, torch.arange(3), weight, targets)
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-6)

import math
from typing import get_args, get_type_hints

import pytest
import torch

from lowmem_dpo.config import TrainConfig
from lowmem_dpo.losses import LOSSES, PairLogps, zero_margin_loss

BETA, EPSILON = 0.3, 0.1


def make_pairs(num_pairs: int = 7, dtype: torch.dtype = torch.float64) -> PairLogps:
    generator = torch.Generator().manual_seed(0)
    policy = -50 * torch.rand(2, num_pairs, generator=generator, dtype=dtype)
    reference = policy + 5 * torch.randn(2, num_pairs, generator=generator, dtype=dtype)
    tokens = torch.randint(1, 30, (2, num_pairs), generator=generator).to(dtype)
    policy.requires_grad_()
    return PairLogps(*policy.unbind(), *reference.unbind(), *tokens.unbind())


# Closed forms written with exp and log only, and dL/d(log pi(y_w)), dL/d(log pi(y_l)).
def s(x):
    return 1 / (1 + torch.exp(-x))


def sigmoid_form(a, b, nw, nl, e):
    h = BETA * (a - b)
    value = -(1 - e) * torch.log(s(h)) - e * torch.log(s(-h))
    slope = BETA * (s(h) - 1 + e)
    return value, slope, -slope


def ipo_form(a, b, nw, nl, e):
    gap = a / nw - b / nl - 1 / (2 * BETA)
    return gap**2, 2 * gap / nw, -2 * gap / nl


def hinge_form(a, b, nw, nl, e):
    slack = 1 - BETA * (a - b)
    slope = torch.where(slack > 0, -BETA, 0.0).double()
    return torch.where(slack > 0, slack, 0.0), slope, -slope


def apo_zero_form(a, b, nw, nl, e):
    up, down = s(BETA * a), s(BETA * b)
    return 1 - up + down, -BETA * up * (1 - up), BETA * down * (1 - down)


FORMS = {
    "sigmoid": sigmoid_form,
    "ipo": ipo_form,
    "hinge": hinge_form,
    "apo_zero": apo_zero_form,
}


@pytest.mark.parametrize("smoothing", [0.0, EPSILON])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_losses_equal_closed_forms_in_value_and_gradient(loss_type, smoothing):
    if smoothing and loss_type != "sigmoid":
        pytest.skip("label_smoothing is cDPO's")
    pairs = make_pairs()
    losses = LOSSES[loss_type](pairs, BETA, smoothing)
    grad_chosen, grad_rejected = torch.autograd.grad(
        losses.sum(), [pairs.policy_chosen, pairs.policy_rejected]
    )
    a = (pairs.policy_chosen - pairs.reference_chosen).detach()
    b = (pairs.policy_rejected - pairs.reference_rejected).detach()
    value, slope_chosen, slope_rejected = FORMS[loss_type](
        a, b, pairs.chosen_tokens, pairs.rejected_tokens, smoothing
    )
    torch.testing.assert_close(losses.detach(), value)
    torch.testing.assert_close(grad_chosen, slope_chosen)
    torch.testing.assert_close(grad_rejected, slope_rejected)


@pytest.mark.parametrize(
    ("loss_type", "expected"),
    [("sigmoid", math.log(2)), ("hinge", 1), ("ipo", 1 / (4 * 0.1**2)), ("apo_zero", 1)],
)
def test_zero_margin_loss_is_the_published_constant(loss_type, expected):
    assert zero_margin_loss(loss_type, 0.1) == pytest.approx(expected, rel=1e-12)


def test_zero_margin_loss_of_cdpo_is_ln2_too():
    assert zero_margin_loss("sigmoid", 0.1, 0.2) == pytest.approx(math.log(2), rel=1e-12)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_losses_stay_finite_at_extreme_logps(loss_type):
    big = torch.tensor([810.0, -810.0], requires_grad=True)
    zero, one = torch.zeros(2), torch.ones(2)
    loss = LOSSES[loss_type](PairLogps(big, -big, zero, zero, one, one), 1.0, 0.0)
    loss.sum().backward()
    assert loss.isfinite().all() and big.grad.isfinite().all()


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "hinge"])
def test_losses_ignore_a_constant_added_to_both_reference_sums(loss_type):
    p = make_pairs()
    shift = 3 * p.chosen_tokens if loss_type == "ipo" else 3.0
    other = 3 * p.rejected_tokens if loss_type == "ipo" else 3.0
    moved = PairLogps(
        p.policy_chosen,
        p.policy_rejected,
        p.reference_chosen + shift,
        p.reference_rejected + other,
        p.chosen_tokens,
        p.rejected_tokens,
    )
    loss = LOSSES[loss_type]
    torch.testing.assert_close(loss(p, BETA, 0.0), loss(moved, BETA, 0.0))


def test_losses_are_those_of_the_config():
    assert set(LOSSES) == set(get_args(get_type_hints(TrainConfig)["loss_type"]))

import itertools
import math
from dataclasses import dataclass, fields, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lowmem_dpo.losses.functions import LOSSES, f_prime
from lowmem_dpo.losses.objective import Objective
from lowmem_dpo.losses.pairs import LossParameters, PairLogps, join_pairs
from lowmem_dpo.losses.types import LOSS_TYPES
from lowmem_dpo.settings.configs import TrainConfig

BETA, EPSILON, TAU, GAMMA = 0.3, 0.1, 0.05, 0.7
SMOOTHINGS = {n: (False, "label_smoothing" in loss.reads) for n, loss in LOSS_TYPES.items()}
SMOOTHINGS["exo_pair"] = (True, True)
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


def make_pairs(num_pairs: int = 23, dtype: torch.dtype = torch.float64) -> PairLogps:
    generator = torch.Generator().manual_seed(0)
    policy = -50 * torch.rand(2, num_pairs, generator=generator, dtype=dtype)
    reference = policy + 5 * torch.randn(2, num_pairs, generator=generator, dtype=dtype)
    tokens = torch.randint(1, 30, (2, num_pairs), generator=generator).to(dtype)
    policy.requires_grad_()
    return PairLogps(*policy.unbind(), *reference.unbind(), *tokens.unbind())


def config_for(loss_type: Any, **settings: Any) -> TrainConfig:
    """A config of a loss, with what it cannot do without."""
    if "exo_pair" in loss_type:
        settings.setdefault("label_smoothing", 1e-3)
    return TrainConfig(loss_type=loss_type, **settings)


# Closed forms written with exp and log only, and dL/d(log pi(y_w)), dL/d(log pi(y_l)); x has the
# log-ratios a and b, the tokens n and m, the means p and q, the margin h and the smoothing e.
def s(x):
    return 1 / (1 + torch.exp(-x))


def logistic(z, e):
    """Value and slope of the smoothed logistic loss."""
    return -(1 - e) * torch.log(s(z)) - e * torch.log(s(-z)), s(z) - 1 + e


def sigmoid_form(x):
    value, slope = logistic(BETA * x.h, x.e)
    return value, BETA * slope, -BETA * slope


def robust_form(x):
    (straight, up), (flipped, down) = logistic(BETA * x.h, 0), logistic(-BETA * x.h, 0)
    scale = 1 - 2 * x.e
    slope = BETA * ((1 - x.e) * up + x.e * down) / scale
    return ((1 - x.e) * straight - x.e * flipped) / scale, slope, -slope


def ipo_form(x):
    gap = x.a / x.n - x.b / x.m - 1 / (2 * BETA)
    return gap**2, 2 * gap / x.n, -2 * gap / x.m


def hinge_form(x):
    slack = 1 - BETA * x.h
    slope = torch.where(slack > 0, -BETA, 0.0).double()
    return torch.where(slack > 0, slack, 0.0), slope, -slope


def sigmoid_norm_form(x):
    value, slope = logistic(BETA * (x.a / x.n - x.b / x.m), 0)
    return value, BETA * slope / x.n, -BETA * slope / x.m


def exo_pair_form(x):
    z = BETA * x.h
    value = s(z) * torch.log(s(z) / (1 - x.e)) + s(-z) * torch.log(s(-z) / x.e)
    slope = BETA * s(z) * s(-z) * (z - math.log((1 - x.e) / x.e))
    return value, slope, -slope


def discopop_form(x):
    z = BETA * x.h
    m = s(z / TAU)
    value = (1 - m) * -torch.log(s(z)) + m * torch.exp(-z)
    slope = m * (1 - m) / TAU * (torch.log(s(z)) + torch.exp(-z))
    slope = BETA * (slope - (1 - m) * s(-z) - m * torch.exp(-z))
    return value, slope, -slope


def apo_zero_form(x):
    up, down = s(BETA * x.a), s(BETA * x.b)
    return 1 - up + down, -BETA * up * (1 - up), BETA * down * (1 - down)


def apo_down_form(x):
    up, margin = s(BETA * x.a), s(BETA * x.h)
    pull = margin * (1 - margin)
    return up + 1 - margin, BETA * (up * (1 - up) - pull), BETA * pull


def nca_pair_form(x):
    up, down = s(BETA * x.a), s(BETA * x.b)
    value = -torch.log(up) - torch.log(1 - up) / 2 - torch.log(1 - down) / 2
    return value, BETA * (-(1 - up) + up / 2), BETA * down / 2


def bco_pair_form(x):
    up, down = s(BETA * x.a), s(BETA * x.b)
    return -torch.log(up) - torch.log(1 - down), -BETA * (1 - up), BETA * down


def sppo_hard_form(x):
    target = 1 / (2 * BETA)
    return (x.a - target) ** 2 + (x.b + target) ** 2, 2 * (x.a - target), 2 * (x.b + target)


def aot_form(x):
    policy = x.p * x.n - x.q * x.m
    reference = (policy - x.h).sort().values
    value, slope = logistic(BETA * (policy.sort().values - reference), x.e)
    slope = BETA * slope[ranks(policy)]
    return value, slope, -slope


def aot_unpaired_form(x):
    chosen, rejected = x.a.sort().values, x.b.sort().values
    value, slope = logistic(BETA * (chosen - rejected), x.e)
    return value, BETA * slope[ranks(x.a)], -BETA * slope[ranks(x.b)]


def ranks(values):
    """The place of each value among all."""
    return (values[:, None] > values[None]).sum(dim=1)


def simpo_form(x):
    value, slope = logistic(BETA * (x.p - x.q) - GAMMA, x.e)
    return value, BETA * slope / x.n, -BETA * slope / x.m


def orpo_form(x):
    odds = torch.exp(x.p) / (1 - torch.exp(x.p)) / (torch.exp(x.q) / (1 - torch.exp(x.q)))
    value, slope = -torch.log(s(torch.log(odds))), -BETA / (1 + odds)
    up, down = 1 / (1 - torch.exp(x.p)), 1 / (1 - torch.exp(x.q))
    return -x.p + BETA * value, (-1 + slope * up) / x.n, -slope * down / x.m


def sft_form(x):
    return -x.p, -1 / x.n, torch.zeros_like(x.p)


@pytest.mark.parametrize(
    ("loss_type", "smoothing"),
    [(n, s) for n in LOSSES for s in (0.0, EPSILON) if bool(s) in SMOOTHINGS[n]],
)
def test_losses_equal_closed_forms_in_value_and_gradient(loss_type, smoothing):
    pairs = make_pairs()
    parameters = LossParameters(BETA, smoothing, discopop_tau=TAU, simpo_gamma=GAMMA)
    losses = LOSSES[loss_type](pairs, parameters)
    slopes = torch.autograd.grad(
        losses.sum(), [pairs.policy_chosen, pairs.policy_rejected], materialize_grads=True
    )
    x = SimpleNamespace(
        a=(pairs.policy_chosen - pairs.reference_chosen).detach(),
        b=(pairs.policy_rejected - pairs.reference_rejected).detach(),
        p=(pairs.policy_chosen / pairs.chosen_tokens).detach(),
        q=(pairs.policy_rejected / pairs.rejected_tokens).detach(),
        n=pairs.chosen_tokens,
        m=pairs.rejected_tokens,
        e=smoothing,
    )
    x.h = x.a - x.b
    wanted = globals()[f"{loss_type}_form"](x)
    for ours, form in zip((losses.detach(), *slopes), wanted, strict=True):
        torch.testing.assert_close(ours, form, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_scores_are_the_derivative_of_the_divergence(divergence):
    u = torch.linspace(-6, 6, 41, dtype=torch.float64)
    t, order = u.exp(), 0.3
    forms = {
        "reverse_kl": t.log(),
        "forward_kl": 1 - 1 / t,
        "js_divergence": (2 * t / (1 + t)).log(),
        "alpha_divergence": (t ** (order - 1) - 1) / (order - 1),
    }
    parameters = LossParameters(f_divergence_type=divergence, f_alpha_divergence_coef=order)
    torch.testing.assert_close(f_prime(u, parameters), forms[divergence])
    assert f_prime(torch.zeros(1), parameters).item() == pytest.approx(0, abs=1e-7)


def test_scores_of_the_alpha_divergence_go_over_into_the_kl_divergences():
    u = torch.linspace(-6, 6, 41)
    near = LossParameters(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=1 + 1e-6)
    torch.testing.assert_close(f_prime(u, near), u, rtol=1e-4, atol=1e-5)
    zero = LossParameters(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=0.0)
    forward = LossParameters(f_divergence_type="forward_kl")
    torch.testing.assert_close(f_prime(u, zero), f_prime(u, forward))


LN2 = math.log(2)


# At the settings' defaults: beta 0.1, gamma 0.5.
ZERO_MARGIN_LOSSES = {
    "sigmoid": LN2,
    "robust": LN2,
    "ipo": 1 / (4 * 0.1**2),
    "hinge": 1,
    "sigmoid_norm": LN2,
    "exo_pair": -LN2 - math.log(0.001 * 0.999) / 2,
    "discopop": (1 + LN2) / 2,
    "apo_zero": 1,
    "apo_down": 1,
    "nca_pair": 2 * LN2,
    "bco_pair": 2 * LN2,
    "sppo_hard": 1 / (2 * 0.1**2),
    "aot": LN2,
    "aot_unpaired": LN2,
    "simpo": math.log1p(math.exp(0.5)),
    "orpo": 0.1 * LN2,
    "sft": 0,
}


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_zero_margin_loss_is_the_published_constant(loss_type):
    loss = Objective.of(config_for(loss_type)).zero_margin_loss()
    assert loss == pytest.approx(ZERO_MARGIN_LOSSES[loss_type], rel=1e-12)


def test_zero_margin_loss_weighs_losses_and_leaves_likelihood_out():
    together = config_for(["sigmoid", "bco_pair", "sft"])
    assert Objective.of(together).zero_margin_loss() == pytest.approx(3 * LN2, rel=1e-12)
    mpo = config_for(["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0])
    assert Objective.of(mpo).zero_margin_loss() == pytest.approx(
        0.8 * LN2 + 0.2 * 2 * LN2, rel=1e-12
    )
    rpo = config_for("sigmoid", rpo_alpha=0.7, label_smoothing=0.2)
    assert Objective.of(rpo).zero_margin_loss() == pytest.approx(LN2, rel=1e-12)


@pytest.mark.parametrize(
    ("loss_type", "divergence"),
    [
        (name, divergence)
        for name in LOSSES
        for divergence in DIVERGENCES
        if divergence == "reverse_kl" or "f_divergence_type" in LOSS_TYPES[name].reads
    ],
)
def test_losses_stay_finite_at_extreme_logps(loss_type, divergence):
    policy = torch.tensor(list(itertools.product([0.0, -810.0, -1e4], repeat=2))).T
    policy = policy.contiguous().requires_grad_()
    reference = policy.detach().flip(1)
    ones = torch.ones(policy.shape[1])
    smoothing = 1e-3 if loss_type == "exo_pair" else 0.0
    parameters = LossParameters(1.0, smoothing, divergence)
    if loss_type == "ipo" and divergence in ("forward_kl", "alpha_divergence"):
        ones = 1e3 * ones  # or the square of what is e^40 already leaves fp32
    loss = LOSSES[loss_type](PairLogps(*policy, *reference, ones, ones), parameters)
    loss.sum().backward()
    assert loss.isfinite().all() and policy.grad.isfinite().all()


@pytest.mark.parametrize("loss_type", ["sigmoid", "robust", "ipo", "hinge", "aot"])
def test_losses_ignore_a_constant_added_to_both_reference_sums(loss_type):
    p = make_pairs()
    shift = 3 * p.chosen_tokens if loss_type == "ipo" else 3.0
    other = 3 * p.rejected_tokens if loss_type == "ipo" else 3.0
    moved = replace(
        p,
        reference_chosen=p.reference_chosen + shift,
        reference_rejected=p.reference_rejected + other,
    )
    loss, parameters = LOSSES[loss_type], LossParameters(BETA)
    torch.testing.assert_close(loss(p, parameters), loss(moved, parameters))


def test_losses_are_those_on_record():
    assert list(LOSSES) == list(LOSS_TYPES)


def is_read(loss: Any, name: str) -> bool:
    """Whether a loss changes with a parameter, under some divergence."""
    pairs = make_pairs()
    for divergence in DIVERGENCES:
        start = LossParameters(BETA, 0.01, divergence)
        value = getattr(start, name)
        others = [x for x in DIVERGENCES if x != value] if value in DIVERGENCES else [2 * value]
        for other in others:
            changed = replace(start, **{name: other})
            if not torch.equal(loss(pairs, changed), loss(pairs, start)):
                return True
    return False


@pytest.mark.parametrize("loss_type", LOSSES)
def test_losses_read_the_parameters_on_record_and_no_others(loss_type):
    names = {field.name for field in fields(LossParameters)}
    found = {name for name in names if is_read(LOSSES[loss_type], name)}
    assert found == names & LOSS_TYPES[loss_type].reads


def test_every_parameter_is_on_record_as_read_by_some_loss():
    """What no loss has on record is never refused, and so could be set without effect."""
    reads = set().union(*(loss.reads for loss in LOSS_TYPES.values()))
    assert {field.name for field in fields(LossParameters)} <= reads


@pytest.mark.parametrize("loss_type", LOSSES)
def test_losses_need_a_reference_and_couple_pairs_as_on_record(loss_type):
    pairs, record = make_pairs(), LOSS_TYPES[loss_type]
    loss, parameters = LOSSES[loss_type], LossParameters(BETA, 0.01)
    other = replace(pairs, reference_chosen=pairs.reference_chosen + 1.5)
    same = torch.equal(loss(pairs, parameters), loss(other, parameters))
    needed = Objective.of(config_for(loss_type)).needs_reference
    assert same == (not record.needs_reference) == (not needed)
    halves = [PairLogps(*(v[i::2] for v in vars(pairs).values() if v is not None)) for i in (0, 1)]
    apart = sum(loss(half, parameters).sum() for half in halves)
    together = loss(pairs, parameters).sum()
    assert torch.isclose(apart, together, rtol=1e-9) == (not record.couples_pairs)


def test_pair_losses_are_the_weighted_sum():
    pairs = make_pairs()
    mpo = config_for(["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 0.5], beta=BETA)
    parts = [LOSSES[name](pairs, LossParameters(BETA)) for name in mpo.loss_type]
    wanted = 0.8 * parts[0] + 0.2 * parts[1] + 0.5 * parts[2]
    torch.testing.assert_close(Objective.of(mpo).pair_losses(pairs), wanted)
    rpo = config_for("ipo", rpo_alpha=0.5, beta=BETA)
    wanted = LOSSES["ipo"](pairs, LossParameters(BETA)) + 0.5 * parts[2]
    torch.testing.assert_close(Objective.of(rpo).pair_losses(pairs), wanted)


def test_likelihood_counts_every_token_where_the_sums_do_not():
    pairs = make_pairs()
    full = replace(pairs, policy_chosen_full=2 * pairs.policy_chosen)
    torch.testing.assert_close(full.nll, 2 * pairs.nll)
    torch.testing.assert_close(full.chosen_means, pairs.chosen_means)


def test_rewards_are_of_log_ratios_and_without_a_reference_of_means():
    pairs = make_pairs()
    for loss_type in ("sigmoid", "ipo", ["sigmoid", "sft"]):
        chosen, rejected = Objective.of(config_for(loss_type, beta=BETA)).rewards(pairs)
        torch.testing.assert_close(chosen, BETA * (pairs.policy_chosen - pairs.reference_chosen))
        torch.testing.assert_close(
            rejected, BETA * (pairs.policy_rejected - pairs.reference_rejected)
        )
    chosen, rejected = Objective.of(config_for("simpo", beta=BETA)).rewards(pairs)
    torch.testing.assert_close(chosen, BETA * pairs.policy_chosen / pairs.chosen_tokens)
    torch.testing.assert_close(rejected, BETA * pairs.policy_rejected / pairs.rejected_tokens)


def test_join_pairs_keeps_the_order():
    pairs = make_pairs()
    blocks = [
        PairLogps(*(v[i] for v in vars(pairs).values() if v is not None))
        for i in (slice(0, 3), slice(3, 23))
    ]
    joined = join_pairs(blocks)
    for name, value in vars(pairs).items():
        assert value is None or torch.equal(getattr(joined, name), value)
    assert joined.policy_chosen_full is None


def test_robust_averaged_over_flipped_labels_is_sigmoid():
    pairs, e = make_pairs(), 0.3
    flipped = PairLogps(
        *(pairs.policy_rejected, pairs.policy_chosen),
        *(pairs.reference_rejected, pairs.reference_chosen),
        *(pairs.rejected_tokens, pairs.chosen_tokens),
    )
    robust, noisy = LOSSES["robust"], LossParameters(BETA, e)
    mean = (1 - e) * robust(pairs, noisy) + e * robust(flipped, noisy)
    torch.testing.assert_close(mean, LOSSES["sigmoid"](pairs, LossParameters(BETA)))


@dataclass(frozen=True)
class FixedPoint:
    loss_type: str
    settings: dict[str, float]
    wanted: float


@pytest.mark.parametrize(
    "case",
    [
        FixedPoint("sigmoid", {"label_smoothing": 0.1}, math.log(9) / BETA),
        FixedPoint("exo_pair", {"label_smoothing": 0.1}, math.log(9) / BETA),
        FixedPoint("ipo", {}, 1 / (2 * BETA)),
        FixedPoint("sppo_hard", {}, 1 / BETA),
    ],
    ids=lambda case: case.loss_type,
)
def test_losses_come_to_rest_where_theory_puts_it(case):
    policy = torch.zeros(2, 1, dtype=torch.float64, requires_grad=True)
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    optimizer = torch.optim.LBFGS([policy], max_iter=200, tolerance_grad=1e-12)

    def closure():
        optimizer.zero_grad()
        pairs = PairLogps(*policy, zero, zero, one, one)
        loss = LOSSES[case.loss_type](pairs, LossParameters(BETA, **case.settings)).sum()
        loss.backward()
        return loss

    for _ in range(5):
        optimizer.step(closure)
    assert (policy[0] - policy[1]).item() == pytest.approx(case.wanted, rel=1e-3)

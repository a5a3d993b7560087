"""The losses against truths that can be computed: a policy that is a table of log-probs.

Prompts and answers are so few that the optimum of KL-regularised reward, pi* of
pi_ref e^(r / beta) / Z, the Bradley-Terry labels and every expectation are exact. Source of the
optimum: Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, section 4.
"""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lowmem_dpo.losses.objective import Objective
from lowmem_dpo.losses.pairs import PairLogps
from lowmem_dpo.settings.configs import TrainConfig

NUM_PROMPTS, NUM_ANSWERS, BETA = 6, 12, 0.5


def losses_of(
    config: TrainConfig, chosen: tuple[Tensor, Tensor], rejected: tuple[Tensor, Tensor]
) -> Tensor:
    """A loss on pairs of one-token answers, each side as (policy, reference) log-probs."""
    ones = torch.ones_like(chosen[0])
    logps = PairLogps(chosen[0], rejected[0], chosen[1], rejected[1], ones, ones)
    return Objective.of(config).pair_losses(logps)


def world(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Log-probs of the reference and rewards, [prompts, answers] each."""
    generator = torch.Generator().manual_seed(seed)
    shape = (NUM_PROMPTS, NUM_ANSWERS)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64)
    rewards = torch.randn(shape, generator=generator, dtype=torch.float64)
    return F.log_softmax(logits, dim=1), rewards


def optimum(reference: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """Log-probs of pi*."""
    return F.log_softmax(reference + rewards / beta, dim=1)


def fit(reference: Tensor, loss_of: Callable[[Tensor], Tensor]) -> Tensor:
    """Log-probs of the table that minimises a loss, starting at the reference."""
    logits = reference.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=2000, history_size=50, line_search_fn="strong_wolfe",
        tolerance_grad=1e-13, tolerance_change=0,
    )  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(F.log_softmax(logits, dim=1))
        loss.backward()
        return loss

    optimizer.step(closure)
    return F.log_softmax(logits.detach(), dim=1)


def dpo_loss(reference: Tensor, wins: Tensor, beta: float) -> Callable[[Tensor], Tensor]:
    """The mean DPO loss of weighted pairs; `wins` [prompts, i, j] weighs i chosen over j."""
    config = TrainConfig(beta=beta)

    def loss(policy: Tensor) -> Tensor:
        chosen = policy[:, :, None].expand_as(wins), reference[:, :, None].expand_as(wins)
        rejected = policy[:, None, :].expand_as(wins), reference[:, None, :].expand_as(wins)
        losses = losses_of(config, chosen, rejected)
        return (losses * wins).sum() / wins.sum()

    return loss


def true_preferences(rewards: Tensor) -> Tensor:
    """[prompts, i, j] Bradley-Terry probability that i beats j; none against itself."""
    chances = torch.sigmoid(rewards[:, :, None] - rewards[:, None, :])
    return chances * (1 - torch.eye(NUM_ANSWERS, dtype=torch.float64))


def sampled_preferences(rewards: Tensor, per_prompt: int, seed: int) -> Tensor:
    """[prompts, i, j] how often i beat j among random pairs with random labels."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.zeros(NUM_PROMPTS, NUM_ANSWERS, NUM_ANSWERS, dtype=torch.float64)
    for prompt in range(NUM_PROMPTS):
        first = torch.randint(NUM_ANSWERS, (per_prompt,), generator=generator)
        second = torch.randint(NUM_ANSWERS - 1, (per_prompt,), generator=generator)
        second = second + (second >= first)
        chance = torch.sigmoid(rewards[prompt, first] - rewards[prompt, second])
        first_wins = torch.rand(per_prompt, generator=generator) < chance
        winner = torch.where(first_wins, first, second)
        loser = torch.where(first_wins, second, first)
        counts[prompt].index_put_((winner, loser), torch.ones(1, dtype=torch.float64), True)
    return counts


def centred(values: Tensor) -> Tensor:
    return values - values.mean(dim=1, keepdim=True)


def test_sigmoid_recovers_the_optimum_from_exact_preferences():
    reference, rewards = world()
    policy = fit(reference, dpo_loss(reference, true_preferences(rewards), BETA))
    assert (policy - optimum(reference, rewards, BETA)).abs().max() < 1e-6


def test_sigmoid_error_falls_as_one_over_the_root_of_the_pairs():
    reference, rewards = world()
    errors = {}
    for per_prompt in (500, 2_000, 8_000, 32_000):
        squares, correlations = [], []
        for seed in range(3):
            wins = sampled_preferences(rewards, per_prompt, seed)
            policy = fit(reference, dpo_loss(reference, wins, BETA))
            found, truth = centred(BETA * (policy - reference)), centred(rewards)
            squares.append((found - truth).square().mean())
            pair = torch.stack([found.flatten(), truth.flatten()])
            correlations.append(torch.corrcoef(pair)[0, 1])
        errors[per_prompt] = torch.stack(squares).mean().sqrt().item()
        if per_prompt == 8_000:
            assert min(correlations) > 0.99
    for fewer, more in ((500, 2_000), (2_000, 8_000), (8_000, 32_000)):
        assert 1.5 < errors[fewer] / errors[more] < 2.7, errors  # 2 = sqrt(4)
    assert errors[32_000] < 0.05


@pytest.mark.parametrize("beta", [2.0, 1.0, 0.5, 0.25])
def test_sigmoid_lies_on_the_frontier_of_kl_and_reward(beta):
    reference, rewards = world()
    policy = fit(reference, dpo_loss(reference, true_preferences(rewards), beta))
    best = optimum(reference, rewards, beta)

    def point(log_probs: Tensor) -> tuple[float, float]:
        kl = (log_probs.exp() * (log_probs - reference)).sum(1).mean().item()
        return kl, (log_probs.exp() * rewards).sum(1).mean().item()

    (kl, reward), (best_kl, best_reward) = point(policy), point(best)
    assert kl == pytest.approx(best_kl, rel=0.01) and reward == pytest.approx(best_reward, rel=0.01)
    # No policy of this KL has more reward: E[r] - beta KL is largest at the optimum.
    assert reward - beta * kl <= best_reward - beta * best_kl + 1e-9


def test_smaller_beta_moves_further_from_the_reference_and_gains_more_reward():
    reference, rewards = world()
    points = []
    for beta in (2.0, 1.0, 0.5, 0.25):
        policy = fit(reference, dpo_loss(reference, true_preferences(rewards), beta))
        kl = (policy.exp() * (policy - reference)).sum(1).mean().item()
        points.append((kl, (policy.exp() * rewards).sum(1).mean().item()))
    assert points == sorted(points)


def descend(loss_type: str, steps: int, rate: float, **settings: float) -> tuple[float, float]:
    """Log-ratios a, b of one prompt's chosen and rejected after plain gradient descent."""
    config = TrainConfig(loss_type=loss_type, **settings)
    reference = F.log_softmax(torch.tensor([-1.0, -1.0, 3.0], dtype=torch.float64), dim=0)
    logits = reference.clone().requires_grad_()
    for _ in range(steps):
        policy = F.log_softmax(logits, dim=0)
        sides = [(policy[i : i + 1], reference[i : i + 1]) for i in (0, 1)]
        (gradient,) = torch.autograd.grad(losses_of(config, *sides).sum(), logits)
        with torch.no_grad():
            logits -= rate * gradient
    ratios = (F.log_softmax(logits.detach(), dim=0) - reference)[:2]
    return ratios[0].item(), ratios[1].item()


@pytest.mark.parametrize(
    "loss_type, settings, expected",
    [
        ("sigmoid", {"beta": 1.0, "label_smoothing": 0.1}, math.log(9)),
        ("sigmoid", {"beta": 0.5, "label_smoothing": 0.2}, math.log(4) / 0.5),
        ("exo_pair", {"beta": 1.0, "label_smoothing": 0.1}, math.log(9)),
        ("ipo", {"beta": 0.5}, 1.0),
        ("ipo", {"beta": 0.2}, 2.5),
    ],
)
def test_fixed_points_of_the_margin(loss_type, settings, expected):
    a, b = descend(loss_type, steps=4_000, rate=0.2, **settings)
    assert a - b == pytest.approx(expected, rel=0.02)


def test_hinge_stops_where_the_margin_is_one():
    beta, rate = 0.5, 0.01
    a, b = descend("hinge", steps=2_000, rate=rate, beta=beta)
    assert 1 <= beta * (a - b) < 1 + 3 * rate
    assert descend("hinge", steps=2_500, rate=rate, beta=beta) == (a, b)


def test_sppo_takes_each_side_to_its_own_fixed_point():
    a, b = descend("sppo_hard", steps=4_000, rate=0.1, beta=1.0)
    assert (a, b) == pytest.approx((0.5, -0.5), rel=0.02)


def test_plain_sigmoid_never_converges_and_grows_as_the_logarithm_of_the_steps():
    margins = [descend("sigmoid", steps, rate=1.0, beta=1.0) for steps in (100, 1_000, 10_000)]
    growth = [a - b for a, b in margins]
    assert growth[1] - growth[0] == pytest.approx(math.log(10), rel=0.1)
    assert growth[2] - growth[1] == pytest.approx(math.log(10), rel=0.1)

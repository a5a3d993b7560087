"""Losses without a reference, on mean log-probs per token: p of the chosen, q of the rejected."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lowmem_dpo.losses.pairs import LossParameters, PairLogps, smoothed_logistic

LARGEST_MEAN = -1e-7  # a completion of probability 1 has infinite odds


def simpo(logps: PairLogps, parameters: LossParameters) -> Tensor:
    """SimPO: -log s(beta (p - q) - gamma).

    Args:
        logps: P pairs.
        parameters: beta, usually 2 to 10; simpo_gamma; label_smoothing, as in TRL.

    Returns:
        Loss per pair, [P].

    Source: Meng et al. 2024, https://arxiv.org/abs/2405.14734.
    """
    scaled = parameters.beta * (logps.chosen_means - logps.rejected_means)
    return smoothed_logistic(scaled - parameters.simpo_gamma, parameters.label_smoothing)


def orpo(logps: PairLogps, parameters: LossParameters) -> Tensor:
    """ORPO: -p - beta log s(log odds of p over q).

    -p is the mean over a completion's scored tokens, then over pairs. TRL 1.16 takes the mean over
    all tokens of a batch here, the prompt's among them; the paper conditions on the prompt.

    Args:
        logps: P pairs.
        parameters: beta, the paper's lambda.

    Returns:
        Loss per pair, [P].

    Source: Hong et al. 2024, https://arxiv.org/abs/2403.07691.
    """
    return logps.nll - parameters.beta * F.logsigmoid(log_odds_ratios(logps))


def sft(logps: PairLogps, parameters: LossParameters) -> Tensor:
    """Negative log-likelihood of the chosen: -p, the mean over its scored tokens.

    TRL 1.16 takes the mean over all tokens of a batch, where long completions count for more; here
    every pair counts the same, as in the papers on RPO.

    Args:
        logps: P pairs.
        parameters: None of them is read.

    Returns:
        Loss per pair, [P].

    Source: Pang et al. 2024 (RPO), https://arxiv.org/abs/2404.19733; Wang et al. 2024 (MPO),
        https://arxiv.org/abs/2411.10442.
    """
    return logps.nll


def log_odds_ratios(logps: PairLogps) -> Tensor:
    """[P] log of odds(exp p) / odds(exp q), odds(x) = x / (1 - x)."""
    return _log_odds(logps.chosen_means) - _log_odds(logps.rejected_means)


def _log_odds(means: Tensor) -> Tensor:
    return means - _log1mexp(means.clamp(max=LARGEST_MEAN))


def _log1mexp(values: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0: each formula where it does not cancel, in value and gradient."""
    split = -math.log(2)
    far = torch.log1p(-values.clamp(max=split).exp())
    near = (-values.clamp(min=split).expm1()).log()
    return torch.where(values < split, far, near)

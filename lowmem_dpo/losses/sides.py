"""Losses that judge each side by itself, from its log-ratio a or b."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lowmem_dpo.losses.pairs import LossParameters, PairLogps


def apo_zero(logps: PairLogps, parameters: LossParameters) -> Tensor:
    """APO-zero: raise the chosen and lower the rejected: 1 - s(beta a) + s(beta b).

    Args:
        logps: P pairs.
        parameters: beta, the weight of the KL term.

    Returns:
        Loss per pair, [P]. At zero margin 1.

    Source: D'Oosterlinck et al. 2024, https://arxiv.org/abs/2408.06266.
    """
    chosen, rejected = _rewards(logps, parameters)
    return 1 - torch.sigmoid(chosen) + torch.sigmoid(rejected)


def apo_down(logps: PairLogps, parameters: LossParameters) -> Tensor:
    """APO-down: lower both, the rejected more: s(beta a) + 1 - s(beta h).

    Args:
        logps: P pairs.
        parameters: beta, the weight of the KL term.

    Returns:
        Loss per pair, [P]. At zero margin 1.

    Source: D'Oosterlinck et al. 2024, https://arxiv.org/abs/2408.06266.
    """
    chosen, rejected = _rewards(logps, parameters)
    return torch.sigmoid(chosen) + 1 - torch.sigmoid(chosen - rejected)


def nca_pair(logps: PairLogps, parameters: LossParameters) -> Tensor:
    """NCA for pairs: -log s(beta a) - (log s(-beta a) + log s(-beta b)) / 2.

    Args:
        logps: P pairs.
        parameters: beta, the weight of the KL term; 0.01 in the paper.

    Returns:
        Loss per pair, [P]. At zero margin 2 ln 2.

    Source: Chen et al. 2024, https://arxiv.org/abs/2402.05369.
    """
    chosen, rejected = _rewards(logps, parameters)
    noise = (F.logsigmoid(-chosen) + F.logsigmoid(-rejected)) / 2
    return -F.logsigmoid(chosen) - noise


def bco_pair(logps: PairLogps, parameters: LossParameters) -> Tensor:
    """BCO on both sides of a pair: -log s(beta a) - log s(-beta b).

    The paper's shift by a running mean of rewards is left out, as TRL leaves it out.

    Args:
        logps: P pairs.
        parameters: beta, the weight of the KL term.

    Returns:
        Loss per pair, [P]. At zero margin 2 ln 2.

    Source: Jung et al. 2024, https://arxiv.org/abs/2404.04656.
    """
    chosen, rejected = _rewards(logps, parameters)
    return -F.logsigmoid(chosen) - F.logsigmoid(-rejected)


def sppo_hard(logps: PairLogps, parameters: LossParameters) -> Tensor:
    """SPPO with certain preferences: (a - 1/(2 beta))^2 + (b + 1/(2 beta))^2.

    Args:
        logps: P pairs.
        parameters: beta, 1 over the paper's eta; 0.001 there.

    Returns:
        Loss per pair, [P]. At zero margin 1 / (2 beta^2).

    Source: Wu et al. 2024, https://arxiv.org/abs/2405.00675.
    """
    target = 1 / (2 * parameters.beta)
    return (logps.chosen_ratios - target) ** 2 + (logps.rejected_ratios + target) ** 2


def _rewards(logps: PairLogps, parameters: LossParameters) -> tuple[Tensor, Tensor]:
    """[P] each: beta a and beta b."""
    return parameters.beta * logps.chosen_ratios, parameters.beta * logps.rejected_ratios

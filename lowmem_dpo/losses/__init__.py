"""Preference losses: pure functions of a batch of pairs' log-probs.

Every loss reaches the model through a few numbers a pair: log pi(chosen) and log pi(rejected), and
under ld_alpha the likelihood of the chosen. So a loss is one function from `PairLogps` to a loss
per pair. To add one: write it in one of the files here, list it in `LOSSES`, record in `loss_types`
what it reads, and add its closed form to the tests.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lowmem_dpo.config import TrainConfig
from lowmem_dpo.loss_types import compares_with_reference, loss_terms
from lowmem_dpo.losses.margins import (
    discopop,
    exo_pair,
    hinge,
    ipo,
    robust,
    sigmoid,
    sigmoid_norm,
)
from lowmem_dpo.losses.pairs import LossParameters, PairLogps, join_pairs
from lowmem_dpo.losses.reference_free import log_odds_ratios, orpo, sft, simpo
from lowmem_dpo.losses.sides import apo_down, apo_zero, bco_pair, nca_pair, sppo_hard
from lowmem_dpo.losses.transport import aot, aot_unpaired

__all__ = [
    "LOSSES",
    "LossParameters",
    "PairLogps",
    "join_pairs",
    "log_odds_ratios",
    "pair_losses",
    "rewards",
    "zero_margin_loss",
]

Loss = Callable[[PairLogps, LossParameters], Tensor]

LOSSES: dict[str, Loss] = {
    function.__name__: function
    for function in (
        *(sigmoid, robust, ipo, hinge, sigmoid_norm, exo_pair, discopop),
        *(apo_zero, apo_down, nca_pair, bco_pair, sppo_hard),
        *(aot, aot_unpaired),
        *(simpo, orpo, sft),
    )
}


def pair_losses(logps: PairLogps, config: TrainConfig) -> Tensor:
    """The weighted sum of a config's losses.

    Args:
        logps: P pairs; all of a step where a loss couples pairs.
        config: loss_type, loss_weights, rpo_alpha and what the losses read.

    Returns:
        Loss per pair, [P]; differentiable.
    """
    parameters = LossParameters.of(config)
    terms = [weight * LOSSES[name](logps, parameters) for name, weight in loss_terms(config)]
    return torch.stack(terms).sum(dim=0)


def rewards(logps: PairLogps, config: TrainConfig) -> tuple[Tensor, Tensor]:
    """What a config's losses reward in chosen and rejected, as TRL logs it.

    Returns:
        [P] each: beta times the log-ratio, whatever the f-divergence; under a loss without a
        reference beta times the mean log-prob per token, as TRL's CPO and ORPO trainers have it.
    """
    if compares_with_reference(config):
        return config.beta * logps.chosen_ratios, config.beta * logps.rejected_ratios
    return config.beta * logps.chosen_means, config.beta * logps.rejected_means


def zero_margin_loss(config: TrainConfig) -> float:
    """The loss where policy and reference agree, without its likelihood terms.

    It is what a run must start at; what the likelihood adds depends on the model.
    """
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    return pair_losses(PairLogps(zero, zero, zero, zero, one, one), config).item()

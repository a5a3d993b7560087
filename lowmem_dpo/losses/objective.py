"""What a run minimises: the weighted sum of its losses, as numbers.

Every loss reaches the model through a few numbers a pair: log pi(chosen) and log pi(rejected), and
under ld_alpha the likelihood of the chosen. So a loss is one function from `PairLogps` to a loss
per pair. To add one: write it in one of the files here, list it in `LOSSES`, record in `types`
what it reads, and add its closed form to the tests.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from lowmem_dpo.losses.margins import (
    discopop,
    exo_pair,
    hinge,
    ipo,
    robust,
    sigmoid,
    sigmoid_norm,
)
from lowmem_dpo.losses.pairs import LossParameters, PairLogps
from lowmem_dpo.losses.reference_free import orpo, sft, simpo
from lowmem_dpo.losses.sides import apo_down, apo_zero, bco_pair, nca_pair, sppo_hard
from lowmem_dpo.losses.transport import aot, aot_unpaired
from lowmem_dpo.losses.types import (
    compares_with_reference,
    couples_pairs,
    loss_terms,
    needs_reference,
)

LOSSES: dict[str, Callable[[PairLogps, LossParameters], Tensor]] = {
    function.__name__: function
    for function in (
        *(sigmoid, robust, ipo, hinge, sigmoid_norm, exo_pair, discopop),
        *(apo_zero, apo_down, nca_pair, bco_pair, sppo_hard),
        *(aot, aot_unpaired),
        *(simpo, orpo, sft),
    )
}


@dataclass(frozen=True)
class Objective:
    """The losses of a run.

    Attributes:
        terms: Names and weights.
        parameters: What the losses read.
        ld_alpha: Weight of tokens beyond the shorter answer's length; None for 1.
        needs_reference: Whether a reference is scored: some loss compares with one, and it is not
            left out.
        compares_with_reference: Whether some loss is one of log-ratios, be it to a uniform
            reference.
        couples_pairs: Whether some loss is one of all pairs of an optimizer step.
    """

    terms: tuple[tuple[str, float], ...]
    parameters: LossParameters
    ld_alpha: float | None
    needs_reference: bool
    compares_with_reference: bool
    couples_pairs: bool

    @classmethod
    def of(cls, settings: Any) -> "Objective":
        """That of a `LossSettings`."""
        names = [field.name for field in fields(LossParameters)]
        return cls(
            terms=tuple(loss_terms(settings)),
            parameters=LossParameters(**{name: getattr(settings, name) for name in names}),
            ld_alpha=settings.ld_alpha,
            needs_reference=needs_reference(settings),
            compares_with_reference=compares_with_reference(settings),
            couples_pairs=couples_pairs(settings),
        )

    @property
    def nll_weight(self) -> float:
        """The weight of the chosen answers' likelihood beside the preference losses."""
        return sum(weight for name, weight in self.terms if name == "sft")

    def pair_losses(self, logps: PairLogps) -> Tensor:
        """The weighted sum of the losses.

        Args:
            logps: P pairs; all of a step where a loss couples pairs.

        Returns:
            Loss per pair, [P]; differentiable.
        """
        terms = [weight * LOSSES[name](logps, self.parameters) for name, weight in self.terms]
        return torch.stack(terms).sum(dim=0)

    def rewards(self, logps: PairLogps) -> tuple[Tensor, Tensor]:
        """What the losses reward in chosen and rejected, as TRL logs it.

        Returns:
            [P] each: beta times the log-ratio, whatever the f-divergence; under a loss without a
            reference beta times the mean log-prob per token, as TRL's CPO and ORPO trainers have
            it.
        """
        beta = self.parameters.beta
        if self.compares_with_reference:
            return beta * logps.chosen_ratios, beta * logps.rejected_ratios
        return beta * logps.chosen_means, beta * logps.rejected_means

    def zero_margin_loss(self) -> float:
        """The loss where policy and reference agree, without its likelihood terms.

        It is what a run must start at; what the likelihood adds depends on the model.
        """
        zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
        return self.pair_losses(PairLogps(zero, zero, zero, zero, one, one)).item()

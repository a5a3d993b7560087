"""What a run minimises: the weighted sum of its losses, as numbers.

Every loss reaches the model through a few numbers a pair: log pi(chosen) and log pi(rejected), and
under ld_alpha the likelihood of the chosen. So a loss is one function from `PairLogps` to a loss
per pair. To add one: write it in `functions` and list it there, record in `types` what it reads,
and add its closed form to the tests.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lowmem_dpo.losses.functions import LOSSES, log_ratios
from lowmem_dpo.losses.pairs import LossParameters, PairLogps
from lowmem_dpo.losses.types import LOSS_TYPES, LossChoice, losses_of


@dataclass(frozen=True)
class Objective:
    """The losses of a run.

    Attributes:
        terms: Names and weights.
        parameters: What the losses read.
        ld_alpha: Weight of tokens beyond the shorter answer's length; None for 1.
        nll_weight: The weight of the chosen answers' likelihood beside the preference losses.
        needs_reference: Whether a reference is scored: some loss compares with one, and it is not
            left out.
        couples_pairs: Whether some loss is one of all pairs of an optimizer step.
    """

    terms: tuple[tuple[str, float], ...]
    parameters: LossParameters
    ld_alpha: float | None
    nll_weight: float
    needs_reference: bool
    couples_pairs: bool

    @classmethod
    def of(cls, settings: LossChoice) -> "Objective":
        """That of a `LossSettings`; rpo_alpha counts as the weight of sft."""
        losses = losses_of(settings)
        terms = list(zip(losses, settings.loss_weights or [1.0] * len(losses), strict=True))
        terms += [("sft", settings.rpo_alpha)] if settings.rpo_alpha else []
        names = [field.name for field in fields(LossParameters)]
        compares = any(loss.needs_reference for loss in losses.values())
        return cls(
            terms=tuple(terms),
            parameters=LossParameters(**{name: getattr(settings, name) for name in names}),
            ld_alpha=settings.ld_alpha,
            nll_weight=sum(weight for name, weight in terms if name == "sft"),
            needs_reference=compares and not settings.reference_free,
            couples_pairs=any(loss.couples_pairs for loss in losses.values()),
        )

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
        if any(LOSS_TYPES[name].needs_reference for name, _ in self.terms):
            a, b = log_ratios(logps)  # to a uniform reference, where it is left out
            return beta * a, beta * b
        return beta * logps.chosen_means, beta * logps.rejected_means

    def zero_margin_loss(self) -> float:
        """The loss where policy and reference agree, without its likelihood terms.

        It is what a run must start at; what the likelihood adds depends on the model.
        """
        zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
        return self.pair_losses(PairLogps(zero, zero, zero, zero, one, one)).item()

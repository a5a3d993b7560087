"""What every loss is given: a batch of pairs' log-probs, and the parameters. Shapes: P pairs."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class PairLogps:
    """Summed completion log-probs of P pairs, in nats.

    Attributes:
        policy_chosen: [P] fp32.
        policy_rejected: [P] fp32.
        reference_chosen: [P] fp32; zeros without a reference.
        reference_rejected: [P] fp32; zeros without a reference.
        chosen_tokens: [P] number of scored tokens of each chosen completion.
        rejected_tokens: [P] number of scored tokens of each rejected completion.
        policy_chosen_full: [P] fp32, where ld_alpha weighs down the tails in the sums above: the
            chosen sum with every token alike, for the likelihood terms.
    """

    policy_chosen: Tensor
    policy_rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    policy_chosen_full: Tensor | None = None

    @property
    def chosen_means(self) -> Tensor:
        """[P] mean log-prob of a token of the chosen completion under the policy."""
        return self.policy_chosen / self.chosen_tokens

    @property
    def rejected_means(self) -> Tensor:
        """[P] mean log-prob of a token of the rejected completion under the policy."""
        return self.policy_rejected / self.rejected_tokens

    @property
    def nll(self) -> Tensor:
        """[P] mean negative log-prob of a token of the chosen completion, every token alike."""
        full = self.policy_chosen if self.policy_chosen_full is None else self.policy_chosen_full
        return -full / self.chosen_tokens


def join_pairs(blocks: Sequence[PairLogps]) -> PairLogps:
    """The pairs of several micro-batches as one batch, in their order."""
    columns = {}
    for field in fields(PairLogps):
        values = [getattr(block, field.name) for block in blocks]
        columns[field.name] = None if values[0] is None else torch.cat(values)
    return PairLogps(**columns)  # type: ignore[arg-type]


@dataclass(frozen=True)
class LossParameters:
    """The settings that losses read, under the names they have in the config.

    Attributes:
        beta: Weight of the KL term; see each loss.
        label_smoothing: Probability e that a label is flipped, in [0, 0.5).
        f_divergence_type: Distance to the reference; see `f_prime`.
        f_alpha_divergence_coef: Order of the alpha-divergence.
        discopop_tau: Temperature of DiscoPOP's mixture.
        simpo_gamma: SimPO's target margin.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    discopop_tau: float = 0.05
    simpo_gamma: float = 0.5

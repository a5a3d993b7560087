"""What every loss is given: a batch of pairs' log-probs, and the parameters.

With a = log pi(y_w)/pi_ref(y_w), b = log pi(y_l)/pi_ref(y_l) and h = a - b. Shapes: P pairs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

# Above this exponent exp goes on as a straight line: fp32 would soon be infinite, and a run that
# is so far from its reference is beyond saving.
EXPONENT_LIMIT = 40.0


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
    def chosen_ratios(self) -> Tensor:
        """[P] log pi(y_w)/pi_ref(y_w)."""
        return self.policy_chosen - self.reference_chosen

    @property
    def rejected_ratios(self) -> Tensor:
        """[P] log pi(y_l)/pi_ref(y_l)."""
        return self.policy_rejected - self.reference_rejected

    @property
    def margins(self) -> Tensor:
        """[P] the difference h of the two log-ratios."""
        return self.chosen_ratios - self.rejected_ratios

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


def f_prime(ratios: Tensor, parameters: LossParameters) -> Tensor:
    """f'(t) of t = pi/pi_ref, which f-DPO puts in the place of the log-ratio u = log t.

    reverse_kl u; forward_kl 1 - 1/t; js_divergence log 2t/(1+t); alpha_divergence of order A
    (t^(A-1) - 1)/(A-1). All are 0 with slope 1 (js: 1/2) where policy and reference agree.

    TRL clamps the exponent of the alpha-divergence at 80, where the gradient ends, and leaves the
    forward KL to overflow; here both go on as a straight line from an exponent of 40.

    Args:
        ratios: [P] log-ratios u.
        parameters: f_divergence_type and its order.

    Returns:
        [P], f'(exp(u)).

    Source: Wang et al. 2023, https://arxiv.org/abs/2309.16240.
    """
    match parameters.f_divergence_type:
        case "forward_kl":
            return -bounded_expm1(-ratios)
        case "js_divergence":
            return math.log(2) + F.logsigmoid(ratios)
        case "alpha_divergence":
            order = parameters.f_alpha_divergence_coef - 1
            return bounded_expm1(order * ratios) / order
    return ratios


def f_prime_margins(logps: PairLogps, parameters: LossParameters) -> Tensor:
    """[P] the difference of f' of chosen and of rejected: h under reverse_kl."""
    chosen = f_prime(logps.chosen_ratios, parameters)
    return chosen - f_prime(logps.rejected_ratios, parameters)


def mean_f_prime_margins(logps: PairLogps, parameters: LossParameters) -> Tensor:
    """[P] the same of each divided by its completion's tokens."""
    chosen = f_prime(logps.chosen_ratios, parameters) / logps.chosen_tokens
    return chosen - f_prime(logps.rejected_ratios, parameters) / logps.rejected_tokens


def smoothed_logistic(logits: Tensor, label_smoothing: float) -> Tensor:
    """-(1-e) log s(x) - e log s(-x): what it costs to call the pair right when e of all are not."""
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def bounded_expm1(exponents: Tensor) -> Tensor:
    """exp(x) - 1, and its tangent above `EXPONENT_LIMIT`, so that value and slope stay finite."""
    inside = exponents.clamp(max=EXPONENT_LIMIT)
    return inside.expm1() + inside.exp() * (exponents - inside)

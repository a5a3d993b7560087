"""Preference losses: pure functions of a batch of pairs' log-probs.

Every loss reaches the model through two numbers a pair, log pi(chosen) and log pi(rejected), so a
loss is one function from `PairLogps` to a loss per pair. To add one: write it here, list it in
`LOSSES` and in the config's `loss_type`, and add its closed form to the tests.

With a = log pi(y_w)/pi_ref(y_w), b = log pi(y_l)/pi_ref(y_l) and h = a - b. Shapes: P pairs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
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
    """

    policy_chosen: Tensor
    policy_rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor

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


Loss = Callable[[PairLogps, float, float], Tensor]


def sigmoid(logps: PairLogps, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO, and cDPO with label smoothing: -(1-e) log s(beta h) - e log s(-beta h).

    Args:
        logps: P pairs.
        beta: Weight of the KL term.
        label_smoothing: Probability e that a label is flipped, in [0, 0.5).

    Returns:
        Loss per pair, [P]. At zero margin ln 2.

    Source: Rafailov et al. 2023, https://arxiv.org/abs/2305.18290; cDPO: Mitchell 2023,
        https://ericmitchell.ai/cdpo.pdf.
    """
    scaled = beta * logps.margins
    return -(1 - label_smoothing) * F.logsigmoid(scaled) - label_smoothing * F.logsigmoid(-scaled)


def ipo(logps: PairLogps, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """IPO on per-token averages: (a/|y_w| - b/|y_l| - 1/(2 beta))^2.

    The paper leaves the normalisation open; its authors confirmed averages (TRL pull request 1265).

    Args:
        logps: P pairs.
        beta: The paper's tau.
        label_smoothing: Has no meaning here and is refused by the config.

    Returns:
        Loss per pair, [P]. At zero margin 1 / (4 beta^2).

    Source: Azar et al. 2023, https://arxiv.org/abs/2310.12036.
    """
    chosen = logps.chosen_ratios / logps.chosen_tokens
    rejected = logps.rejected_ratios / logps.rejected_tokens
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def hinge(logps: PairLogps, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """RSO's hinge on the normalised likelihood: max(0, 1 - beta h).

    Args:
        logps: P pairs.
        beta: Inverse of the margin at which a pair stops pulling.
        label_smoothing: Has no meaning here and is refused by the config.

    Returns:
        Loss per pair, [P]. At zero margin 1.

    Source: Liu et al. 2023, https://arxiv.org/abs/2309.06657; Zhao et al. 2023 (SLiC),
        https://arxiv.org/abs/2305.10425.
    """
    return torch.relu(1 - beta * logps.margins)


def apo_zero(logps: PairLogps, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """APO-zero: raise the chosen and lower the rejected, each by itself: 1 - s(beta a) + s(beta b).

    Args:
        logps: P pairs.
        beta: Weight of the KL term.
        label_smoothing: Has no meaning here and is refused by the config.

    Returns:
        Loss per pair, [P]. At zero margin 1.

    Source: D'Oosterlinck et al. 2024, https://arxiv.org/abs/2408.06266.
    """
    chosen, rejected = beta * logps.chosen_ratios, beta * logps.rejected_ratios
    return 1 - torch.sigmoid(chosen) + torch.sigmoid(rejected)


LOSSES: dict[str, Loss] = {
    "sigmoid": sigmoid,
    "ipo": ipo,
    "hinge": hinge,
    "apo_zero": apo_zero,
}


def zero_margin_loss(loss_type: str, beta: float, label_smoothing: float = 0.0) -> float:
    """The value of a loss where policy and reference agree: what a run must start at."""
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    return LOSSES[loss_type](
        PairLogps(zero, zero, zero, zero, one, one), beta, label_smoothing
    ).item()

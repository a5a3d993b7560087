"""Losses of the margin alone: chosen against rejected, h = a - b.

They read f' of an f-divergence (`pairs.f_prime`), which is the log-ratio under reverse KL.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lowmem_dpo.losses.pairs import (
    LossParameters,
    PairLogps,
    bounded_expm1,
    f_prime_margins,
    mean_f_prime_margins,
    smoothed_logistic,
)


def sigmoid(logps: PairLogps, parameters: LossParameters) -> Tensor:
    """DPO, and cDPO with label smoothing: -(1-e) log s(beta h) - e log s(-beta h).

    TRL 1.16 takes label_smoothing with this loss and leaves it out of it; here it is the paper's.

    Args:
        logps: P pairs.
        parameters: beta, the weight of the KL term; label_smoothing.

    Returns:
        Loss per pair, [P]. At zero margin ln 2.

    Source: Rafailov et al. 2023, https://arxiv.org/abs/2305.18290; cDPO: Mitchell 2023,
        https://ericmitchell.ai/cdpo.pdf.
    """
    scaled = parameters.beta * f_prime_margins(logps, parameters)
    return smoothed_logistic(scaled, parameters.label_smoothing)


def robust(logps: PairLogps, parameters: LossParameters) -> Tensor:
    """Robust DPO: [-(1-e) log s(beta h) + e log s(-beta h)] / (1 - 2e).

    Its mean over labels that are flipped with probability e is DPO's loss on the true ones. It has
    no lower bound.

    Args:
        logps: P pairs.
        parameters: beta; label_smoothing, the known share of flipped labels.

    Returns:
        Loss per pair, [P]. At zero margin ln 2.

    Source: Chowdhury et al. 2024, https://arxiv.org/abs/2403.00409.
    """
    scaled, e = parameters.beta * f_prime_margins(logps, parameters), parameters.label_smoothing
    return (-(1 - e) * F.logsigmoid(scaled) + e * F.logsigmoid(-scaled)) / (1 - 2 * e)


def ipo(logps: PairLogps, parameters: LossParameters) -> Tensor:
    """IPO on per-token averages: (a/|y_w| - b/|y_l| - 1/(2 beta))^2.

    The paper leaves the normalisation open; its authors confirmed averages (TRL pull request 1265).

    Args:
        logps: P pairs.
        parameters: beta, the paper's tau.

    Returns:
        Loss per pair, [P]. At zero margin 1 / (4 beta^2).

    Source: Azar et al. 2023, https://arxiv.org/abs/2310.12036.
    """
    return (mean_f_prime_margins(logps, parameters) - 1 / (2 * parameters.beta)) ** 2


def hinge(logps: PairLogps, parameters: LossParameters) -> Tensor:
    """RSO's hinge on the normalised likelihood: max(0, 1 - beta h).

    Args:
        logps: P pairs.
        parameters: beta, inverse of the margin at which a pair stops pulling.

    Returns:
        Loss per pair, [P]. At zero margin 1.

    Source: Liu et al. 2023, https://arxiv.org/abs/2309.06657; Zhao et al. 2023 (SLiC),
        https://arxiv.org/abs/2305.10425.
    """
    return torch.relu(1 - parameters.beta * f_prime_margins(logps, parameters))


def sigmoid_norm(logps: PairLogps, parameters: LossParameters) -> Tensor:
    """DPO on per-token averages, so that length pays nothing: -log s(beta (a/|y_w| - b/|y_l|)).

    Args:
        logps: P pairs.
        parameters: beta; much larger than for sums, 5 in the paper.

    Returns:
        Loss per pair, [P]. At zero margin ln 2.

    Source: Lambert et al. 2024 (Tülu 3), https://arxiv.org/abs/2411.15124.
    """
    return -F.logsigmoid(parameters.beta * mean_f_prime_margins(logps, parameters))


def exo_pair(logps: PairLogps, parameters: LossParameters) -> Tensor:
    """EXO for pairs: KL([s(beta h), s(-beta h)] || [1-e, e]), the reverse of cDPO's divergence.

    Args:
        logps: P pairs.
        parameters: beta; label_smoothing e > 0, usually 0.001.

    Returns:
        Loss per pair, [P]. At zero margin -ln 2 - ln(e (1-e)) / 2.

    Source: Ji et al. 2024, https://arxiv.org/abs/2402.00856.
    """
    scaled, e = parameters.beta * f_prime_margins(logps, parameters), parameters.label_smoothing
    chosen = torch.sigmoid(scaled) * (F.logsigmoid(scaled) - math.log1p(-e))
    return chosen + torch.sigmoid(-scaled) * (F.logsigmoid(-scaled) - math.log(e))


def discopop(logps: PairLogps, parameters: LossParameters) -> Tensor:
    """DiscoPOP: (1-m) (-log s(x)) + m exp(-x) with x = beta h and m = s(x/tau).

    m exp(-x) is taken as exp(log m - x): factor by factor it is 0 times infinity at large -x, which
    TRL lets become NaN.

    Args:
        logps: P pairs.
        parameters: beta; discopop_tau.

    Returns:
        Loss per pair, [P]. At zero margin (1 + ln 2) / 2.

    Source: Lu et al. 2024, https://arxiv.org/abs/2406.08414.
    """
    scaled = parameters.beta * f_prime_margins(logps, parameters)
    inner = scaled / parameters.discopop_tau
    exponential = bounded_expm1(F.logsigmoid(inner) - scaled) + 1
    return torch.sigmoid(-inner) * -F.logsigmoid(scaled) + exponential

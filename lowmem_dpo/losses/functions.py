"""Every loss, a function each: from a batch of pairs' log-probs to a loss per pair.

With a = log pi(y_w)/pi_ref(y_w), b = log pi(y_l)/pi_ref(y_l), h = a - b, and p and q the mean
log-probs per token of chosen and rejected. Shapes: P pairs. In order: what several losses share,
losses of the margin h alone, losses that judge each side by itself, losses of sorted pairs, losses
without a reference.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lowmem_dpo.losses.pairs import LossParameters, PairLogps

# Above this exponent exp goes on as a straight line: fp32 would soon be infinite, and a run that
# is so far from its reference is beyond saving.
EXPONENT_LIMIT = 40.0

LARGEST_MEAN = -1e-7  # a completion of probability 1 has infinite odds


def log_ratios(logps: PairLogps) -> tuple[Tensor, Tensor]:
    """[P] each: a = log pi(y_w)/pi_ref(y_w) and b = log pi(y_l)/pi_ref(y_l)."""
    chosen = logps.policy_chosen - logps.reference_chosen
    return chosen, logps.policy_rejected - logps.reference_rejected


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
    a, b = log_ratios(logps)
    return f_prime(a, parameters) - f_prime(b, parameters)


def mean_f_prime_margins(logps: PairLogps, parameters: LossParameters) -> Tensor:
    """[P] the same of each divided by its completion's tokens."""
    a, b = log_ratios(logps)
    chosen = f_prime(a, parameters) / logps.chosen_tokens
    return chosen - f_prime(b, parameters) / logps.rejected_tokens


def smoothed_logistic(logits: Tensor, label_smoothing: float) -> Tensor:
    """-(1-e) log s(x) - e log s(-x): what it costs to call the pair right when e of all are not."""
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def bounded_expm1(exponents: Tensor) -> Tensor:
    """exp(x) - 1, and its tangent above `EXPONENT_LIMIT`, so that value and slope stay finite."""
    inside = exponents.clamp(max=EXPONENT_LIMIT)
    return inside.expm1() + inside.exp() * (exponents - inside)


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
    (a, b), target = log_ratios(logps), 1 / (2 * parameters.beta)
    return (a - target) ** 2 + (b + target) ** 2


def _rewards(logps: PairLogps, parameters: LossParameters) -> tuple[Tensor, Tensor]:
    """[P] each: beta a and beta b."""
    a, b = log_ratios(logps)
    return parameters.beta * a, parameters.beta * b


def aot(logps: PairLogps, parameters: LossParameters) -> Tensor:
    """AOT, paired: the policy's sorted margins against the reference's, DPO's loss on each rank.

    Args:
        logps: All P pairs of a step.
        parameters: beta, the weight of the KL term; label_smoothing.

    Returns:
        Loss per rank, [P]. At zero margin ln 2.

    Source: Melnyk et al. 2024, https://arxiv.org/abs/2406.05882.
    """
    policy = (logps.policy_chosen - logps.policy_rejected).sort().values
    reference = (logps.reference_chosen - logps.reference_rejected).sort().values
    return smoothed_logistic(parameters.beta * (policy - reference), parameters.label_smoothing)


def aot_unpaired(logps: PairLogps, parameters: LossParameters) -> Tensor:
    """AOT, unpaired: sorted log-ratios of the chosen against those of the rejected.

    Args:
        logps: All P pairs of a step.
        parameters: beta, the weight of the KL term; label_smoothing.

    Returns:
        Loss per rank, [P]. At zero margin ln 2.

    Source: Melnyk et al. 2024, https://arxiv.org/abs/2406.05882.
    """
    a, b = log_ratios(logps)
    margins = a.sort().values - b.sort().values
    return smoothed_logistic(parameters.beta * margins, parameters.label_smoothing)


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


LOSSES: dict[str, Callable[[PairLogps, LossParameters], Tensor]] = {
    function.__name__: function
    for function in (
        *(sigmoid, robust, ipo, hinge, sigmoid_norm, exo_pair, discopop),
        *(apo_zero, apo_down, nca_pair, bco_pair, sppo_hard),
        *(aot, aot_unpaired),
        *(simpo, orpo, sft),
    )
}

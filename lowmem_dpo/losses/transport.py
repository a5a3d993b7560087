"""Alignment by optimal transport: better as a distribution, not pair by pair.

Both sort over the pairs they are given, so these must be all of an optimizer step. The i-th number
of the result belongs to the i-th rank, not to the i-th pair.
"""

from torch import Tensor

from lowmem_dpo.losses.pairs import LossParameters, PairLogps, smoothed_logistic


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
    margins = logps.chosen_ratios.sort().values - logps.rejected_ratios.sort().values
    return smoothed_logistic(parameters.beta * margins, parameters.label_smoothing)

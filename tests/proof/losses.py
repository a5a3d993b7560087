"""A loss by its settings, on pairs given as (policy, reference) log-probs of one-token answers."""

from torch import Tensor

from lowmem_dpo.losses import LOSSES, PairLogps


def pair_losses(
    loss_type: str,
    chosen: tuple[Tensor, Tensor],
    rejected: tuple[Tensor, Tensor],
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    ones = chosen[0].new_ones(chosen[0].shape)
    logps = PairLogps(chosen[0], rejected[0], chosen[1], rejected[1], ones, ones)
    return LOSSES[loss_type](logps, beta, label_smoothing)

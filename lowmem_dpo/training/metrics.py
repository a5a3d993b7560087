"""Metrics under TRL's names, gathered over the pairs of a step.

`rewards/*` is the mean of beta * (policy - reference), `logps/*` the mean log-prob summed over a
completion, `num_tokens` the tokens of both sequences of every pair seen, prompts counted twice as
TRL does.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowmem_dpo.losses import PairLogps

Metrics = dict[str, float]

PER_PAIR = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)

FRIENDLY_NAMES = {
    "chosen_reward": "rewards/chosen",
    "rejected_reward": "rewards/rejected",
    "reward_margin": "rewards/margins",
}


@dataclass
class PairStats:
    """The per-pair numbers of any number of micro-batches."""

    blocks: list[Tensor] = field(default_factory=list)

    def add(self, logps: PairLogps, losses: Tensor, beta: float) -> None:
        """Take in one micro-batch of P pairs."""
        chosen, rejected = beta * logps.chosen_ratios, beta * logps.rejected_ratios
        rows = [
            losses,
            chosen,
            rejected,
            chosen - rejected,
            (chosen > rejected).float(),
            logps.policy_chosen,
            logps.policy_rejected,
        ]
        self.blocks.append(torch.stack(rows).detach())

    def bad_pairs(self) -> list[int]:
        """Places, in the order taken in, of the pairs with a number that is not finite."""
        finite = torch.cat(self.blocks, dim=1).isfinite().all(dim=0)
        return (~finite).nonzero().flatten().tolist()

    def means(self) -> Metrics:
        """The mean of each number over all pairs taken in."""
        values = torch.cat(self.blocks, dim=1).double().mean(dim=1).tolist()
        return dict(zip(PER_PAIR, values, strict=True))


def mean_metrics(steps: Iterable[Mapping[str, float]]) -> Metrics:
    """Mean over steps of the per-pair means and the gradient norm; the rest is the last step's.

    Steps that were skipped are counted (`skipped_steps`) and give nothing to the means.
    """
    steps = list(steps)
    result = dict(steps[-1])
    for name in (*PER_PAIR, "grad_norm"):
        values = [step[name] for step in steps if name in step]
        if values:  # a step whose float16 gradient overflowed has no norm
            result[name] = sum(values) / len(values)
    if skipped := sum(step.get("skipped_steps", 0) for step in steps):
        result["skipped_steps"] = skipped
    return result


def without_pairs(metrics: Mapping[str, float]) -> Metrics:
    """The metrics of a skipped step that may be written: not those of its pairs and gradient."""
    return {n: value for n, value in metrics.items() if n not in (*PER_PAIR, "grad_norm")}


def with_friendly_names(metrics: Mapping[str, float]) -> Metrics:
    """Add chosen_reward, rejected_reward and reward_margin beside TRL's names."""
    return {**metrics, **{short: metrics[name] for short, name in FRIENDLY_NAMES.items()}}


def peak_memory_bytes(device: torch.device) -> int | None:
    """Peak memory: allocated on a CUDA device, resident on the CPU; None where unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

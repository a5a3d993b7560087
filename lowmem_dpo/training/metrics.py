"""Metrics under TRL's names, gathered over the pairs of a step.

`rewards/*` is the mean of beta * (policy - reference), without a reference see `losses.rewards`;
`logps/*` the mean log-prob summed over a completion, `num_tokens` the tokens of both sequences of
every pair seen, prompts counted twice as TRL does.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from lowmem_dpo.losses.objective import Objective
from lowmem_dpo.losses.pairs import PairLogps
from lowmem_dpo.losses.reference_free import log_odds_ratios

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

# Of some losses only.
EXTRA_PER_PAIR = ("nll_loss", "log_odds_ratio", "log_odds_chosen")


@dataclass
class PairStats:
    """The per-pair numbers of any number of micro-batches.

    Attributes:
        objective: Whose losses they are.
        blocks: Of each micro-batch, names to [P] numbers.
        worst_rms: Largest difference of policy and reference in a micro-batch, nat rms per token.
    """

    objective: Objective
    blocks: list[dict[str, Tensor]] = field(default_factory=list)
    worst_rms: float = 0.0

    def add(self, logps: PairLogps, losses: Tensor) -> None:
        """Take in one micro-batch of P pairs and their losses."""
        chosen, rejected = self.objective.rewards(logps)
        rows = [
            losses,
            chosen,
            rejected,
            chosen - rejected,
            (chosen > rejected).float(),
            logps.policy_chosen,
            logps.policy_rejected,
        ]
        block = dict(zip(PER_PAIR, rows, strict=True)) | _extra_rows(logps, self.objective)
        self.blocks.append({name: row.detach() for name, row in block.items()})

    def bad_pairs(self) -> list[int]:
        """Places, in the order taken in, of the pairs with a number that is not finite."""
        by_rank = ("loss",) if self.objective.couples_pairs else ()  # the rest is by pair
        _, columns = self._columns(by_rank)
        return (~columns.isfinite().all(dim=0)).nonzero().flatten().tolist()

    def means(self) -> Metrics:
        """The mean of each number over all pairs taken in."""
        names, columns = self._columns(())
        return dict(zip(names, columns.double().mean(dim=1).tolist(), strict=True))

    def _columns(self, without: Collection[str]) -> tuple[list[str], Tensor]:
        """Names and [names, pairs] numbers of all blocks."""
        names = [name for name in self.blocks[0] if name not in without]
        blocks = [torch.stack([block[name] for name in names]) for block in self.blocks]
        return names, torch.cat(blocks, dim=1)


def _extra_rows(logps: PairLogps, objective: Objective) -> dict[str, Tensor]:
    """[P] each: what TRL logs of likelihood terms, and of ORPO's odds."""
    names = [name for name, _ in objective.terms]
    rows = {}
    if "sft" in names or "orpo" in names:
        rows["nll_loss"] = logps.nll
    if "orpo" in names:
        rows["log_odds_chosen"] = log_odds_ratios(logps)
        rows["log_odds_ratio"] = F.logsigmoid(rows["log_odds_chosen"])
    return rows


def mean_metrics(steps: Iterable[Mapping[str, float]]) -> Metrics:
    """Mean over the pairs of several steps; of the gradient norm, over the steps.

    `num_pairs` is how many pairs that were; the rest is the last step's. Steps that were skipped
    are counted (`skipped_steps`) and give nothing to the means.
    """
    steps = list(steps)
    result = dict(steps[-1])
    taken = [step for step in steps if "skipped_steps" not in step]
    if taken:
        counts = [step["num_pairs"] for step in taken]
        weights = [count / max(counts) for count in counts]  # exactly 1 for full batches
        result["num_pairs"] = sum(counts)
        for name in (*PER_PAIR, *EXTRA_PER_PAIR):
            if name in taken[0]:
                total = sum(w * step[name] for w, step in zip(weights, taken, strict=True))
                result[name] = total / sum(weights)
    norms = [step["grad_norm"] for step in taken if "grad_norm" in step]
    if norms:  # a step whose float16 gradient overflowed has no norm
        result["grad_norm"] = sum(norms) / len(norms)
    if skipped := sum(step.get("skipped_steps", 0) for step in steps):
        result["skipped_steps"] = skipped
    return result


def without_pairs(metrics: Mapping[str, float]) -> Metrics:
    """The metrics of a skipped step that may be written: not those of its pairs and gradient."""
    left_out = {*PER_PAIR, *EXTRA_PER_PAIR, "num_pairs", "grad_norm"}
    return {name: value for name, value in metrics.items() if name not in left_out}


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

"""From a pack's token log-probs to the gradient of a step's loss.

Most losses are sums over pairs: each micro-batch contributes its share and is forgotten. A loss
that couples pairs (`aot` sorts them) needs the log-probs of the whole step at once, and a step is
many micro-batches. It reaches the model through a few sums a pair all the same, so a first pass
without gradient collects these sums, the loss is differentiated with respect to them, and a second
pass takes the gradient of slopes times sums, micro-batch by micro-batch: the same gradient, for one
more forward pass.

On the way the numbers of the pairs are kept, under TRL's names: `rewards/*` is the mean of beta *
(policy - reference), without a reference see `Objective.rewards`; `logps/*` the mean log-prob
summed over a completion.

Shapes: P pairs, T scored tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lowmem_dpo.linears.lora import casts_kept, dropout_live
from lowmem_dpo.losses.functions import log_odds_ratios
from lowmem_dpo.losses.objective import Objective
from lowmem_dpo.losses.pairs import PairLogps, join_pairs
from lowmem_dpo.machine.device import cuda_devices, to_device
from lowmem_dpo.model.language_model import LanguageModel
from lowmem_dpo.model.scoring import score
from lowmem_dpo.packs.packing import Pack, sequence_logps
from lowmem_dpo.reference.fill import Reference, rms_difference

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
        block = dict(zip(PER_PAIR, rows, strict=True))
        # What TRL logs of likelihood terms, and of ORPO's odds.
        names = [name for name, _ in self.objective.terms]
        if "sft" in names or "orpo" in names:
            block["nll_loss"] = logps.nll
        if "orpo" in names:
            block["log_odds_chosen"] = log_odds_ratios(logps)
            block["log_odds_ratio"] = F.logsigmoid(block["log_odds_chosen"])
        self.blocks.append({name: row.detach() for name, row in block.items()})

    def summary(self) -> tuple[Metrics, list[int]]:
        """What all pairs taken in come to.

        Returns:
            The mean of each number, and the places, in the order taken in, of the pairs with one
            that is not finite.
        """
        names = list(self.blocks[0])
        blocks = [torch.stack([block[name] for name in names]) for block in self.blocks]
        columns = torch.cat(blocks, dim=1)  # [names, pairs]
        means = dict(zip(names, columns.double().mean(dim=1).tolist(), strict=True))
        # The loss stands first; where it couples the pairs of a step, only the rest is by pair.
        by_pair = columns[1:] if self.objective.couples_pairs else columns
        bad = (~by_pair.isfinite().all(dim=0)).nonzero().flatten().tolist()
        return means, bad


@dataclass(frozen=True)
class Slopes:
    """dL/d(sum) of the pairs of one pack, L the loss of the whole step.

    Attributes:
        sums: Policy sums by their name in `PairLogps`, [P] each.
    """

    sums: dict[str, Tensor]

    def dot(self, logps: PairLogps) -> Tensor:
        """Slopes times sums: a scalar whose gradient is this pack's part of the loss's."""
        products = [slope * getattr(logps, name) for name, slope in self.sums.items()]
        return torch.stack(products).sum()


def accumulate(
    model: LanguageModel,
    objective: Objective,
    reference: Reference | None,
    packs: Sequence[Pack],
    scaler: torch.amp.GradScaler,
    *,
    compares: bool = False,
) -> PairStats:
    """Add the gradient of a step's loss, the mean over its pairs, to the adapter's gradients.

    Nothing else is changed: with the gradients set to zero the step can be taken again.

    Args:
        model: The policy.
        objective: Its losses.
        reference: Their reference, or None.
        packs: All pairs of the step.
        scaler: Of the loss.
        compares: Note how far policy and reference are apart, which waits for the device.

    Returns:
        The numbers of the step's pairs.
    """
    stats = PairStats(objective)
    num_pairs = sum(len(pack.trees) for pack in packs)
    slopes = None
    with casts_kept(model.network):
        if objective.couples_pairs:
            slopes = coupled_slopes(model, objective, reference, packs, stats)
        for i, pack in enumerate(packs):
            with dropout_live(model.network):
                logps = score(model, pack)
                pairs = pair_logps(logps, pack, objective, reference)
                if slopes is None:
                    losses = objective.pair_losses(pairs)
                    stats.add(pairs, losses)
                    share = losses.sum() / num_pairs
                else:
                    share = slopes[i].dot(pairs)
                scaler.scale(share).backward()
            if compares and reference is not None:
                rms = rms_difference(logps.detach().cpu(), reference.of(pack))
                stats.worst_rms = max(stats.worst_rms, rms)
            del logps, pairs, share  # or their graph would live into the next micro-batch
    return stats


def pair_logps(
    logps: Tensor, pack: Pack, objective: Objective, reference: Reference | None
) -> PairLogps:
    """Sum a pack's token log-probs [T] into its pairs, beside the reference's.

    Both are summed by the same function over the same layout, so equal tokens give equal sums.
    """
    ld_alpha = objective.ld_alpha
    policy_chosen, policy_rejected = sequence_logps(logps, pack, ld_alpha)
    lengths = [[tree.num_chosen_tokens, tree.num_rejected_tokens] for tree in pack.trees]
    sent = list(torch.tensor(lengths, dtype=policy_chosen.dtype).T.contiguous())
    if reference is not None:
        sent.append(reference.of(pack))
    num_chosen, num_rejected, *known = to_device(sent, logps.device)
    if known:
        reference_chosen, reference_rejected = sequence_logps(known[0], pack, ld_alpha)
    else:
        reference_chosen = reference_rejected = torch.zeros_like(policy_chosen)
    return PairLogps(
        policy_chosen,
        policy_rejected,
        reference_chosen,
        reference_rejected,
        num_chosen,
        num_rejected,
        None if ld_alpha is None else sequence_logps(logps, pack)[0],
    )


def coupled_slopes(
    model: LanguageModel,
    objective: Objective,
    reference: Reference | None,
    packs: Sequence[Pack],
    stats: PairStats,
) -> list[Slopes]:
    """Score a step without gradient and differentiate its loss with respect to the sums.

    Args:
        model: The policy.
        objective: Its losses.
        reference: Their reference, or None.
        packs: All pairs of the step.
        stats: Takes in the pairs and their losses.

    Returns:
        The slopes of each pack.
    """
    # The second pass must draw the dropout of the first again.
    with (
        torch.random.fork_rng(cuda_devices(model.device)),
        torch.no_grad(),
        dropout_live(model.network),
    ):
        blocks = [pair_logps(score(model, pack), pack, objective, reference) for pack in packs]
    pairs = join_pairs(blocks)
    names = ["policy_chosen", "policy_rejected"]
    if pairs.policy_chosen_full is not None:
        names.append("policy_chosen_full")
    leaves = {name: getattr(pairs, name).clone().requires_grad_() for name in names}
    pairs = replace(pairs, **leaves)
    losses = objective.pair_losses(pairs)
    stats.add(pairs, losses)
    slopes = torch.autograd.grad(
        losses.mean(), list(leaves.values()), allow_unused=True, materialize_grads=True
    )
    parts = [slope.split([len(pack.trees) for pack in packs]) for slope in slopes]
    return [Slopes(dict(zip(names, part, strict=True))) for part in zip(*parts, strict=True)]

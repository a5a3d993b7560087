"""Packs of token trees: micro-batches of a fixed number of tokens.

In a pack trees lie end to end. Every pack has the same N, so memory is constant and every matrix
product has one shape: a tree's numbers do not depend on what else is in its pack. N is chosen for
the least predicted time over simulated steps: padding is weighed against the fixed cost of a pack.

Shapes: N packed tokens, T scored tokens, P pairs.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowmem_dpo.tokens.trees import Tree

PAD_ID = 0
TOKEN_MULTIPLE = 64  # keeps the matrix products on full tiles
# On a card N is the inner side of LoRA's gradients too, long and thin products for which cuBLAS
# splits the sum; some of its versions are reported to lose what is left over of a split's block
# (facebookexperimental/triton#2767). A CPU has no such fault, and more padding costs it time.
CARD_TOKEN_MULTIPLE = 128
# What a pack costs whatever N is (launches, dequantising), in tokens.
PACK_OVERHEAD_TOKENS = 128
MAX_SIMULATED_STEPS = 64
SPLITS = range(1, 17)  # packs per step that are tried


@dataclass(frozen=True)
class ScoredTokens:
    """The scored tokens of a tree in three runs: of both sequences, of chosen, of rejected only.

    Attributes:
        rows: For each, the index in the flat layout of the token that predicts it.
        targets: For each, its token id.
        num_shared: Length of the first run.
        num_chosen: Length of the second run.
        num_rejected: Length of the third run.
    """

    rows: list[int]
    targets: list[int]
    num_shared: int
    num_chosen: int
    num_rejected: int


@dataclass(frozen=True)
class Pack:
    """Trees in one micro-batch, with all that is needed to score them; tensors are on the CPU.

    A model that runs on `input_ids` at `position_ids`, every tree attending within `layout` alone,
    gives hidden rows [N, D]; the log-probs of `targets` under `rows` of them are the pairs'.

    Attributes:
        input_ids: [N] int64. Trees one after the other, each trunk, chosen, rejected; then padding.
        position_ids: [N] int64. Both branches continue at the trunk's length; padding is at 0.
        layout: Per tree (start, trunk_len, chosen_len, rejected_len), in tokens: the trunk attends
            to itself, a branch to the trunk and itself, causally. What is in no tree is padding.
        rows: [T] int64. Indices in 0..N-1 of the tokens that predict a scored token; the trunk's
            last stands there twice where it predicts the first token of both branches.
        targets: [T] int64. The scored tokens, one for each of `rows`.
        trees: The trees, in pack order.
        counts: Per tree the lengths of its runs in `rows`: scored in both, in chosen only, in
            rejected only; they follow each other, tree after tree, and add up to T.
    """

    input_ids: Tensor
    position_ids: Tensor
    layout: tuple[tuple[int, int, int, int], ...]
    rows: Tensor
    targets: Tensor
    trees: tuple[Tree, ...]
    counts: tuple[tuple[int, int, int], ...]


def scored_tokens(tree: Tree) -> ScoredTokens:
    """List the scored tokens of a tree and the rows that predict them."""
    flat, trunk_len = tree.ids, tree.trunk_len
    first_rejected = trunk_len + tree.chosen_len
    chosen_start, rejected_start = tree.chosen_start, tree.rejected_start
    shared = range(max(chosen_start, rejected_start), trunk_len)
    # The sides start apart where a token merged across the end of one side's prompt.
    chosen = [
        *range(chosen_start, min(rejected_start, trunk_len)),
        *range(max(chosen_start, trunk_len), first_rejected),
    ]
    rejected = [
        *range(rejected_start, min(chosen_start, trunk_len)),
        *range(first_rejected + max(rejected_start - trunk_len, 0), len(flat)),
    ]
    places = [*shared, *chosen, *rejected]
    return ScoredTokens(
        # The trunk's last token, not chosen's, is the one before the first token of rejected.
        rows=[trunk_len - 1 if place == first_rejected else place - 1 for place in places],
        targets=[flat[place] for place in places],
        num_shared=len(shared),
        num_chosen=len(chosen),
        num_rejected=len(rejected),
    )


def pack_trees(trees: Sequence[Tree], num_tokens: int) -> list[Pack]:
    """Spread trees over as few packs as first-fit decreasing finds.

    Args:
        trees: The trees, in any order; the same list always gives the same packs.
        num_tokens: N, tokens of every pack.

    Returns:
        Packs that hold every tree once.

    Raises:
        ValueError: A tree is longer than `num_tokens`.
    """
    packs: list[Pack] = []
    for indices in _first_fit_decreasing([tree.num_tokens for tree in trees], num_tokens):
        in_pack = tuple(trees[i] for i in indices)
        input_ids: list[int] = []
        position_ids: list[int] = []
        rows: list[int] = []
        targets: list[int] = []
        layout: list[tuple[int, int, int, int]] = []
        counts: list[tuple[int, int, int]] = []
        for tree in in_pack:
            start, trunk_len = len(input_ids), tree.trunk_len
            layout.append((start, trunk_len, tree.chosen_len, tree.rejected_len))
            input_ids += tree.ids
            position_ids += range(trunk_len + tree.chosen_len)
            position_ids += range(trunk_len, trunk_len + tree.rejected_len)
            tokens = scored_tokens(tree)
            rows += [start + row for row in tokens.rows]
            targets += tokens.targets
            counts.append((tokens.num_shared, tokens.num_chosen, tokens.num_rejected))
        padding = num_tokens - len(input_ids)
        packs.append(
            Pack(
                input_ids=torch.tensor(input_ids + [PAD_ID] * padding, dtype=torch.int64),
                position_ids=torch.tensor(position_ids + [0] * padding, dtype=torch.int64),
                layout=tuple(layout),
                rows=torch.tensor(rows, dtype=torch.int64),
                targets=torch.tensor(targets, dtype=torch.int64),
                trees=in_pack,
                counts=tuple(counts),
            )
        )
    return packs


def sequence_logps(
    token_logps: Tensor, pack: Pack, ld_alpha: float | None = None
) -> tuple[Tensor, Tensor]:
    """Sum the log-probs of a pack's scored tokens by sequence.

    Sums of slices, no atomics: equal log-probs in an equal layout give equal bits.

    Args:
        token_logps: [T] in the order of `pack.rows`, in nats.
        pack: The pack they belong to.
        ld_alpha: Weight of a completion's tokens beyond the length of the shorter completion.

    Returns:
        Chosen and rejected sums, [P] each, in pack order; differentiable.

    Source: The weight is that of LD-DPO, Liu et al. 2024, https://arxiv.org/abs/2409.06411.
    """
    lengths = [length for counts in pack.counts for length in counts]
    runs = token_logps.split(lengths)
    if ld_alpha is not None:
        return _weighted_sums(runs, pack, ld_alpha)
    sums = [run.sum() for run in runs]
    chosen = [shared + own for shared, own in zip(sums[0::3], sums[1::3], strict=True)]
    rejected = [shared + own for shared, own in zip(sums[0::3], sums[2::3], strict=True)]
    return torch.stack(chosen), torch.stack(rejected)


def _weighted_sums(runs: Sequence[Tensor], pack: Pack, ld_alpha: float) -> tuple[Tensor, Tensor]:
    """The sums of each sequence, its tail weighed by `ld_alpha`."""
    sums: list[Tensor] = []
    for i, tree in enumerate(pack.trees):
        shared, own_chosen, own_rejected = runs[3 * i : 3 * i + 3]
        shorter = min(tree.num_chosen_tokens, tree.num_rejected_tokens)
        for own, start, other_start in (
            (own_chosen, tree.chosen_start, tree.rejected_start),
            (own_rejected, tree.rejected_start, tree.chosen_start),
        ):
            # Where this side's prompt ends first, some of its own tokens come before the shared.
            before = max(0, min(other_start, tree.trunk_len) - start)
            tokens = torch.cat([own[:before], shared, own[before:]])
            sums.append(tokens[:shorter].sum() + ld_alpha * tokens[shorter:].sum())
    return torch.stack(sums[0::2]), torch.stack(sums[1::2])


def epoch_order(num_pairs: int, seed: int, epoch: int) -> list[int]:
    """The shuffled order of the pairs in an epoch: a function of its arguments alone.

    It is here because N is chosen for the very steps that will be trained on.
    """
    order = list(range(num_pairs))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


def choose_pack_tokens(
    trees: Sequence[Tree],
    batch_size: int,
    *,
    limit: int | None = None,
    seed: int = 0,
    multiple: int = TOKEN_MULTIPLE,
) -> int:
    """Choose N, the tokens of a pack, for the least predicted time.

    The first steps of the first epoch are packed for every candidate. A pack costs its N tokens,
    padding included, and `PACK_OVERHEAD_TOKENS`; the cheapest candidate wins, of equals the
    smallest.

    Args:
        trees: All trees of the run, at least one.
        batch_size: Pairs per optimizer step.
        limit: The most tokens that fit in memory.
        seed: The run's seed.
        multiple: What N shall be a multiple of.

    Returns:
        A multiple of `multiple`, at least the longest tree and at most `limit`.

    Raises:
        ValueError: The longest tree does not fit in `limit`.
    """
    sizes = [tree.num_tokens for tree in trees]
    smallest = round_up_tokens(max(sizes), multiple)
    if limit is not None and smallest > limit:
        longest = max(trees, key=lambda tree: tree.num_tokens)
        raise ValueError(
            f"the longest pair (row {longest.row}) needs a micro-batch of {smallest} tokens, "
            f"but at most {limit} fit; lower max_length"
        )
    steps = _first_steps(sizes, batch_size, seed)
    totals = [sum(step) for step in steps]
    fractions = [total // n for total in (max(totals), sum(totals) // len(totals)) for n in SPLITS]
    candidates = {smallest, *(smallest * n for n in SPLITS)}
    candidates |= {round_up_tokens(number, multiple) for number in fractions}
    allowed = sorted(n for n in candidates if n >= smallest and (limit is None or n <= limit))
    costs = {}
    for n in allowed:
        num_packs = sum(len(_first_fit_decreasing(step, n)) for step in steps)
        costs[n] = num_packs * (n + PACK_OVERHEAD_TOKENS)
    return min(allowed, key=costs.__getitem__)


def packs_per_step(
    trees: Sequence[Tree], batch_size: int, num_tokens: int, *, seed: int = 0
) -> float:
    """How many packs of `num_tokens` a step has, the mean over the first steps of an epoch."""
    steps = _first_steps([tree.num_tokens for tree in trees], batch_size, seed)
    return sum(len(_first_fit_decreasing(step, num_tokens)) for step in steps) / len(steps)


def _first_steps(sizes: Sequence[int], batch_size: int, seed: int) -> list[list[int]]:
    """The sizes of the trees of each of the first steps of the first epoch."""
    order = epoch_order(len(sizes), seed, epoch=0)
    starts = range(0, len(order), batch_size)[:MAX_SIMULATED_STEPS]
    return [[sizes[i] for i in order[start : start + batch_size]] for start in starts]


def round_up_tokens(num_tokens: int, multiple: int = TOKEN_MULTIPLE) -> int:
    """The next multiple, as the tokens of a pack should be."""
    return -(-num_tokens // multiple) * multiple


def filled_share(packs: Sequence[Pack]) -> float:
    """Share of the packs' tokens that belong to a tree."""
    used = sum(tree.num_tokens for pack in packs for tree in pack.trees)
    return used / sum(len(pack.input_ids) for pack in packs)


def _first_fit_decreasing(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Put items, longest first, each into the first bin with room for it; ties in the given order.

    Returns:
        Per bin the indices of its items, in the order they were put there.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    last_size = first = 0
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        if sizes[i] > capacity:
            raise ValueError(
                f"a pair of {sizes[i]} tokens does not fit in a micro-batch of {capacity}; "
                "raise pack_tokens or lower max_length"
            )
        # Bins that had no room for an equal item have none now: room only shrinks.
        first = first if sizes[i] == last_size else 0
        while first < len(bins) and room[first] < sizes[i]:
            first += 1
        if first == len(bins):
            bins.append([])
            room.append(capacity)
        bins[first].append(i)
        room[first] -= sizes[i]
        last_size = sizes[i]
    return bins

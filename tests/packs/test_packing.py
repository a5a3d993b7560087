import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowmem_dpo.packs import packing
from lowmem_dpo.packs.packing import (
    CARD_TOKEN_MULTIPLE,
    choose_pack_tokens,
    epoch_order,
    filled_share,
    pack_trees,
    round_up_tokens,
    sequence_logps,
)
from tests.packs.folding import fold


def make_tree(row, trunk, chosen, rejected, start=1):
    """A tree of the given lengths whose ids name the row and the place."""
    ids = iter(range(1000 * row, 1000 * row + 999))
    parts = [tuple(next(ids) for _ in range(n)) for n in (trunk, chosen, rejected)]
    return fold(row, *parts, start, start)


def random_trees(num_trees, seed=0, longest=40):
    draw = random.Random(seed)
    return [
        make_tree(row, draw.randint(1, longest), draw.randint(1, longest), draw.randint(0, longest))
        for row in range(1, num_trees + 1)
    ]


lengths = st.tuples(st.integers(2, 9), st.integers(0, 9), st.integers(0, 9))


@given(st.lists(lengths, min_size=1, max_size=12), st.integers(27, 60))
def test_pack_trees_holds_every_tree_once_within_n(shapes, num_tokens):
    trees = [make_tree(row, *shape) for row, shape in enumerate(shapes, start=1)]
    packs = pack_trees(trees, num_tokens)
    assert sorted(t.row for pack in packs for t in pack.trees) == [t.row for t in trees]
    for pack in packs:
        assert pack.input_ids.shape == pack.position_ids.shape == (num_tokens,)
        assert all(tree is trees[tree.row - 1] for tree in pack.trees)
        assert sum(tree.num_tokens for tree in pack.trees) <= num_tokens


@given(st.lists(lengths, min_size=1, max_size=12), st.integers(27, 60))
def test_pack_trees_lays_out_ids_positions_rows_and_targets(shapes, num_tokens):
    trees = [make_tree(row, *shape) for row, shape in enumerate(shapes, start=1)]
    for pack in pack_trees(trees, num_tokens):
        ids, positions = pack.input_ids.tolist(), pack.position_ids.tolist()
        end = 0
        rows, targets = pack.rows.tolist(), pack.targets.tolist()
        for tree, layout, counts in zip(pack.trees, pack.layout, pack.counts, strict=True):
            start, trunk, chosen, rejected = layout
            assert start == end
            assert (trunk, chosen, rejected) == (
                tree.trunk_len,
                tree.chosen_len,
                tree.rejected_len,
            )
            end = start + tree.num_tokens
            assert list(ids[start:end]) == list(tree.ids)
            after_trunk = [*range(trunk, trunk + chosen), *range(trunk, trunk + rejected)]
            assert positions[start:end] == [*range(trunk), *after_trunk]
            assert counts[0] + counts[1] == tree.num_chosen_tokens
            assert counts[0] + counts[2] == tree.num_rejected_tokens
            for _ in range(sum(counts)):
                row, target = rows.pop(0), targets.pop(0)
                at = ids.index(target)
                predictor = start + trunk - 1 if at == start + trunk + chosen else at - 1
                assert start <= row == predictor < end
        assert (rows, targets) == ([], [])
        assert ids[end:] == positions[end:] == [0] * (num_tokens - end)


def first_fit_decreasing(sizes, capacity):
    """The textbook algorithm, with every bin tried from the first."""
    bins = []
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        fitting = (b for b in bins if sum(sizes[j] for j in b) + sizes[i] <= capacity)
        target = next(fitting, None)
        if target is None:
            bins.append(target := [])
        target.append(i)
    return bins


@given(st.lists(st.integers(1, 20), max_size=40))
def test_pack_trees_is_first_fit_decreasing(sizes):
    trees = [make_tree(row, size, 0, 0) for row, size in enumerate(sizes, start=1)]
    packs = pack_trees(trees, 20)
    indices = [[tree.row - 1 for tree in pack.trees] for pack in packs]
    assert indices == first_fit_decreasing(sizes, 20)


def test_pack_trees_refuses_a_tree_that_does_not_fit():
    with pytest.raises(ValueError, match="a pair of 30 tokens does not fit in a micro-batch of 29"):
        pack_trees([make_tree(1, 10, 10, 10)], 29)


def test_sequence_logps_sums_each_sequence_with_the_shared_tokens_in_both():
    trees = [
        fold(1, (5, 6, 7), (8, 9), (4,), 2, 2),
        fold(2, (5, 6, 7), (8,), (), 1, 2),
        fold(3, (5,), (1, 2, 3, 4, 5, 6), (2,), 1, 1),
    ]
    (pack,) = pack_trees(trees, 32)
    token_logps = torch.randn(len(pack.rows), generator=torch.Generator().manual_seed(0))
    token_logps.requires_grad_()
    chosen, rejected = sequence_logps(token_logps, pack)
    assert [tree.row for tree in pack.trees] == [3, 1, 2]
    first = 0
    for i, (shared, own, other) in enumerate(pack.counts):
        parts = token_logps[first : first + shared + own + other].split([shared, own, other])
        torch.testing.assert_close(chosen[i], parts[0].sum() + parts[1].sum())
        torch.testing.assert_close(rejected[i], parts[0].sum() + parts[2].sum())
        first += shared + own + other
    weights = torch.tensor([1.0, 10.0, 100.0])
    ((chosen * weights).sum() - 1000 * (rejected * weights).sum()).backward()
    expected = [
        factor * weight
        for weight, counts in zip(weights.tolist(), pack.counts, strict=True)
        for factor, count in zip((-999.0, 1.0, -1000.0), counts, strict=True)
        for _ in range(count)
    ]
    assert token_logps.grad.tolist() == expected


def test_sequence_logps_weigh_what_lies_beyond_the_shorter_completion():
    trees = [
        fold(1, (5, 6, 7), (8, 9, 3, 3), (4,), 2, 2),  # chosen 7 8 9 3 3, rejected 7 4
        fold(2, (5, 6, 7, 8), (9,), (), 1, 3),  # chosen 6 7 8 9, rejected 8: shared, in the tail
        fold(3, (5, 6), (), (1, 2, 3), 1, 1),  # chosen 6, rejected 6 1 2 3
    ]
    (pack,) = pack_trees(trees, 32)
    wanted = {1: ([7, 8], [9, 3, 3], [7, 4], []), 2: ([6], [7, 8, 9], [8], [])}
    wanted[3] = ([6], [], [6], [1, 2, 3])
    token_logps = -torch.arange(1.0, len(pack.rows) + 1).square()
    chosen, rejected = sequence_logps(token_logps, pack, 0.25)
    start = 0
    for i, (tree, counts) in enumerate(zip(pack.trees, pack.counts, strict=True)):
        run = slice(start, start + sum(counts))
        by_token = {}
        for token, logp in zip(pack.targets[run].tolist(), token_logps[run].tolist(), strict=True):
            by_token.setdefault(token, []).append(logp)
        start = run.stop
        head_w, tail_w, head_l, tail_l = (
            sum(logp for token in dict.fromkeys(tokens) for logp in by_token[token])
            for tokens in wanted[tree.row]
        )
        assert chosen[i].item() == head_w + 0.25 * tail_w
        assert rejected[i].item() == head_l + 0.25 * tail_l
    for ours, plain in zip(
        sequence_logps(token_logps, pack, 1.0), sequence_logps(token_logps, pack), strict=True
    ):
        torch.testing.assert_close(ours, plain)


def test_sequence_logps_of_unscored_runs_are_zero():
    (pack,) = pack_trees([fold(1, (1, 2), (3,), (), 1, 2)], 8)
    chosen, rejected = sequence_logps(torch.tensor([-1.0, -2.0]), pack)
    assert (chosen.tolist(), rejected.tolist()) == ([-3.0], [0.0])


def test_epoch_order_is_a_fixed_permutation_of_its_own_for_every_seed_and_epoch():
    orders = [epoch_order(20, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(20)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    state = random.getstate()
    assert epoch_order(20, 1, 1) == orders[-1]
    assert random.getstate() == state
    assert epoch_order(5, seed=42, epoch=0) == [4, 1, 0, 3, 2]


def simulated_cost(trees, batch_size, num_tokens, overhead, seed):
    order = epoch_order(len(trees), seed, 0)
    cost = 0
    for start in range(0, len(order), batch_size):
        packs = pack_trees([trees[i] for i in order[start : start + batch_size]], num_tokens)
        cost += len(packs) * (num_tokens + overhead)
    return cost


@pytest.mark.parametrize("overhead", [0, 128, 2000])
def test_choose_pack_tokens_is_no_dearer_than_any_round_number(overhead, monkeypatch):
    monkeypatch.setattr(packing, "PACK_OVERHEAD_TOKENS", overhead)
    trees = random_trees(96, longest=100)
    chosen = choose_pack_tokens(trees, 16, seed=3)
    assert chosen % 64 == 0
    cost = simulated_cost(trees, 16, chosen, overhead, seed=3)
    for other in (320, 512, 1024, 2048, 4096):
        assert cost <= simulated_cost(trees, 16, other, overhead, seed=3)


def test_choose_pack_tokens_takes_the_smallest_of_equals_and_few_packs_where_they_cost(
    monkeypatch,
):
    trees = [make_tree(row, 32, 16, 16) for row in range(1, 65)]
    monkeypatch.setattr(packing, "PACK_OVERHEAD_TOKENS", 0)
    assert choose_pack_tokens(trees, 16) == 64
    monkeypatch.setattr(packing, "PACK_OVERHEAD_TOKENS", 1)
    assert choose_pack_tokens(trees, 16) == 16 * 64
    assert choose_pack_tokens(trees, 16, limit=600) == 8 * 64


def test_choose_pack_tokens_keeps_to_the_longest_tree_and_the_limit():
    trees = [make_tree(1, 50, 40, 40), *random_trees(31, longest=20)]
    longest = max(tree.num_tokens for tree in trees)
    assert longest == 130
    for limit in (192, 200, 300, 1000, None):
        chosen = choose_pack_tokens(trees, 8, limit=limit)
        assert longest <= chosen <= (limit or 10_000)
    assert choose_pack_tokens(trees, 8, limit=192) == 192
    with pytest.raises(ValueError, match=r"\(row 1\) needs .* 192 tokens, but at most 191 fit"):
        choose_pack_tokens(trees, 8, limit=191)


def test_choose_pack_tokens_gives_a_card_its_own_multiple():
    trees = [make_tree(1, 50, 40, 40), *random_trees(31, longest=100)]
    for batch_size in (1, 5, 8, 16):
        assert choose_pack_tokens(trees, batch_size, multiple=CARD_TOKEN_MULTIPLE) % 128 == 0
    assert choose_pack_tokens(trees[:1], 8, multiple=CARD_TOKEN_MULTIPLE) == 256


def test_round_up_tokens_gives_the_next_multiple_of_64():
    assert [round_up_tokens(n) for n in (0, 1, 63, 64, 65, 1000)] == [0, 64, 64, 64, 128, 1024]


def test_fill_is_the_share_of_tokens_that_belong_to_trees():
    packs = pack_trees([make_tree(1, 5, 2, 1), make_tree(2, 3, 1, 0)], 8)
    assert len(packs) == 2
    assert filled_share(packs) == 12 / 16

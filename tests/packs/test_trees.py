import hashlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowmem_dpo.packs.packing import scored_tokens
from lowmem_dpo.tokens.trees import TokenPair, build_tree, common_prefix_length
from tests.packs.folding import fold


@st.composite
def token_pairs(draw):
    """Pairs over three ids, so that trunks of every length occur, also 0 and whole sequences."""
    ids = st.integers(0, 2)
    shared = draw(st.lists(ids, max_size=6))
    chosen = [*shared, *draw(st.lists(ids, max_size=6)), 1]
    rejected = [*shared, *draw(st.lists(ids, max_size=6)), 2]
    starts = [draw(st.integers(1, max(1, len(side) - 1))) for side in (chosen, rejected)]
    return TokenPair(1, chosen, rejected, *starts)


def flat_index(tree, side, position):
    """Where a position of a sequence stands in the flat layout."""
    if position < tree.trunk_len:
        return position
    return position + (tree.chosen_len if side == "rejected" else 0)


def scored_by_brute_force(pair, tree):
    """(row, target) of the scored tokens of chosen and of rejected, straight from the pair."""
    sides = {
        "chosen": (pair.chosen_ids, pair.chosen_start),
        "rejected": (pair.rejected_ids, pair.rejected_start),
    }
    return [
        [(flat_index(tree, side, p - 1), ids[p]) for p in range(start, len(ids))]
        for side, (ids, start) in sides.items()
    ]


@given(token_pairs())
def test_build_tree_holds_both_sequences_and_the_longest_trunk(pair):
    tree = build_tree(pair)
    assert list(tree.chosen_ids) == pair.chosen_ids
    assert list(tree.rejected_ids) == pair.rejected_ids
    branches = pair.chosen_ids[tree.trunk_len :], pair.rejected_ids[tree.trunk_len :]
    assert [tree.chosen_len, tree.rejected_len] == [len(branch) for branch in branches]
    assert not (all(branches) and branches[0][0] == branches[1][0])
    assert tree.num_tokens == tree.trunk_len + tree.chosen_len + tree.rejected_len
    assert tree.num_chosen_tokens == len(pair.chosen_ids) - pair.chosen_start
    assert tree.num_rejected_tokens == len(pair.rejected_ids) - pair.rejected_start


@given(token_pairs())
def test_scored_tokens_lists_every_completion_token_with_the_row_before_it(pair):
    tree = build_tree(pair)
    tokens = scored_tokens(tree)
    runs = list(zip(tokens.rows, tokens.targets, strict=True))
    shared = runs[: tokens.num_shared]
    chosen = runs[tokens.num_shared : tokens.num_shared + tokens.num_chosen]
    rejected = runs[tokens.num_shared + tokens.num_chosen :]
    assert len(rejected) == tokens.num_rejected
    # Rows rise along a sequence, so sorting puts shared and own tokens in reading order.
    expected_chosen, expected_rejected = scored_by_brute_force(pair, tree)
    assert sorted(shared + chosen) == sorted(expected_chosen)
    assert sorted(shared + rejected) == sorted(expected_rejected)
    assert len(shared + chosen) == tree.num_chosen_tokens
    assert len(shared + rejected) == tree.num_rejected_tokens
    both = set(expected_chosen) & set(expected_rejected)
    assert {(r, t) for r, t in both if r + 1 < tree.trunk_len} == set(shared)


def test_scored_tokens_uses_the_last_trunk_row_for_both_branches():
    tokens = scored_tokens(fold(1, (5, 6, 7), (8, 9), (4,), 2, 2))
    assert tokens.rows == [1, 2, 3, 2]
    assert tokens.targets == [7, 8, 9, 4]
    assert (tokens.num_shared, tokens.num_chosen, tokens.num_rejected) == (1, 2, 1)


def test_scored_tokens_knows_trunk_tokens_of_one_side_only():
    tokens = scored_tokens(fold(1, (5, 6, 7), (8,), (), 1, 2))
    assert tokens.rows == [1, 0, 2]
    assert tokens.targets == [7, 6, 8]
    assert (tokens.num_shared, tokens.num_chosen, tokens.num_rejected) == (1, 2, 0)


def test_scored_tokens_leaves_first_tokens_out_where_there_is_no_trunk():
    tokens = scored_tokens(fold(1, (), (1, 2), (3, 4), 1, 1))
    assert (tokens.rows, tokens.targets) == ([0, 2], [2, 4])


def test_digest_covers_tokens_and_scored_positions_but_not_the_row():
    tree = fold(1, (5, 6), (7,), (8,), 1, 1)
    assert tree.digest == fold(2, (5, 6), (7,), (8,), 1, 1).digest
    # Caches on disk are keyed by it, so it must not change.
    content = struct.pack("<5q4i", 2, 1, 1, 1, 1, 5, 6, 7, 8)
    assert tree.digest == hashlib.sha256(content).hexdigest()
    others = [
        fold(1, (5, 6), (7,), (9,), 1, 1),
        fold(1, (5, 6), (8,), (7,), 1, 1),
        fold(1, (5,), (6, 7), (8,), 1, 1),
        fold(1, (5, 6), (7,), (8,), 2, 1),
        fold(1, (5, 6), (7,), (8,), 1, 2),
    ]
    assert len({tree.digest, *(other.digest for other in others)}) == 6


@given(st.lists(st.integers(0, 1), max_size=600), st.lists(st.integers(0, 1), max_size=600))
def test_common_prefix_length_of_long_sequences_is_where_they_differ(ids, others):
    shared = [7] * 300
    length = next((i for i, (a, b) in enumerate(zip(ids, others, strict=False)) if a != b), None)
    length = min(len(ids), len(others)) if length is None else length
    assert common_prefix_length(ids, others) == length
    assert common_prefix_length(shared + ids, shared + others) == 300 + length


def test_build_tree_refuses_a_scored_first_token():
    with pytest.raises(AssertionError):
        build_tree(TokenPair(1, [1], [2], 0, 1))

"""Trees from their parts, folded as a run folds them."""

from lowmem_dpo.tokens.trees import TokenPair, Tree, build_tree


def fold(row, trunk, chosen, rejected, chosen_start, rejected_start) -> Tree:
    """The tree of a pair whose sequences are trunk+chosen and trunk+rejected."""
    sides = [*trunk, *chosen], [*trunk, *rejected]
    tree = build_tree(TokenPair(row, *sides, chosen_start, rejected_start))
    assert tree.trunk_len == len(trunk)
    return tree

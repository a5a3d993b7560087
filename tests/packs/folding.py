"""Trees from their parts, folded as a run folds them."""

from lowmem_dpo.packs.packing import Tree, build_tree
from lowmem_dpo.tokens.encoding import TokenPair


def fold(row, trunk, chosen, rejected, chosen_start, rejected_start) -> Tree:
    """The tree of a pair whose sequences are trunk+chosen and trunk+rejected."""
    pair = TokenPair(row, trunk + chosen, trunk + rejected, chosen_start, rejected_start)
    tree = build_tree(pair)
    assert tree.trunk == trunk
    return tree

"""The pairs that steps of a peer and of ours are rehearsed on: of one length, or of a file."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from _rehearsals import TreeShape, tree_of_shape
from transformers import AutoTokenizer

from lowmem_dpo.data.reading import read_preferences
from lowmem_dpo.settings.groups import EncodingSettings
from lowmem_dpo.tokens.encoding import encode_pairs
from lowmem_dpo.tokens.trees import TokenPair, Tree, build_tree

Shapes = tuple[TreeShape, ...]


@dataclass(frozen=True)
class Workload:
    """Optimizer steps.

    Attributes:
        name: For the table.
        trees: All pairs that a run would have, from whose lengths it chooses N.
        steps: The pairs of each step.
    """

    name: str
    trees: list[Tree]
    steps: list[list[Tree]]


def of_length(length: int, num_pairs: int) -> Workload:
    """A step of pairs of two sequences of that length, half prompt and half completion."""
    tree = tree_of_shape(TreeShape(length // 2, length - length // 2, length - length // 2))
    return Workload(f"2x{length}", [tree] * num_pairs, [[tree] * num_pairs])


def of_file(
    data: str, tokenizer: str, *, num_pairs: int, num_steps: int, max_length: int, seed: int
) -> Workload:
    """Steps drawn from a preference file, as a shuffled epoch draws them."""
    preferences, _ = read_preferences(data)
    settings = EncodingSettings(max_length=max_length, on_bad_row="skip")
    trees, _ = encode_pairs(preferences, AutoTokenizer.from_pretrained(tokenizer), settings)
    trees = [_of_its_shape(tree) for tree in trees]
    order = random.Random(seed).sample(trees, len(trees))
    starts = range(0, len(order) - num_pairs + 1, num_pairs)[:num_steps]
    return Workload("real lengths", trees, [order[s : s + num_pairs] for s in starts])


def _of_its_shape(tree: Tree) -> Tree:
    """Trunk and branches as long as the pair's; answers that begin alike count as prompt there."""
    return tree_of_shape(TreeShape(tree.trunk_len, tree.chosen_len, tree.rejected_len))


def shape_of(tree: Tree) -> TreeShape:
    """Its lengths as a peer sees them: a prompt that belongs to both sequences, two completions."""
    return TreeShape(tree.chosen_start, tree.num_chosen_tokens, tree.num_rejected_tokens)


def micro_batches(step: Sequence[Tree], size: int) -> list[Shapes]:
    """A peer's micro-batches: so many pairs each, in the order in which they were drawn."""
    shapes = [shape_of(tree) for tree in step]
    return [tuple(shapes[i : i + size]) for i in range(0, len(shapes), size)]


def padded_tokens(pairs: Shapes) -> int:
    """Tokens of a micro-batch padded to its longest sequence."""
    return 2 * len(pairs) * max(p.prompt + max(p.chosen, p.rejected) for p in pairs)


def unshared(tree: Tree) -> Tree:
    """A pair of the same lengths whose sequences have no more than their first token in common."""
    prompt, chosen, rejected = shape_of(tree)
    other_prompt = [3] + [4] * (prompt - 1)
    ids = [3] * prompt + [1] * chosen, other_prompt + [2] * rejected
    return build_tree(TokenPair(tree.row, *ids, prompt, prompt))

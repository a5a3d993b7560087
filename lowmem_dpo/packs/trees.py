"""Token trees: what chosen and rejected share is held once.

Chosen and rejected begin with the same tokens: the prompt, and often some of the answer. Their
longest common prefix is the trunk, what remains of each is a branch:

    trunk [p p p a a] ─┬─ chosen   [c c c]        flat layout: p p p a a c c c r r
                       └─ rejected [r r]

A causal model computes the same for the trunk in both sequences, so a tree costs len(trunk) tokens
less than its pair, and its log-probs are those of the pair. The last trunk token predicts the first
token of both branches. For the idea see https://github.com/frankxwang/dpo-prefix-sharing.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property

from lowmem_dpo.data.encoding import TokenPair, common_prefix_length


@dataclass(frozen=True)
class Tree:
    """One pair as a trunk and two branches.

    Attributes:
        row: The pair's row in its file.
        trunk: Token ids common to both sequences; may reach into the completions.
        chosen: The rest of the chosen sequence; may be empty.
        rejected: The rest of the rejected sequence; may be empty.
        chosen_start: Position of the first scored token in the chosen sequence, at least 1.
        rejected_start: The same in the rejected sequence.
        num_tokens: Tokens the model computes: trunk and branches.
        num_chosen_tokens: Scored tokens of the chosen sequence.
        num_rejected_tokens: Scored tokens of the rejected sequence.
    """

    row: int
    trunk: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    chosen_start: int
    rejected_start: int
    num_tokens: int
    num_chosen_tokens: int
    num_rejected_tokens: int

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the token ids and the scored positions; the row does not matter."""
        content = [self.trunk, self.chosen, self.rejected, self.chosen_start, self.rejected_start]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


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


def build_tree(pair: TokenPair) -> Tree:
    """Fold a pair at the longest common prefix of its two sequences."""
    assert pair.chosen_start >= 1 and pair.rejected_start >= 1, "nothing predicts a first token"
    trunk_len = common_prefix_length(pair.chosen_ids, pair.rejected_ids)
    return Tree(
        row=pair.row,
        trunk=pair.chosen_ids[:trunk_len],
        chosen=pair.chosen_ids[trunk_len:],
        rejected=pair.rejected_ids[trunk_len:],
        chosen_start=pair.chosen_start,
        rejected_start=pair.rejected_start,
        num_tokens=len(pair.chosen_ids) + len(pair.rejected_ids) - trunk_len,
        num_chosen_tokens=len(pair.chosen_ids) - pair.chosen_start,
        num_rejected_tokens=len(pair.rejected_ids) - pair.rejected_start,
    )


def scored_tokens(tree: Tree) -> ScoredTokens:
    """List the scored tokens of a tree and the rows that predict them."""
    flat = (*tree.trunk, *tree.chosen, *tree.rejected)
    trunk_len, first_rejected = len(tree.trunk), len(tree.trunk) + len(tree.chosen)
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

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
    """

    row: int
    trunk: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    chosen_start: int
    rejected_start: int

    @property
    def num_tokens(self) -> int:
        """Tokens the model computes: trunk and branches."""
        return len(self.trunk) + len(self.chosen) + len(self.rejected)

    @property
    def num_chosen_tokens(self) -> int:
        """Scored tokens of the chosen sequence."""
        return len(self.trunk) + len(self.chosen) - self.chosen_start

    @property
    def num_rejected_tokens(self) -> int:
        """Scored tokens of the rejected sequence."""
        return len(self.trunk) + len(self.rejected) - self.rejected_start

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
    )


def scored_tokens(tree: Tree) -> ScoredTokens:
    """List the scored tokens of a tree and the rows that predict them."""
    starts = (tree.chosen_start, tree.rejected_start)
    trunk_len = len(tree.trunk)
    shared = _trunk_run(tree, max(starts), trunk_len)
    # The sides start apart where a token merged across the end of one side's prompt.
    chosen = _trunk_run(tree, tree.chosen_start, min(tree.rejected_start, trunk_len))
    chosen += _branch_run(tree, tree.chosen, trunk_len, tree.chosen_start)
    rejected = _trunk_run(tree, tree.rejected_start, min(tree.chosen_start, trunk_len))
    rejected += _branch_run(tree, tree.rejected, trunk_len + len(tree.chosen), tree.rejected_start)
    runs = [*shared, *chosen, *rejected]
    return ScoredTokens(
        rows=[row for row, _ in runs],
        targets=[target for _, target in runs],
        num_shared=len(shared),
        num_chosen=len(chosen),
        num_rejected=len(rejected),
    )


def _trunk_run(tree: Tree, start: int, stop: int) -> list[tuple[int, int]]:
    """(row, target) of the trunk tokens at positions start to stop."""
    return [(position - 1, tree.trunk[position]) for position in range(start, stop)]


def _branch_run(
    tree: Tree, branch: tuple[int, ...], offset: int, start: int
) -> list[tuple[int, int]]:
    """(row, target) of a branch's tokens at positions >= start; its first row is `offset`."""
    trunk_len = len(tree.trunk)
    first = max(start - trunk_len, 0)
    return [
        (offset + i - 1 if i > 0 else trunk_len - 1, branch[i]) for i in range(first, len(branch))
    ]

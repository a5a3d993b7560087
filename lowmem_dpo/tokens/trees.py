"""Pairs in token ids, as trees: what both sequences of a pair share is held once.

Both begin with the same tokens: the prompt, and often
some of the answer. Their longest common prefix is the trunk, what remains of each is a branch:

    trunk [p p p a a] ─┬─ chosen   [c c c]        flat layout: p p p a a c c c r r
                       └─ rejected [r r]

A causal model computes the same for the trunk in both sequences, so a tree costs len(trunk) tokens
less than its pair, and its log-probs are those of the pair. The last trunk token predicts the first
token of both branches. For the idea see https://github.com/frankxwang/dpo-prefix-sharing.
"""

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

ID_TYPE = "i"  # of arrays of token ids: int32


@dataclass(frozen=True)
class TokenPair:
    """A preference in token ids, on its way to a tree.

    Attributes:
        row: Its row in the file.
        chosen_ids: Prompt and chosen completion.
        rejected_ids: Prompt and rejected completion.
        chosen_start: Position of the first scored token of `chosen_ids`, at least 1.
        rejected_start: The same for `rejected_ids`.
        prompt_key: Digest of the prompt's whole text, 32 hex digits: ids change where tokens merge
            or are cut.
    """

    row: int
    chosen_ids: list[int]
    rejected_ids: list[int]
    chosen_start: int
    rejected_start: int
    prompt_key: str = ""


@dataclass(frozen=True, slots=True)
class Tree:
    """A pair as a trunk and two branches.

    Attributes:
        row: The pair's row in its file.
        ids: int32 token ids: of the trunk, the rest of chosen, the rest of rejected, end to end.
        trunk_len: Tokens common to both sequences; may reach into the completions.
        chosen_len: Tokens of the rest of the chosen sequence, may be 0.
        rejected_len: Tokens of the rest of the rejected sequence, may be 0.
        chosen_start: Position of the first scored token in the chosen sequence, at least 1.
        rejected_start: The same in the rejected sequence.
        prompt_key: As of the pair.
        digest: SHA-256 (hex) of the token ids and the scored positions; the row does not matter.
    """

    row: int
    ids: "array[int]"
    trunk_len: int
    chosen_len: int
    rejected_len: int
    chosen_start: int
    rejected_start: int
    prompt_key: str
    digest: str

    @property
    def num_tokens(self) -> int:
        """Tokens the model computes: trunk and branches."""
        return len(self.ids)

    @property
    def chosen_ids(self) -> "array[int]":
        """The chosen sequence."""
        return self.ids[: self.trunk_len + self.chosen_len]

    @property
    def rejected_ids(self) -> "array[int]":
        """The rejected sequence."""
        return self.ids[: self.trunk_len] + self.ids[self.trunk_len + self.chosen_len :]

    @property
    def num_chosen_tokens(self) -> int:
        """Scored tokens of the chosen sequence."""
        return self.trunk_len + self.chosen_len - self.chosen_start

    @property
    def num_rejected_tokens(self) -> int:
        """Scored tokens of the rejected sequence."""
        return self.trunk_len + self.rejected_len - self.rejected_start


def build_tree(pair: TokenPair) -> Tree:
    """Fold a pair at the longest common prefix of its two sequences."""
    chosen, rejected = pair.chosen_ids, pair.rejected_ids
    trunk_len = common_prefix_length(chosen, rejected)
    ids = array(ID_TYPE, chosen)
    ids.extend(rejected[trunk_len:])
    lengths = (trunk_len, len(chosen) - trunk_len, len(rejected) - trunk_len)
    starts = (pair.chosen_start, pair.rejected_start)
    return tree_of(pair.row, ids, lengths, starts, pair.prompt_key)


def tree_of(
    row: int,
    ids: "array[int]",
    lengths: tuple[int, int, int],
    starts: tuple[int, int],
    prompt_key: str,
) -> Tree:
    """A tree from its parts, which the digest is made of; arguments as its attributes."""
    assert min(starts) >= 1, "nothing predicts a first token"
    digest = hashlib.sha256(array("q", (*lengths, *starts)).tobytes() + ids.tobytes()).hexdigest()
    return Tree(row, ids, *lengths, *starts, prompt_key, digest)


def common_prefix_length(ids: Sequence[int], other_ids: Sequence[int]) -> int:
    """Number of leading tokens that two sequences of one type share."""
    limit, step = min(len(ids), len(other_ids)), 256
    # Slices are compared fast; the place where they differ is looked for in the last one.
    blocks = (slice(i, i + step) for i in range(0, limit, step))
    first = next((block.start for block in blocks if ids[block] != other_ids[block]), limit)
    return next((i for i in range(first, limit) if ids[i] != other_ids[i]), limit)

"""Where the tiles of a pack are: which rows a program of the attention kernels takes, and sees.

A tree `[trunk | chosen | rejected]` is two segments of rows, trunk+chosen and rejected. A tile is a
run of rows of one segment, and segments are cut from their own first row. So what a tile holds, and
in which order it meets the others, follows from its own tree: the bits of a tree's result are the
same in any pack.

A table has a row of int32 a tile. It is made on the host once a pack and size of tile, and stays on
the device for all layers. Rows behind the last tree have tiles too, which see nothing and so write
zeros. Launches start with the tiles that have the most to do, lest one of them ends alone.

Shapes: N packed tokens, C tiles of a pack.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

TreeLayout = Sequence[tuple[int, int, int, int]]
"""(start, trunk, chosen, rejected) of each tree, in tokens, in pack order."""


class QueryTile(NamedTuple):
    """Queries of one segment, and the keys they see: a prefix whole, and their own causally.

    A position is a token's place in its sequence, where windows and causality are measured.
    """

    row: int  # the first query
    num_queries: int
    position: int  # of the first query
    prefix_row: int
    prefix_len: int  # keys of the trunk, at positions from 0, where it is another segment
    own_row: int
    own_position: int
    own_len: int  # keys of the segment up to the last query


class KeyTile(NamedTuple):
    """Keys of one segment, and the queries that see them: of their segment, and of rejected."""

    row: int  # the first key
    num_keys: int
    position: int  # of the first key
    num_own: int  # queries of the segment from the first key on
    other_row: int
    num_other: int  # queries of the rejected branch, where the tile holds trunk keys
    trunk_len: int  # positions from here on are hidden from the rejected branch


class TreePlan:
    """One pack's layout, and the tables of its tiles.

    Args:
        layout: The trees, in pack order, without gaps.
        num_tokens: N, padding included.

    Raises:
        ValueError: If the trees do not lie end to end, or do not fit.
    """

    def __init__(self, layout: TreeLayout, num_tokens: int) -> None:
        end = 0
        for start, *lengths in layout:
            if start != end or min(lengths) < 0:
                raise ValueError(
                    f"trees must lie end to end, got {(start, *lengths)} where row {end} comes "
                    "next; a tree is (start, trunk, chosen, rejected)"
                )
            end += sum(lengths)
        if end > num_tokens:
            raise ValueError(f"the trees have {end} tokens, the pack {num_tokens}; make it longer")
        self.layout = layout
        self.num_tokens = num_tokens
        self._end = end  # the first row behind the trees
        self._tables: dict[tuple[str, int, torch.device], Tensor] = {}

    def num_pairs(self, window: int | None) -> int:
        """Pairs of a query and a key that it sees, of one head.

        Args:
            window: Positions a query looks back, itself included; None for all.
        """
        pairs = 0
        for _, trunk, chosen, rejected in self.layout:
            before, *lengths = trunk, trunk + chosen, trunk + rejected
            pairs += sum(_causal_pairs(length, window) for length in lengths)
            pairs -= _causal_pairs(before, window)
        return pairs

    def query_tiles(self, size: int, device: torch.device) -> Tensor:
        """Tiles of at most `size` queries, [C, 8] int32; columns are those of `QueryTile`."""
        place = ("query", size, device)
        if place not in self._tables:
            tiles = sorted(self._query_tiles(size), key=lambda t: -t.prefix_len - t.own_len)
            self._tables[place] = _table(tiles, device)
        return self._tables[place]

    def key_tiles(self, size: int, device: torch.device) -> Tensor:
        """Tiles of at most `size` keys, [C, 7] int32; columns are those of `KeyTile`."""
        place = ("key", size, device)
        if place not in self._tables:
            tiles = sorted(self._key_tiles(size), key=lambda t: -t.num_own - t.num_other)
            self._tables[place] = _table(tiles, device)
        return self._tables[place]

    def _query_tiles(self, size: int) -> Iterator[QueryTile]:
        for start, trunk, chosen, rejected in self.layout:
            for i, count in _cut(trunk + chosen, size):
                yield QueryTile(start + i, count, i, start, 0, start, 0, i + count)
            own = start + trunk + chosen
            for i, count in _cut(rejected, size):
                yield QueryTile(own + i, count, trunk + i, start, trunk, own, trunk, i + count)
        for i, count in _cut(self.num_tokens - self._end, size):
            row = self._end + i
            yield QueryTile(row, count, 0, row, 0, row, 0, 0)

    def _key_tiles(self, size: int) -> Iterator[KeyTile]:
        for start, trunk, chosen, rejected in self.layout:
            own = start + trunk + chosen
            for i, count in _cut(trunk + chosen, size):
                others = rejected if i < trunk else 0
                yield KeyTile(start + i, count, i, trunk + chosen - i, own, others, trunk)
            for i, count in _cut(rejected, size):
                yield KeyTile(own + i, count, trunk + i, rejected - i, own, 0, trunk)
        for i, count in _cut(self.num_tokens - self._end, size):
            yield KeyTile(self._end + i, count, 0, 0, self._end, 0, 0)


def _causal_pairs(length: int, window: int | None) -> int:
    """Pairs of one plain sequence."""
    short = length if window is None else min(length, window)
    return short * (short + 1) // 2 + (length - short) * short


def _cut(length: int, size: int) -> Iterator[tuple[int, int]]:
    """(first, count) of consecutive runs of at most `size`."""
    return ((i, min(size, length - i)) for i in range(0, length, size))


def _table(tiles: Sequence[tuple[int, ...]], device: torch.device) -> Tensor:
    """Tiles on a device; on a card by a copy for which the host does not wait.

    torch's allocator of pinned memory keeps it until that copy is done.
    """
    table = torch.tensor(tiles, dtype=torch.int32)
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table

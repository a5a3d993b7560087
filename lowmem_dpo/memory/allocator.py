"""A model of torch's caching allocator: how much of a card is held for tensors, gaps included.

torch asks CUDA for segments and cuts them into blocks; freed blocks wait for the next request, and
segments go back only if a card is full. So what is held (reserved) is more than what is in use
(allocated), and a limit acts on what is held. Its rules, without expandable segments, which this
program does not set:

- a size is rounded up to a multiple of 512 bytes;
- up to 1 MiB come from the small pool, whose segments are 2 MiB; others from the large pool, whose
  segments are 20 MiB for requests below 10 MiB and the size rounded up to 2 MiB above;
- the smallest free block that is large enough is taken, of equals the one at the lowest address;
- it is split if what remains is at least 512 bytes (small pool) or more than 1 MiB (large pool),
  and the front is used;
- a freed block joins the free blocks beside it;
- if CUDA has no memory left, all segments that are wholly free are given back, and it is tried
  again.

Source: pytorch, c10/cuda/CUDACachingAllocator.cpp and the CUDA semantics in torch's documentation.
"""

import bisect
from dataclasses import dataclass, field

MIB = 2**20
ROUNDING = 512
SMALL_REQUEST = MIB
SMALL_SEGMENT = 2 * MIB
MIDDLE_REQUEST = 10 * MIB
MIDDLE_SEGMENT = 20 * MIB
LARGE_ROUNDING = 2 * MIB


@dataclass(eq=False)
class Block:
    """A part of a segment.

    Attributes:
        address: Where it begins; segments lie apart.
        size: In bytes.
        is_small: Whether it is of the small pool.
        is_free: Whether it waits for a request.
        before: The block beside it in the same segment, or None.
        behind: Likewise.
    """

    address: int
    size: int
    is_small: bool
    is_free: bool = False
    before: "Block | None" = None
    behind: "Block | None" = None


class CardIsFull(Exception):
    """A request that no segment can be had for."""


@dataclass
class Allocator:
    """The allocator of a card, as it stands.

    Attributes:
        limit_bytes: The most that may be reserved; None for no limit.
        allocated_bytes: In blocks that are in use.
        reserved_bytes: In segments.
        peak_allocated_bytes: The most so far.
        peak_reserved_bytes: The most so far.
    """

    limit_bytes: int | None = None
    allocated_bytes: int = 0
    reserved_bytes: int = 0
    peak_allocated_bytes: int = 0
    peak_reserved_bytes: int = 0
    _free: dict[bool, list[tuple[int, int, Block]]] = field(
        default_factory=lambda: {True: [], False: []}
    )
    _next_address: int = 0

    def allocate(self, nbytes: int) -> Block | None:
        """A block for so many bytes; None for 0, which take none.

        Raises:
            CardIsFull: If the limit leaves no room.
        """
        if nbytes == 0:
            return None
        size = -(-nbytes // ROUNDING) * ROUNDING
        is_small = size <= SMALL_REQUEST
        free = self._free[is_small]
        place = bisect.bisect_left(free, (size, -1))
        block = free.pop(place)[2] if place < len(free) else self._new_segment(size, is_small)
        remaining = block.size - size
        if remaining >= ROUNDING if is_small else remaining > SMALL_REQUEST:
            rest = Block(
                block.address + size, remaining, is_small, before=block, behind=block.behind
            )
            if rest.behind is not None:
                rest.behind.before = rest
            block.behind, block.size = rest, size
            self._put_back(rest)
        block.is_free = False
        self.allocated_bytes += block.size
        self.peak_allocated_bytes = max(self.peak_allocated_bytes, self.allocated_bytes)
        return block

    def free(self, block: Block | None) -> None:
        """Give a block back."""
        if block is None:
            return
        self.allocated_bytes -= block.size
        if block.before is not None and block.before.is_free:
            self._take_out(block.before)
            block = self._joined(block.before, block)
        if block.behind is not None and block.behind.is_free:
            self._take_out(block.behind)
            block = self._joined(block, block.behind)
        self._put_back(block)

    @staticmethod
    def _joined(left: Block, right: Block) -> Block:
        left.size += right.size
        left.behind = right.behind
        if right.behind is not None:
            right.behind.before = left
        return left

    def _new_segment(self, size: int, is_small: bool) -> Block:
        segment_size = -(-size // LARGE_ROUNDING) * LARGE_ROUNDING
        if is_small:
            segment_size = SMALL_SEGMENT
        elif size < MIDDLE_REQUEST:
            segment_size = MIDDLE_SEGMENT
        if self.limit_bytes is not None and self.reserved_bytes + segment_size > self.limit_bytes:
            self._release_free_segments()
            if self.reserved_bytes + segment_size > self.limit_bytes:
                raise CardIsFull
        block = Block(self._next_address, segment_size, is_small)
        self._next_address += segment_size + 1  # never beside another segment
        self.reserved_bytes += segment_size
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)
        return block

    def _release_free_segments(self) -> None:
        for is_small, free in self._free.items():
            kept = [each for each in free if each[2].before or each[2].behind]
            self.reserved_bytes -= sum(each[0] for each in free) - sum(each[0] for each in kept)
            self._free[is_small] = kept

    def _put_back(self, block: Block) -> None:
        block.is_free = True
        bisect.insort(self._free[block.is_small], (block.size, block.address, block))

    def _take_out(self, block: Block) -> None:
        free = self._free[block.is_small]
        del free[bisect.bisect_left(free, (block.size, block.address))]

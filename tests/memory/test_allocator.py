"""The model of the caching allocator, against cases worked out by hand from torch's rules."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowmem_dpo.memory.allocator import MIB, Allocator, CardIsFull


@pytest.mark.parametrize(
    "nbytes, allocated, reserved",
    [
        (0, 0, 0),
        (1, 512, 2 * MIB),
        (512, 512, 2 * MIB),
        (513, 1024, 2 * MIB),
        (MIB, MIB, 2 * MIB),
        (MIB + 1, MIB + 512, 20 * MIB),
        (10 * MIB - 512, 10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB, 10 * MIB),
        # What remains of a segment of its own is not split off up to 1 MiB: it counts as in use.
        (11 * MIB + 1, 12 * MIB, 12 * MIB),
        (12 * MIB + 1, 12 * MIB + 512, 14 * MIB),
        (19 * MIB, 20 * MIB, 20 * MIB),
    ],
)
def test_a_first_request_takes_its_rounded_size_of_a_segment(nbytes, allocated, reserved):
    allocator = Allocator()
    allocator.allocate(nbytes)
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (allocated, reserved)


def test_small_requests_share_a_segment_and_large_ones_do_not_touch_it():
    allocator = Allocator()
    for _ in range(4):
        allocator.allocate(MIB // 2)
    assert allocator.reserved_bytes == 2 * MIB
    allocator.allocate(1)
    assert allocator.reserved_bytes == 4 * MIB
    allocator.allocate(2 * MIB)
    assert allocator.reserved_bytes == 24 * MIB


def test_the_smallest_free_block_that_is_large_enough_is_taken():
    allocator = Allocator()
    large, small = allocator.allocate(64 * MIB), allocator.allocate(32 * MIB)
    allocator.free(large)
    allocator.free(small)
    assert allocator.allocate(30 * MIB).address == small.address
    assert allocator.allocate(30 * MIB).address == large.address
    assert allocator.reserved_bytes == 96 * MIB


def test_a_gap_between_blocks_in_use_serves_no_larger_request():
    allocator = Allocator()
    blocks = [allocator.allocate(4 * MIB) for _ in range(5)]  # one segment of 20 MiB
    assert allocator.reserved_bytes == 20 * MIB
    allocator.free(blocks[1])
    allocator.free(blocks[3])
    allocator.allocate(8 * MIB)
    assert allocator.reserved_bytes == 40 * MIB
    allocator.free(blocks[2])  # now the gaps are one, of 12 MiB
    allocator.allocate(12 * MIB)
    assert allocator.reserved_bytes == 40 * MIB


def test_peaks_stay_when_blocks_are_freed():
    allocator = Allocator()
    allocator.free(allocator.allocate(100 * MIB))
    allocator.allocate(1)
    assert allocator.allocated_bytes == 512
    assert allocator.peak_allocated_bytes == 100 * MIB
    assert allocator.reserved_bytes == allocator.peak_reserved_bytes == 102 * MIB


def test_a_full_card_gives_back_its_free_segments_first():
    allocator = Allocator(limit_bytes=100 * MIB)
    allocator.free(allocator.allocate(60 * MIB))
    allocator.allocate(80 * MIB)
    assert allocator.reserved_bytes == 80 * MIB
    with pytest.raises(CardIsFull):
        allocator.allocate(30 * MIB)
    allocator.allocate(20 * MIB)


@pytest.mark.parametrize("freed", [0, 1])
def test_a_full_card_keeps_segments_of_which_something_is_in_use(freed):
    allocator = Allocator(limit_bytes=40 * MIB)
    blocks = [allocator.allocate(9 * MIB), allocator.allocate(9 * MIB)]
    assert allocator.reserved_bytes == 20 * MIB
    allocator.free(blocks[freed])
    with pytest.raises(CardIsFull):
        allocator.allocate(30 * MIB)
    assert allocator.reserved_bytes == 20 * MIB


FREES = st.integers(0, 99).map(lambda place: ("free", place))
SIZES = st.one_of(st.integers(0, 2 * MIB), st.integers(0, 40 * MIB))
# A request, or the place among what is held of a block that is freed.
REQUESTS = st.lists(st.one_of(SIZES.map(lambda n: ("allocate", n)), FREES), max_size=60)


def lead(requests, limit=None):
    """The allocator after some requests, what is held then, and each peak on the way."""
    allocator, held, peaks = Allocator(limit), [], []
    for what, number in requests:
        if what == "allocate":
            held.append((number, allocator.allocate(number)))
        elif held:
            allocator.free(held.pop(number % len(held))[1])
        assert sum(n for n, _ in held) <= allocator.allocated_bytes <= allocator.reserved_bytes
        blocks = [block for _, block in held if block is not None]
        assert sum(block.size for block in blocks) == allocator.allocated_bytes
        spans = sorted((block.address, block.address + block.size) for block in blocks)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans)), "blocks overlap"
        peaks.append((allocator.peak_allocated_bytes, allocator.peak_reserved_bytes))
    assert peaks == sorted(peaks)
    return allocator, held


@given(REQUESTS)
def test_blocks_never_overlap_and_all_join_again(requests):
    allocator, held = lead(requests)
    for _, block in held:
        allocator.free(block)
    assert allocator.allocated_bytes == 0
    whole = max(20 * MIB, allocator.reserved_bytes)
    allocator.limit_bytes = whole
    allocator.allocate(whole)  # only if every segment could be given back
    assert allocator.reserved_bytes == whole


@given(REQUESTS, st.integers(0, 100 * MIB))
def test_a_limit_is_kept_to_and_changes_nothing_where_it_is_not_met(requests, limit):
    free, _ = lead(requests)
    try:
        limited, _ = lead(requests, limit)
    except CardIsFull:
        assert limit < free.peak_reserved_bytes
        return
    assert limited.peak_reserved_bytes <= limit
    assert limited.peak_allocated_bytes == free.peak_allocated_bytes
    if limit >= free.peak_reserved_bytes:
        assert limited.peak_reserved_bytes == free.peak_reserved_bytes


@given(REQUESTS, st.randoms(use_true_random=False))
def test_what_is_freed_in_a_row_may_be_freed_in_any_order(requests, rng):
    """On this `memory.extension` rests."""
    one, held = lead(requests)
    other, held_too = lead(requests)
    order = list(range(len(held)))
    rng.shuffle(order)
    for i, j in enumerate(order):
        one.free(held[i][1])
        other.free(held_too[j][1])

    def free_blocks(allocator):
        return {size: [each[:2] for each in free] for size, free in allocator._free.items()}

    assert free_blocks(one) == free_blocks(other)

"""The model of the caching allocator, against cases worked out by hand from torch's rules."""

import itertools
import random

import pytest

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


def test_any_order_of_requests_ends_with_whole_segments():
    """Blocks never overlap, and all join again."""
    allocator, rng = Allocator(), random.Random(0)
    held, requested = [], 0
    for _ in range(3000):
        if held and rng.random() < 0.5:
            nbytes, block = held.pop(rng.randrange(len(held)))
            allocator.free(block)
            requested -= nbytes
        else:
            nbytes = int(2 ** rng.uniform(0, 27))
            held.append((nbytes, allocator.allocate(nbytes)))
            requested += nbytes
        assert requested <= allocator.allocated_bytes <= allocator.reserved_bytes
        spans = sorted((b.address, b.address + b.size) for _, b in held)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
    for _, block in held:
        allocator.free(block)
    assert allocator.allocated_bytes == 0
    allocator.limit_bytes = allocator.reserved_bytes
    allocator.allocate(allocator.reserved_bytes)  # only if every segment could be given back

"""What a rehearsed step needs of a card and of the host, and about how long it takes.

The events of a trace go through the model of the caching allocator in their order. Beside what it
holds, a card keeps CUDA's own context, and less than a megabyte of cuBLAS's workspaces.

Time is a model, so a range. Each launch takes as long as its products at a share of the card's rate
or its bytes at a share of its bandwidth, whichever is longer. In the best case shares are high and
the host keeps ahead of the card; in the other they are lower, and each launch costs its own time
too. What travels between host and card is beside that in the best case, and added in the other.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lowmem_dpo.machine.card_table import Card
from lowmem_dpo.memory.allocator import MIB, Allocator, Block, CardIsFull
from lowmem_dpo.memory.extension import Happening
from lowmem_dpo.memory.trace import Key, Work

CONTEXT_BYTES = 450 * MIB
"""What CUDA's context and the kernels' code take, outside of torch: it depends on driver and card,
and this is an assumption."""


class Efficiency(NamedTuple):
    """What shares of a card's rates are reached, and what a launch takes on the host."""

    products: float
    single_products: float  # of fp32 operands, as a share of the rate for 16 bits
    memory: float
    link: float
    launch_seconds: float


BEST = Efficiency(0.85, 0.25, 0.92, 0.9, 5e-6)
OTHER = Efficiency(0.5, 0.06, 0.65, 0.6, 12e-6)


class Totals(NamedTuple):
    """What a step computes."""

    flops: float
    nbytes: float
    link_bytes: float
    launches: float
    best_on_card: float  # seconds
    best_on_link: float
    other_seconds: float

    @property
    def best_seconds(self) -> float:
        """In the best case, where what is on the link and what the host does is beside the rest."""
        return max(self.best_on_card, self.best_on_link, self.launches * BEST.launch_seconds)

    @property
    def seconds(self) -> tuple[float, float]:
        """In the best case, and in the other."""
        return self.best_seconds, self.other_seconds

    def with_uploads(self, nbytes: float, card: Card) -> "Totals":
        """The totals with so many bytes more from the host."""
        seconds = nbytes / card.link_bandwidth
        return self._replace(
            link_bytes=self.link_bytes + nbytes,
            best_on_link=self.best_on_link + seconds / BEST.link,
            other_seconds=self.other_seconds + seconds / OTHER.link,
        )


@dataclass(frozen=True)
class Rehearsal:
    """A rehearsed step.

    Attributes:
        card: The card that it was rehearsed for.
        peak_allocated_bytes: Of tensors on the card, as torch counts them.
        peak_reserved_bytes: What torch holds for them, gaps included: this is what a limit acts on.
        fits: Whether that fits in the card's memory beside its context, or in the limit.
        host_bytes: The most tensors in host memory at a time.
        components: At the peak, bytes on the card by what they are for.
        host_components: At the host's peak, likewise.
        makers: At the peak, bytes on the card by the operation and function that made them.
        flops: Floating-point operations of products.
        bytes_moved: Read and written on the card.
        link_bytes: Copied between host and card.
        launches: Kernels and copies.
        seconds: At best, and under the less favourable assumptions.
    """

    card: Card
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    fits: bool
    host_bytes: int
    components: dict[str, int]
    host_components: dict[str, int]
    makers: dict[str, int]
    flops: float
    bytes_moved: float
    link_bytes: float
    launches: int
    seconds: tuple[float, float]


def totals_of(work: Iterable[tuple[Work, float]], card: Card) -> Totals:
    """Add up what is computed, on the rates of a card.

    Args:
        work: Launches and copies, and how many times each.
        card: The card.
    """
    flops = nbytes = link_bytes = launches = 0.0
    seconds = {BEST: 0.0, OTHER: 0.0}
    for each, times in work:
        flops += times * each.flops
        nbytes += times * each.nbytes
        link_bytes += times * each.link_bytes
        launches += times
        for case in seconds:
            share = case.products if each.is_half else case.single_products
            in_products = each.flops / (card.flops * share)
            in_memory = each.nbytes / (card.memory_bandwidth * case.memory)
            seconds[case] += times * max(in_products, in_memory)
    link_seconds = {case: link_bytes / (card.link_bandwidth * case.link) for case in seconds}
    return Totals(
        flops,
        nbytes,
        link_bytes,
        launches,
        seconds[BEST],
        link_seconds[BEST],
        seconds[OTHER] + link_seconds[OTHER] + launches * OTHER.launch_seconds,
    )


def rehearsal_of(
    trace: Sequence[tuple[Happening, int]],
    totals: Totals,
    card: Card,
    *,
    limit_bytes: int | None = None,
) -> Rehearsal:
    """Lead a trace through the allocator.

    Args:
        trace: Births and deaths, with the size of each storage.
        totals: What is computed.
        card: The card.
        limit_bytes: What may be reserved; by default what the context leaves of the card.
    """
    if limit_bytes is None:
        limit_bytes = card.memory_bytes - CONTEXT_BYTES
    allocator, place = _lead_through(trace, Allocator())
    fits = allocator.peak_reserved_bytes <= limit_bytes
    if not fits and allocator.peak_allocated_bytes <= limit_bytes:
        # A full card gives back what is wholly free.
        try:
            in_limit, place = _lead_through(trace, Allocator(limit_bytes))
            allocator, fits = in_limit, True
        except CardIsFull:
            pass
    host_bytes, host_place = _host_peak(trace)
    at_peak = _alive_at(trace, place, on_card=True)
    by_maker: Counter[str] = Counter()
    for happening, nbytes in at_peak:
        by_maker[happening.storage.maker] += nbytes
    return Rehearsal(
        card=card,
        peak_allocated_bytes=allocator.peak_allocated_bytes,
        peak_reserved_bytes=allocator.peak_reserved_bytes,
        fits=fits,
        host_bytes=host_bytes,
        components=_by_component(at_peak),
        host_components=_by_component(_alive_at(trace, host_place, on_card=False)),
        makers=dict(by_maker.most_common()),
        flops=totals.flops,
        bytes_moved=totals.nbytes,
        link_bytes=totals.link_bytes,
        launches=round(totals.launches),
        seconds=totals.seconds,
    )


def _lead_through(
    trace: Sequence[tuple[Happening, int]], allocator: Allocator
) -> tuple[Allocator, int]:
    """The allocator at the end, and at which event most is allocated.

    Raises:
        CardIsFull: If the allocator's limit leaves no room.
    """
    blocks: dict[Key, Block | None] = {}
    peak = place = 0
    for i, (happening, nbytes) in enumerate(trace):
        if not happening.storage.on_card:
            continue
        if happening.is_birth:
            blocks[happening.key] = allocator.allocate(nbytes)
            if allocator.allocated_bytes > peak:
                peak, place = allocator.allocated_bytes, i
        else:
            allocator.free(blocks.pop(happening.key))
    return allocator, place


def _host_peak(trace: Sequence[tuple[Happening, int]]) -> tuple[int, int]:
    now = peak = place = 0
    for i, (happening, nbytes) in enumerate(trace):
        if not happening.storage.on_card:
            now += nbytes if happening.is_birth else -nbytes
            if now > peak:
                peak, place = now, i
    return peak, place


def _alive_at(
    trace: Sequence[tuple[Happening, int]], place: int, *, on_card: bool
) -> list[tuple[Happening, int]]:
    """What is alive after the event at a place."""
    alive: dict[Key, tuple[Happening, int]] = {}
    for happening, nbytes in trace[: place + 1]:
        if happening.storage.on_card == on_card:
            if happening.is_birth:
                alive[happening.key] = happening, nbytes
            else:
                del alive[happening.key]
    return list(alive.values())


def _by_component(alive: Iterable[tuple[Happening, int]]) -> dict[str, int]:
    counted: Counter[str] = Counter()
    for happening, nbytes in alive:
        counted[happening.storage.component] += nbytes
    return dict(counted.most_common())

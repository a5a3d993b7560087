"""From the trace of a model with few layers to that of one with many.

Every layer of a kind does the same, so a step of 80 layers need not be rehearsed as a whole. Layers
that keep the same for the backward pass are a stretch. In each the events of one period of layers
in its middle are repeated; the layers before and behind it, which may differ (what is made once is
made in the first), stay as they were seen. The result is a trace event by event: what is true at
its peak needs no assumption of where the peak is.

What grows with the number of layers outside of them (a norm of all gradients is of one number a
matrix) is taken from a second trace with one period more in each stretch. That trace is also the
proof: the first one, extended by these, must be the second one, event for event.

What dies between two births may die in any order: Python and autograd choose it by how deep their
objects are nested, and the allocator is the same after it. So here it is in the order of its names.
"""

import contextlib
import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

from lowmem_dpo.memory.trace import Event, Key, Section, Storage, Work

BEFORE = 2
"""Layers before the period that is repeated; the second is like those that follow."""
BEHIND = 2
"""Layers behind it; the last may differ, since it is the first in the backward pass."""
BESIDE = 1
"""Layers before or behind it where another stretch is the neighbour."""


class LayersDiffer(Exception):
    """The layers of a model do not repeat each other."""


class Happening(NamedTuple):
    """A birth or a death of a storage, by its name in the whole model."""

    key: Key
    storage: Storage  # of the same place in the layer that was seen
    is_birth: bool


_Event = TypeVar("_Event", Event, Happening)


class Repeat(NamedTuple):
    """Layers of a model with few, and how many copies of them a larger one has beside."""

    layers: range
    copies: int

    @property
    def num_more(self) -> int:
        """Layers that the larger model has more."""
        return self.copies * len(self.layers)


class Short(NamedTuple):
    """A model with few of its layers.

    Attributes:
        layers: Which of the model's layers it has.
        repeats: What makes the model of it, stretch by stretch.
    """

    layers: list[int]
    repeats: list[Repeat]


def period_of(kinds: Sequence[Hashable]) -> int:
    """The smallest number of layers after which the kinds of layers repeat to the end."""
    length = len(kinds)
    return next(p for p in range(1, length + 1) if list(kinds[p:]) == list(kinds[: length - p]))


def layers_to_rehearse(num_layers: int, period: int, around: int = BEFORE + BEHIND) -> int:
    """The least number of layers whose trace can be extended to `num_layers`, by whole periods.

    Args:
        num_layers: Of a stretch.
        period: After how many of them they repeat.
        around: Layers before and behind a period.
    """
    least = around + period
    return num_layers if num_layers <= least else least + (num_layers - least) % period


def shorten(types: Sequence[Hashable], kept: Sequence[Hashable], num_periods: int = 0) -> Short:
    """Choose few layers whose trace can be extended to that of all.

    Args:
        types: Of each layer.
        kept: What each layer keeps; those that keep the same are beside each other.
        num_periods: Have so many periods more than needed, in each stretch that has them.
    """
    layers: list[int] = []
    repeats = []
    for _, stretch in itertools.groupby(range(len(kept)), key=lambda layer: kept[layer]):
        members = list(stretch)
        before = BEFORE if members[0] == 0 else BESIDE
        behind = BEHIND if members[-1] == len(kept) - 1 else BESIDE
        period = period_of([types[layer] for layer in members])
        num_few = layers_to_rehearse(len(members), period, before + behind)
        copies = (len(members) - num_few) // period
        more = min(num_periods, copies)
        if copies:
            first = len(layers) + before
            repeats.append(Repeat(range(first, first + period), copies - more))
        layers += members[: num_few + more * period]
    return Short(layers, repeats)


def happenings(sections: Sequence[Section], repeats: Sequence[Repeat] = ()) -> list[Happening]:
    """A trace as a list, with copies of the layers that repeat.

    Raises:
        LayersDiffer: If something dies that was not born.
    """
    extended = _with_deaths_by_name(_extended(sections, repeats))
    alive: set[Key] = set()
    for key, _, is_birth in extended:
        if is_birth:
            alive.add(key)
        elif key in alive:
            alive.remove(key)
        else:
            raise LayersDiffer(f"{key} dies and was never born")
    return extended


def _with_deaths_by_name(events: Iterable[_Event]) -> list[_Event]:
    ordered: list[_Event] = []
    for is_birth, run in itertools.groupby(events, lambda event: event.is_birth):
        some = list(run)
        ordered += some if is_birth else sorted(some, key=_by_layer)
    return ordered


def _by_layer(event: Happening | Event) -> tuple[bool, int, str, int]:
    key = event.key if isinstance(event, Happening) else event.storage.key
    return key.layer is None, key.layer or 0, key.phase, key.number


def _extended(sections: Sequence[Section], repeats: Sequence[Repeat]) -> Iterator[Happening]:
    place = 0
    while place < len(sections):
        section = sections[place]
        repeat = _repeat_of(section.layer, repeats)
        if section.layer is None:
            yield from _of_no_layer(section.events, repeats)
            place += 1
        elif repeat is None:
            for event in section.events:
                yield _moved(event, _shift(event.storage.key.layer, section.layer, repeats))
            place += 1
        else:
            period = len(repeat.layers)
            run = [s for s in sections[place : place + period] if s.layer in repeat.layers]
            is_backward = place > 0 and (sections[place - 1].layer or 0) > section.layer
            events = [event for each in run for event in each.events]
            yield from _copied(events, repeat, repeats, is_backward)
            place += len(run)


def _repeat_of(layer: int | None, repeats: Sequence[Repeat]) -> Repeat | None:
    return next((repeat for repeat in repeats if layer in repeat.layers), None)


def _shift(layer: int | None, seen_from: int, repeats: Sequence[Repeat]) -> int:
    """How much farther behind a layer is in the whole model; of copies the nearest is meant."""
    if layer is None:
        return 0
    return sum(
        repeat.num_more
        for repeat in repeats
        if layer >= repeat.layers.stop
        or (layer in repeat.layers and seen_from >= repeat.layers.stop)
    )


def _copied(
    events: Sequence[Event], repeat: Repeat, repeats: Sequence[Repeat], is_backward: bool
) -> Iterator[Happening]:
    first = _shift(repeat.layers.start, 0, repeats)
    in_order = range(repeat.copies + 1)
    for copy in reversed(in_order) if is_backward else in_order:
        for event in events:
            yield _moved(event, first + copy * len(repeat.layers))


def _moved(event: Event, by: int) -> Happening:
    key = event.storage.key
    if key.layer is not None:
        key = key._replace(layer=key.layer + by)
    return Happening(key, event.storage, event.is_birth)


def _of_no_layer(events: Sequence[Event], repeats: Sequence[Repeat]) -> Iterator[Happening]:
    """What is done outside of the layers to something of each of them, layer by layer."""
    runs = [
        (repeat, list(run))
        for repeat, run in itertools.groupby(
            _with_deaths_by_name(events), lambda event: _repeat_of(event.storage.key.layer, repeats)
        )
    ]
    for i, (repeat, run) in enumerate(runs):
        if repeat is None:
            for event in run:
                layer = event.storage.key.layer
                yield _moved(event, _shift(layer, layer or 0, repeats))
        else:
            following = runs[i + 1][1][0].storage.key.layer if i + 1 < len(runs) else None
            is_backward = following is not None and following < repeat.layers.start
            yield from _copied(run, repeat, repeats, is_backward)


def extend(
    few: Sequence[Section], more: Sequence[Section], repeats: Sequence[Repeat]
) -> list[tuple[Happening, int]]:
    """The trace of a whole model, and the size of each storage in it.

    Args:
        few: Of few layers.
        more: Of one period more in each stretch that repeats.
        repeats: Of the model with few layers.

    Raises:
        LayersDiffer: If they are not alike, so that the whole model has to be rehearsed.
    """
    expected = happenings(more)
    found = happenings(few, [Repeat(repeat.layers, 1) for repeat in repeats])
    names = [(each.key, each.is_birth) for each in found]
    if names != [(each.key, each.is_birth) for each in expected]:
        raise LayersDiffer("one trace does not continue the other")
    growth: dict[Key, int] = {}
    num_seen = sum(len(repeat.layers) for repeat in repeats)
    num_more = sum(repeat.num_more for repeat in repeats)
    for ours, theirs in zip(found, expected, strict=True):
        difference = theirs.storage.nbytes - ours.storage.nbytes
        if difference and (ours.key.layer is not None or difference * num_more % num_seen):
            raise LayersDiffer(f"{ours.key} differs in size")
        if difference:
            growth[ours.key] = difference * num_more // num_seen
    return [
        (each, each.storage.nbytes + growth.get(each.key, 0)) for each in happenings(few, repeats)
    ]


def extend_work(
    few: Sequence[Section], more: Sequence[Section], repeats: Sequence[Repeat]
) -> Iterator[tuple[str, Work, float]]:
    """What a whole model computes, in which phase, how many times each; arguments as for `extend`.

    A layer that repeats computes what it was seen to. What else the second trace has more, outside
    of the layers or where weights pass through slots, grows with their number.
    """
    ratio = sum(repeat.num_more for repeat in repeats) / sum(len(r.layers) for r in repeats)
    for section in few:
        repeat = _repeat_of(section.layer, repeats)
        times = 1 - ratio + (repeat.copies - ratio if repeat else 0)
        yield from ((section.phase, each, times) for each in section.work)
    for section in more:
        yield from ((section.phase, each, ratio) for each in section.work)


class Trace(NamedTuple):
    """What a step of a whole model does.

    Attributes:
        events: Births and deaths in order, with the size of each storage.
        work: What is computed, in which phase, and how often.
    """

    events: list[tuple[Happening, int]]
    work: list[tuple[str, Work, float]]

    def work_of(self, *phases: str) -> list[tuple[Work, float]]:
        """What some phases compute, by default all of them."""
        return [(each, times) for phase, each, times in self.work if not phases or phase in phases]


def trace_of(
    types: Sequence[Hashable],
    kept: Sequence[Hashable],
    follow: Callable[[Sequence[int]], Sequence[Section]],
    *,
    may_extend: bool = True,
) -> Trace:
    """Follow a step of few layers and of a few more, and extend it; or follow it as a whole.

    Args:
        types: Of each layer.
        kept: What each layer keeps for the backward pass.
        follow: Follows a step of some of the layers.
        may_extend: Whether few layers can tell of all.
    """
    short, longer = (shorten(types, kept, num_more) for num_more in (0, 1))
    if may_extend and len(longer.layers) < len(kept):
        few, more = follow(short.layers), follow(longer.layers)
        with contextlib.suppress(LayersDiffer):
            return Trace(
                extend(few, more, short.repeats), list(extend_work(few, more, short.repeats))
            )
    sections = follow(range(len(kept)))
    events = [(each, each.storage.nbytes) for each in happenings(sections)]
    work = [(section.phase, each, 1.0) for section in sections for each in section.work]
    return Trace(events, work)

"""From the trace of a model with few layers to that of one with many.

Every layer of a kind does the same, so a step of 80 layers need not be rehearsed as a whole. The
events of one period of layers in the middle are repeated; the layers before and behind it, which
may differ (what is made once is made in the first), stay as they were seen. The result is a trace
event by event: what is true at its peak needs no assumption of where the peak is.

What grows with the number of layers outside of them (a norm of all gradients is of one number a
matrix) is taken from a second trace with one period more. That trace is also the proof: the first
one, extended by a period, must be the second one, event for event.
"""

from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple

from lowmem_dpo.memory.trace import Event, Key, Section, Storage

BEFORE = 2
"""Layers before the period that is repeated; the second is like those that follow."""
BEHIND = 2
"""Layers behind it; the last may differ, since it is the first in the backward pass."""


class LayersDiffer(Exception):
    """The layers of a model do not repeat each other."""


class Happening(NamedTuple):
    """A birth or a death of a storage, by its name in the whole model."""

    key: Key
    storage: Storage  # of the same place in the layer that was seen
    is_birth: bool


def period_of(kinds: Sequence[Hashable]) -> int:
    """The smallest number of layers after which the kinds of layers repeat to the end."""
    length = len(kinds)
    return next(p for p in range(1, length + 1) if list(kinds[p:]) == list(kinds[: length - p]))


def layers_to_rehearse(num_layers: int, period: int) -> int:
    """The least number of layers whose trace can be extended to `num_layers`, by whole periods."""
    least = BEFORE + period + BEHIND
    return num_layers if num_layers <= least else least + (num_layers - least) % period


def happenings(sections: Sequence[Section], period: int = 1, copies: int = 0) -> list[Happening]:
    """A trace as a list, with `copies` more of the period in the middle.

    Raises:
        LayersDiffer: If something dies that was not born.
    """
    extended = list(_extended(sections, period, copies))
    alive: set[Key] = set()
    for key, _, is_birth in extended:
        if is_birth:
            alive.add(key)
        elif key in alive:
            alive.remove(key)
        else:
            raise LayersDiffer(f"{key} dies and was never born")
    return extended


def _extended(sections: Sequence[Section], period: int, copies: int) -> Iterator[Happening]:
    middle = range(BEFORE, BEFORE + period)
    place = 0
    while place < len(sections):
        section = sections[place]
        if section.layer is None:
            yield from _of_no_layer(section.events, middle, copies)
            place += 1
        elif section.layer not in middle:
            for event in section.events:
                yield _seen_from(section.layer, event, middle, copies)
            place += 1
        else:
            run = [s for s in sections[place : place + period] if s.layer in middle]
            is_backward = place > 0 and (sections[place - 1].layer or 0) > section.layer
            for copy in _in_order(copies, is_backward):
                for each in run:
                    for event in each.events:
                        yield _moved(event, copy * period)
            place += len(run)


def _in_order(copies: int, is_backward: bool) -> Iterator[int]:
    yield from range(copies, -1, -1) if is_backward else range(copies + 1)


def _moved(event: Event, by: int) -> Happening:
    key = event.storage.key
    if key.layer is not None:
        key = key._replace(layer=key.layer + by)
    return Happening(key, event.storage, event.is_birth)


def _seen_from(layer: int, event: Event, middle: range, copies: int) -> Happening:
    """An event in a layer before the period, or behind it: the nearest copy is its neighbour."""
    owner = event.storage.key.layer
    is_behind = layer >= middle.stop
    moves = owner is not None and owner >= (middle.start if is_behind else middle.stop)
    return _moved(event, copies * len(middle) if moves else 0)


def _of_no_layer(events: Sequence[Event], middle: range, copies: int) -> Iterator[Happening]:
    """What is done outside of the layers to something of each of them, layer by layer."""
    run: list[Event] = []
    for event in (*events, None):
        layer = event.storage.key.layer if event else None
        if event and layer in middle:
            run.append(event)
            continue
        is_backward = bool(run) and layer is not None and layer < middle.start
        for copy in _in_order(copies, is_backward) if run else ():
            for each in run:
                yield _moved(each, copy * len(middle))
        run = []
        if event:
            is_behind = layer is not None and layer >= middle.stop
            yield _moved(event, copies * len(middle) if is_behind else 0)


def extend(
    few: Sequence[Section], more: Sequence[Section], period: int, num_more: int
) -> list[tuple[Happening, int]]:
    """The trace of a whole model, and the size of each storage in it.

    Args:
        few: Of few layers.
        more: Of one period more.
        period: Layers of a period.
        num_more: How many periods more than `few` the model has.

    Raises:
        LayersDiffer: If they are not alike, so that the whole model has to be rehearsed.
    """
    expected = happenings(more)
    found = happenings(few, period, 1)
    names = [(each.key, each.is_birth) for each in found]
    if names != [(each.key, each.is_birth) for each in expected]:
        raise LayersDiffer("one trace does not continue the other")
    growth: dict[Key, int] = {}
    for ours, theirs in zip(found, expected, strict=True):
        difference = theirs.storage.nbytes - ours.storage.nbytes
        if difference and ours.key.layer is not None:
            raise LayersDiffer(f"{ours.key} differs in size")
        if difference:
            growth[ours.key] = difference
    return [
        (each, each.storage.nbytes + growth.get(each.key, 0) * num_more)
        for each in happenings(few, period, num_more)
    ]

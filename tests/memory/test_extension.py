import pytest

from lowmem_dpo.memory.extension import (
    Key,
    LayersDiffer,
    extend,
    happenings,
    layers_to_rehearse,
    period_of,
)
from lowmem_dpo.memory.trace import Event, Section, Storage


@pytest.mark.parametrize(
    "kinds, period",
    [
        ("aaaa", 1),
        ("abab", 2),
        ("ababa", 2),
        ("sssssfsssssfss", 6),
        ("aaab", 4),
        ("abba", 3),
        ("a", 1),
    ],
)
def test_period_of_is_the_shortest_that_repeats_to_the_end(kinds, period):
    assert period_of(kinds) == period


@pytest.mark.parametrize("num_layers", range(1, 40))
@pytest.mark.parametrize("period", [1, 2, 6])
def test_layers_to_rehearse_are_whole_periods_less(num_layers, period):
    few = layers_to_rehearse(num_layers, period)
    assert few <= num_layers and (num_layers - few) % period == 0
    assert few >= min(num_layers, 4 + period) and few < 4 + 2 * period


def trace_of(num_layers, *, odd_layer=None):
    """Layers that keep their output for the backward pass, and a list with a number of each."""
    storages = {}

    def born(phase, layer, number, nbytes):
        key = Key(phase, layer, number)
        storages[key] = Storage(key, nbytes, True, "kept", "test", layer)
        return Event(storages[key], True)

    def dies(phase, layer, number):
        return Event(storages[Key(phase, layer, number)], False)

    sections = [Section("start", None, [born("start", i, 0, 100) for i in range(num_layers)])]
    for i in range(num_layers):
        first = [born("forward", i, 0, 1)] if i == 0 else []  # what is made once
        size = 3 if i == odd_layer else 2
        sections.append(Section("forward", i, [*first, born("forward", i, len(first), size)]))
    for i in reversed(range(num_layers)):
        events = [born("backward", i, 0, 7)]
        if i + 1 < num_layers:
            events.append(dies("backward", i + 1, 0))
        if i > 0:
            events.append(dies("forward", i - 1, 1 if i == 1 else 0))
        sections.append(Section("backward", i, events))
    norms = [born("update", i, 0, 4) for i in range(num_layers)]
    total = born("update", None, 0, 10 * num_layers)
    freed = [dies("update", i, 0) for i in range(num_layers)]
    sections.append(Section("update", None, [*norms, total, *freed]))
    return sections


@pytest.mark.parametrize("num_layers", [7, 8, 20])
def test_extend_gives_the_trace_of_the_whole_model(num_layers):
    extended = extend(trace_of(5), trace_of(6), 1, num_layers - 5)
    whole = happenings(trace_of(num_layers))
    assert [(each.key, each.is_birth, nbytes) for each, nbytes in extended] == [
        (each.key, each.is_birth, each.storage.nbytes) for each in whole
    ]


def test_extend_refuses_layers_that_differ():
    with pytest.raises(LayersDiffer, match="differs in size"):
        extend(trace_of(5), trace_of(6, odd_layer=3), 1, 4)
    with pytest.raises(LayersDiffer, match="does not continue"):
        extend(trace_of(5), trace_of(7), 1, 4)

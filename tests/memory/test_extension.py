import pytest

from lowmem_dpo.memory.extension import (
    LayersDiffer,
    Repeat,
    extend,
    extend_work,
    happenings,
    layers_to_rehearse,
    period_of,
    shorten,
)
from lowmem_dpo.memory.trace import Event, Key, Section, Storage, Work

ONE = [Repeat(range(2, 3), 4)]


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


@pytest.mark.parametrize("num_periods", [0, 1])
@pytest.mark.parametrize(
    "types, kept",
    [
        ("a" * 32, "n" * 32),
        ("a" * 32, "n" * 22 + "x" * 10),
        ("a" * 32, "n" * 10 + "m" * 10 + "x" * 12),
        ("sf" * 13, "n" * 11 + "x" * 15),
        ("a" * 6, "nnmmxx"),
        ("a" * 20, "n" * 19 + "x"),
    ],
)
def test_shorten_chooses_layers_that_make_the_model_when_its_repeats_are_copied(
    types, kept, num_periods
):
    short = shorten(types, kept, num_periods)
    kinds = [(types[layer], kept[layer]) for layer in short.layers]
    made = list(kinds)
    for repeat in reversed(short.repeats):
        period = [kinds[layer] for layer in repeat.layers]
        made[repeat.layers.stop : repeat.layers.stop] = period * repeat.copies
    assert made == list(zip(types, kept, strict=True))
    if num_periods:
        fewer = shorten(types, kept)
        more = sum(len(repeat.layers) for repeat in fewer.repeats)
        assert len(short.layers) == len(fewer.layers) + more


def trace_of(num_layers, num_keeping=0, *, odd_layer=None):
    """Layers that keep their output for the backward pass, and a list with a number of each.

    The last ones keep another thing too.
    """
    storages = {}

    def born(phase, layer, number, nbytes):
        key = Key(phase, layer, number)
        storages[key] = Storage(key, nbytes, True, "kept", "test", layer)
        return Event(storages[key], True)

    def dies(phase, layer, number):
        return Event(storages[Key(phase, layer, number)], False)

    sections = [Section("start", None, [born("start", i, 0, 100) for i in range(num_layers)])]
    for i in range(num_layers):
        events = [born("forward", i, 0, 1)] if i == 0 else []  # what is made once
        events.append(born("forward", i, len(events), 3 if i == odd_layer else 2))
        if i >= num_layers - num_keeping:
            events.append(born("forward", i, len(events), 5))
        sections.append(Section("forward", i, events))
    for i in reversed(range(num_layers)):
        events = [born("backward", i, 0, 7)]
        if i + 1 < num_layers:
            events.append(dies("backward", i + 1, 0))
        if i >= num_layers - num_keeping:
            events.append(dies("forward", i, 2 if i == 0 else 1))
        if i > 0:
            events.append(dies("forward", i - 1, 1 if i == 1 else 0))
        sections.append(Section("backward", i, events))
    norms = [born("update", i, 0, 4) for i in range(num_layers)]
    total = born("update", None, 0, 10 * num_layers)
    freed = [dies("update", i, 0) for i in range(num_layers)]
    sections.append(Section("update", None, [*norms, total, *freed]))
    return sections


@pytest.mark.parametrize("num_layers, num_keeping", [(7, 0), (20, 0), (20, 20), (20, 9), (12, 1)])
def test_extend_gives_the_trace_of_the_whole_model(num_layers, num_keeping):
    kept = "n" * (num_layers - num_keeping) + "x" * num_keeping
    few, more = (shorten("a" * num_layers, kept, num_periods) for num_periods in (0, 1))
    traces = [
        trace_of(len(short.layers), sum(kept[layer] == "x" for layer in short.layers))
        for short in (few, more)
    ]
    extended = extend(*traces, few.repeats)
    whole = happenings(trace_of(num_layers, num_keeping))
    assert [(each.key, each.is_birth, nbytes) for each, nbytes in extended] == [
        (each.key, each.is_birth, each.storage.nbytes) for each in whole
    ]


def test_what_dies_between_two_births_may_die_in_any_order():
    few, more = trace_of(5), trace_of(6)
    more[-1].events[7:] = more[-1].events[:6:-1]
    assert len(extend(few, more, ONE)) == len(happenings(trace_of(9)))


def test_extend_refuses_layers_that_differ():
    with pytest.raises(LayersDiffer, match="differs in size"):
        extend(trace_of(5), trace_of(6, odd_layer=3), ONE)
    with pytest.raises(LayersDiffer, match="does not continue"):
        extend(trace_of(5), trace_of(7), ONE)


def test_work_is_that_of_the_layers_that_are_there_and_outside_of_them_linear():
    """Of two stretches, whose layers compute 2 and 5, and an end that computes 1 a layer."""

    def sections_of(num_first, num_second):
        each = [2] * num_first + [5] * num_second
        inside = [
            Section("forward", layer, [], [Work(flops, 0, 0, False)])
            for layer, flops in enumerate(each)
        ]
        return [*inside, Section("update", None, [], [Work(len(each), 0, 0, False)])]

    few, more = (shorten("a" * 23, "n" * 13 + "x" * 10, more) for more in (0, 1))
    assert (len(few.layers), len(more.layers)) == (8, 10)
    work = list(extend_work(sections_of(4, 4), sections_of(5, 5), few.repeats))
    assert sum(times * each.flops for _, each, times in work) == 13 * 2 + 10 * 5 + 23
    assert sum(times for _, _, times in work) == 23 + 1

"""What a planner chooses, on a model whose bytes and seconds are a few sums."""

from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest

from lowmem_dpo.memory.levers import Levers
from lowmem_dpo.settings.configs import TrainConfig
from lowmem_dpo.steps import planner as planning
from lowmem_dpo.steps.planner import Planner, Room, Workload, ladder_of
from lowmem_dpo.steps.rehearsed import TreeShape, tree_of_shape

NUM_LAYERS = 5
TREE = tree_of_shape(TreeShape(56, 36, 36))  # 128 tokens
ALL, LEAST = 128 + 100 + 60 + 50 + 400, 128 + 2 * 80
HOST = 100 + 60 + 50 + 400
KEEPS_ALL, KEEPS_ATTENTION = 30, 10  # bytes a layer


@dataclass
class Sums:
    """In place of `rehearse`; what an estimate cannot know are gaps beside what is put to use."""

    gap_bytes: int = 0
    asked: list[Any] = field(default_factory=list)

    def __call__(self, model, card, settings, levers, packs, *, pack_tokens, **how):
        self.asked.append(SimpleNamespace(levers=levers, pack_tokens=pack_tokens, **how))
        places = {
            "embedding": (100, levers.embedding_on_host),
            "head": (60, levers.head_on_host),
            "layer inputs": (50, levers.inputs_on_host),
            "NF4 weights": (400, levers.num_slots is not None),
        }
        here = {name: nbytes for name, (nbytes, is_gone) in places.items() if not is_gone}
        if levers.num_slots is not None:
            here["slots of NF4 layers"] = 80 * levers.num_slots
        kept = KEEPS_ALL * levers.num_keep_all + KEEPS_ATTENTION * levers.num_keep_attention
        is_mixed = levers.num_slots not in (None, 2) or kept % (KEEPS_ALL * NUM_LAYERS) > 0
        total = pack_tokens + sum(here.values()) + kept + self.gap_bytes * is_mixed
        host = sum(nbytes for nbytes, is_gone in places.values() if is_gone)
        seconds = 100 - 10 * levers.num_keep_all - 2 * levers.num_keep_attention
        return SimpleNamespace(
            peak_allocated_bytes=total,
            peak_reserved_bytes=total,
            components=here,
            host_bytes=host - 400 * levers.layers_on_disk,
            fits=total <= how["limit_bytes"],
            seconds=(seconds + levers.embedding_on_host, 2 * seconds),
        )


@pytest.fixture
def sums(monkeypatch):
    found = Sums()
    monkeypatch.setattr(planning, "rehearse", found)
    return found


def planner(card=ALL, host=None, trees=(TREE,), trains=True, **settings):
    config = TrainConfig(**settings)
    model = SimpleNamespace(num_hidden_layers=NUM_LAYERS, tie_word_embeddings=False)
    step = SimpleNamespace(model=config, optimizer=SimpleNamespace(optim="adamw_8bit"))
    work = Workload(trees, batch_size=len(trees))
    return Planner(model, None, step, work, config, Room(card, host), trains=trains)


NOTHING = {"keep_activations": "nothing"}


@pytest.mark.parametrize(
    "card, levers",
    [
        (ALL, Levers()),
        (ALL - 1, Levers(embedding_on_host=True)),
        (ALL - 101, Levers(embedding_on_host=True, head_on_host=True)),
        (ALL - 161, Levers(0, 0, True, None, False, True, True)),
        (ALL - 211, Levers(0, 0, True, 4, False, True, True)),
        (LEAST + 160, Levers(0, 0, True, 4, False, True, True)),
        (LEAST + 159, Levers(0, 0, True, 3, False, True, True)),
        (LEAST, Levers(0, 0, True, 2, False, True, True)),
    ],
)
def test_the_first_rung_that_fits_is_taken_and_slots_have_what_is_left(sums, card, levers):
    plan = planner(card, **NOTHING).best()
    assert plan.levers == levers and plan.fits
    assert all(each.limit_bytes == card and each.trains for each in sums.asked)


@pytest.mark.usefixtures("sums")
def test_where_nothing_fits_the_plan_is_the_least_and_does_not_fit():
    for card in (LEAST - 1, 100):
        plan = planner(card).best()
        assert plan.levers == Levers(0, 0, True, 2, False, True, True) and not plan.fits


def test_what_an_estimate_promised_and_does_not_fit_is_not_taken(sums):
    sums.gap_bytes = 5
    plan = planner(LEAST + 160, **NOTHING).best()
    assert plan.fits and plan.levers.num_slots == 3
    plan = planner(ALL + 100, embedding_weight="device").best()
    assert plan.fits and plan.levers == Levers(num_keep_all=3)
    sums.gap_bytes = 1000
    assert planner(LEAST + 160, **NOTHING).best().levers.num_slots == 2
    assert planner(ALL + 100, embedding_weight="device").best().levers == Levers()


def test_rungs_that_cannot_fit_are_left_out(sums):
    planner(ALL - 161, **NOTHING).best()
    assert [each.levers.inputs_on_host for each in sums.asked] == [False, True]


@pytest.mark.parametrize(
    "left, num_all, num_attention",
    [(5 * 30, 5, 0), (5 * 30 - 1, 4, 1), (95, 3, 0), (100, 3, 1), (10, 0, 1), (9, 0, 0)],
)
@pytest.mark.usefixtures("sums")
def test_what_is_left_goes_to_the_layers_that_save_most(left, num_all, num_attention):
    plan = planner(ALL + left, embedding_weight="device").best()
    assert plan.levers == Levers(num_keep_all=num_all, num_keep_attention=num_attention)


@pytest.mark.usefixtures("sums")
def test_the_embeddings_memory_serves_layers_where_that_is_faster():
    assert planner(ALL + 50).best().levers == Levers(num_keep_all=5, embedding_on_host=True)
    # The bytes of one layer more, at the price of what an embedding on the host takes.
    assert not planner(ALL + 50, embedding_weight="device").best().levers.embedding_on_host


def test_scoring_keeps_nothing_and_is_rehearsed_as_scoring(sums):
    assert planner(10 * ALL, trains=False).best().levers == Levers()
    assert not any(each.trains for each in sums.asked)


@pytest.mark.usefixtures("sums")
def test_where_host_memory_is_short_layers_come_from_the_disk():
    on_disk = Levers(0, 0, True, 2, True, True, True)
    assert planner(LEAST, HOST).best().levers == replace(on_disk, layers_on_disk=False)
    assert planner(LEAST, HOST - 1).best().levers == on_disk
    assert planner(LEAST, HOST - 1).smallest().levers == on_disk
    for settings in ({"quantized_copy": False}, {"layer_weights": "host"}):
        plan = planner(LEAST, HOST - 1, **settings).best()
        assert not plan.fits and not plan.levers.layers_on_disk
    assert not planner(LEAST - 1, HOST - 1).best().levers.layers_on_disk
    assert not planner(LEAST, HOST - 401).best().fits


def test_a_smaller_micro_batch_is_tried_last(sums):
    """Four pairs in one micro-batch, or one."""
    several = planner(LEAST, trees=(TREE,) * 4)
    plan = several.best()
    assert (plan.pack_tokens, plan.num_packs, plan.fits) == (128, 4, True)
    assert plan.seconds == (101 * 4 / 2, 200 * 4 / 2)
    tokens = [each.pack_tokens for each in sums.asked]
    assert tokens == sorted(tokens, reverse=True) and tokens[0] == 512
    first = sums.asked[0]  # what was followed is remembered for its micro-batch alone
    for each in sums.asked:
        assert (each.followed is first.followed) == (each.pack_tokens == first.pack_tokens)
    assert planner(LEAST + 384, trees=(TREE,) * 4).best().pack_tokens == 512


def test_the_ladder_leaves_out_what_is_decided_and_what_cannot_move():
    def steps(tied=False, **settings):
        config = TrainConfig(**settings)
        model = SimpleNamespace(num_hidden_layers=NUM_LAYERS, tie_word_embeddings=tied)
        ladder = ladder_of(model, config, config)
        return [
            "".join(
                letter
                for letter, is_there in zip(
                    "ehil",
                    (
                        levers.embedding_on_host,
                        levers.head_on_host,
                        levers.inputs_on_host,
                        levers.num_slots is not None,
                    ),
                    strict=True,
                )
                if is_there
            )
            for levers in ladder
        ]

    assert steps() == ["", "e", "eh", "ehi", "ehil"]
    assert steps(tied=True) == ["", "i", "il"]
    assert steps(quantization="none") == ["", "e", "eh", "ehi"]
    assert steps(head_quantization="int8") == ["", "e", "ei", "eil"]
    assert steps(keep_activations="all") == steps(keep_activations="attention") == ["", "e", "eh"]
    assert steps(head_weight="host", embedding_weight="device") == ["h", "hi", "hil"]

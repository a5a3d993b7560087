"""Plans for cards of any size, on rehearsals of a small model."""

import random
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig

from lowmem_dpo.linears.lora import AdapterSpec
from lowmem_dpo.machine.card_table import find_card
from lowmem_dpo.memory.extension import LayersDiffer
from lowmem_dpo.memory.levers import Levers
from lowmem_dpo.packs.packing import pack_trees
from lowmem_dpo.settings.configs import TrainConfig
from lowmem_dpo.steps import rehearsed
from lowmem_dpo.steps.planner import Planner, Room, Workload, _Cost, _most_saved
from lowmem_dpo.steps.rehearsed import StepSettings, TreeShape, tree_of_shape
from tests.rehearsals import follow_once
from tests.tiny import FAMILIES, SIZES

TREE = tree_of_shape(TreeShape(250, 150, 200))
NUM_LAYERS = 4
MUCH = 2**40


def planner(card_bytes=MUCH, host_bytes=None, family="llama", trees=(TREE,) * 4, **settings):
    sizes = {"hidden_size": 1024, "intermediate_size": 8192, "head_dim": 128, "vocab_size": 32768}
    model = AutoConfig.for_model(
        **SIZES | FAMILIES[family] | sizes | {"num_hidden_layers": NUM_LAYERS}
    )
    config = TrainConfig(**{"optim": "adamw_8bit"} | settings)
    adapter = AdapterSpec(4, 4.0, 0.0, "all", rank_stabilised=False)
    step = StepSettings(config, adapter, config, config)
    work = Workload(trees, batch_size=len(trees))
    return Planner(model, find_card("3060"), step, work, config, Room(card_bytes, host_bytes))


@pytest.fixture(autouse=True)
def _followed_once(monkeypatch):
    follow_once(monkeypatch)


def test_with_room_for_all_of_it_layers_keep_all():
    before = torch.get_rng_state(), random.getstate()
    dropout = AdapterSpec(4, 4.0, 0.1, "all", rank_stabilised=False)
    plans = planner()
    plans = replace(plans, settings=replace(plans.settings, adapter=dropout))
    plan = plans.best()
    usual = plans.take(Levers(), plan.pack_tokens)
    assert usual.rehearsal.peak_reserved_bytes < plan.rehearsal.peak_reserved_bytes
    assert usual.seconds > plan.seconds
    # A run draws as it would without a plan.
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert plan.fits and plan.levers == Levers(num_keep_all=NUM_LAYERS)
    assert plan.num_packs == 1 and plan.pack_tokens >= 4 * TREE.num_tokens
    assert 0 < plan.seconds[0] < plan.seconds[1]


@pytest.mark.slow
def test_with_less_and_less_room_plans_get_slower_and_fit():
    """Whatever is chosen was rehearsed: it fits what there is."""
    usual, least = planner().usual(), planner().smallest()
    need, limit = usual.rehearsal.peak_reserved_bytes, least.rehearsal.peak_reserved_bytes
    whole = planner().best().rehearsal.peak_reserved_bytes
    found = []
    for room in (whole, (whole + need) // 2, need, (need + limit) // 2, limit):
        plan = planner(room).best()
        assert plan.fits and plan.rehearsal.peak_reserved_bytes <= room
        found.append(plan)
    assert found[0].levers.num_keep_all == NUM_LAYERS
    assert found[1].levers.num_keep_all + found[1].levers.num_keep_attention > 0
    assert found[1].levers.num_keep_all < NUM_LAYERS
    assert found[3].levers.embedding_on_host or found[3].levers.num_slots is not None
    assert found[4].levers.inputs_on_host and found[4].levers.head_on_host
    best = [plan.seconds[0] for plan in found[:3]]
    assert best == sorted(best)
    nothing = planner(limit // 2).best()
    assert not nothing.fits and nothing.levers == least.levers


@pytest.mark.slow
def test_what_the_user_set_is_kept():
    least = planner().smallest().rehearsal.peak_reserved_bytes
    plan = planner(least, embedding_weight="device", layer_weights="device").best()
    assert not plan.levers.embedding_on_host and plan.levers.num_slots is None
    assert plan.levers.head_on_host and plan.levers.inputs_on_host
    kept = planner(least, keep_activations="attention").best()
    assert kept.levers.num_keep_attention == NUM_LAYERS
    assert not kept.levers.inputs_on_host and kept.levers.num_slots is None
    assert planner(keep_activations="nothing").best().levers == Levers()
    assert planner(pack_tokens=768, keep_activations="nothing").best().pack_tokens == 768


@pytest.mark.slow
def test_parts_that_cannot_move_stay():
    tied = planner(family="llama-tied").smallest().levers
    assert not tied.embedding_on_host and not tied.head_on_host and tied.num_slots == 2
    dense = planner(quantization="none").smallest().levers
    assert dense.num_slots is None and dense.inputs_on_host
    int8 = planner(head_quantization="int8").smallest().levers
    assert int8.embedding_on_host and not int8.head_on_host


def test_the_optimizer_moves_to_the_host_before_the_head_where_it_is_adamw():
    def moved(**settings):
        steps = planner(**settings)._ladder()
        return [step.optimizer_on_host for step in steps], [step.head_on_host for step in steps]

    rungs = [False, False, True, True, True, True], [False, False, False, True, True, True]
    assert moved(optim="adamw") == rungs
    assert not any(moved(optim="adamw", optimizer_state="device")[0])
    assert all(moved(optim="adamw", optimizer_state="host")[0])
    assert not any(moved(optim="adamw_8bit")[0]) and not any(moved(optim="sgd")[0])


def test_with_too_little_room_for_its_moments_alone_the_optimizer_is_on_the_host():
    settings = {"optim": "adamw", "embedding_weight": "device", "keep_activations": "nothing"}
    settings |= {"pack_tokens": 640}
    usual = planner(**settings).usual()
    plan = planner(usual.rehearsal.peak_reserved_bytes - 1, **settings).best()
    assert plan.fits and plan.levers == Levers(optimizer_on_host=True)


@pytest.mark.slow
def test_host_memory_counts_too():
    least = planner().smallest()
    assert least.rehearsal.host_bytes > 2**20
    enough = planner(host_bytes=least.rehearsal.host_bytes)
    assert enough.take(least.levers, least.pack_tokens).fits
    little = replace(enough, room=Room(MUCH, least.rehearsal.host_bytes - 1))
    assert not little.take(least.levers, least.pack_tokens).fits
    room = Room(least.rehearsal.peak_reserved_bytes, least.rehearsal.host_bytes - 1)
    from_disk = replace(enough, room=room).best()
    assert from_disk.fits and from_disk.levers.layers_on_disk
    assert from_disk.rehearsal.host_bytes < least.rehearsal.host_bytes - 2**20
    held = replace(planner(quantized_copy=False), room=room).best()
    assert not held.fits and not held.levers.layers_on_disk


@pytest.mark.slow
def test_a_smaller_micro_batch_is_the_last_resort():
    """Four pairs in one micro-batch are the best of this work, one pair is the least."""
    usual = planner()
    first, least = usual.work.best_pack_tokens(), usual.work.least_pack_tokens
    assert first > least == 640
    need = usual.smallest().rehearsal.peak_reserved_bytes
    assert planner(need).best().pack_tokens == least


def test_few_layers_tell_of_all_where_they_pass_through_two_or_three_slots_alone(monkeypatch):
    """Of more slots, few layers all have one, and nothing is uploaded."""
    asked = []

    def trace_of(types, kept, follow, *, may_extend):
        asked.append(may_extend)
        raise LayersDiffer

    monkeypatch.setattr(rehearsed, "trace_of", trace_of)
    for num_slots in (None, 2, 3, 4):
        with pytest.raises(LayersDiffer):
            planner().take(Levers(num_slots=num_slots), 1024)
    assert asked == [True, True, True, False]


def test_the_fullest_pack_has_the_longest_pair_and_beside_it_what_scores_most():
    shapes = [TreeShape(90, 5, 5), TreeShape(10, 30, 30), TreeShape(40, 3, 2), TreeShape(9, 20, 20)]
    trees = [tree_of_shape(shape) for shape in shapes]
    work = Workload(trees, batch_size=4)
    assert work.fullest_pack(300) == [trees[0], trees[1], trees[3], trees[2]]
    assert work.fullest_pack(180) == work.fullest_pack(170) == [trees[0], trees[1]]
    assert work.fullest_pack(169) == [trees[0], trees[3]]
    assert len(Workload(trees, batch_size=2).fullest_pack(512)) == 2
    for num_tokens in (128, 200, 300):
        assert len(pack_trees(work.fullest_pack(num_tokens), num_tokens)) == 1


@pytest.mark.parametrize(
    "left, expected",
    [
        (0, (0, 0)),
        (9, (0, 0)),
        (10, (0, 1)),
        (39, (0, 3)),
        (40, (0, 4)),
        (100, (2, 2)),
        (160, (4, 0)),
    ],
)
def test_most_is_saved_by_what_saves_most_for_its_bytes(left, expected):
    """Attention's saves 2 for 10 bytes, all of it 5 for 40."""
    assert _most_saved((_Cost(40, 5), _Cost(10, 2)), left, 4) == expected


def test_nothing_is_kept_that_saves_nothing():
    assert _most_saved((_Cost(1, 0), _Cost(1, -1)), 100, 4) == (0, 0)

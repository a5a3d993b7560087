"""Rehearsals for cards that are not here."""

import dataclasses
import itertools

import pytest
import torch
from transformers import AutoConfig

from lowmem_dpo.machine.card_table import GIB, find_card
from lowmem_dpo.memory import extension
from lowmem_dpo.memory.extension import Short
from lowmem_dpo.memory.levers import Levers
from lowmem_dpo.packs.packing import scored_tokens
from lowmem_dpo.settings.configs import TrainConfig
from lowmem_dpo.steps import rehearsed
from lowmem_dpo.steps.rehearsed import StepSettings, TreeShape, rehearse, tree_of_shape
from lowmem_dpo.training.policy import adapter_spec
from tests.packs.folding import fold
from tests.tiny import FAMILIES, SIZES

USUAL = Levers()
SHAPE_8B = {
    "model_type": "llama",
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}


def config_of(family="llama", **changes):
    return AutoConfig.for_model(**SIZES | {"vocab_size": 96} | FAMILIES[family] | changes)


def settings_of(**changes):
    config = dataclasses.replace(TrainConfig(), **changes)
    return StepSettings(config, adapter_spec(config, None), config, config)


def rehearsal(
    config,
    card="RTX 3060",
    levers=USUAL,
    *,
    pairs=2,
    length=20,
    trains=True,
    limit=None,
    **changes,
):
    return rehearse(
        config,
        find_card(card),
        settings_of(**changes),
        levers,
        [[tree_of_shape(TreeShape(length, length, length))]] * pairs,
        pack_tokens=-(-3 * length // 64) * 64,
        trains=trains,
        limit_bytes=limit,
    )


THIRDS = ["sliding_attention", "sliding_attention", "full_attention"] * 5


def noted(monkeypatch):
    """How many layers are followed, and the traces that are led through the allocator."""
    rehearsed_layers, traces = [], []
    follow, lead = rehearsed._follow, rehearsed.rehearsal_of

    def noting_follow(config, *arguments):
        rehearsed_layers.append(config.num_hidden_layers)
        return follow(config, *arguments)

    def noting_lead(trace, *arguments, **words):
        traces.append(trace)
        return lead(trace, *arguments, **words)

    monkeypatch.setattr(rehearsed, "_follow", noting_follow)
    monkeypatch.setattr(rehearsed, "rehearsal_of", noting_lead)
    return rehearsed_layers, traces


@pytest.mark.parametrize(
    "family, changes, card, levers",
    [
        ("llama", {"num_hidden_layers": 7}, "3060", USUAL),
        *(
            pytest.param(family, changes, card, levers, marks=pytest.mark.slow)
            for family, changes, card, levers in (
                ("llama", {"num_hidden_layers": 9}, "T4", USUAL),
                ("llama", {"num_hidden_layers": 9}, "3060", Levers(num_slots=3)),
                ("llama", {"num_hidden_layers": 9}, "3060", Levers(num_keep_all=9)),
                ("llama", {"num_hidden_layers": 12}, "T4", Levers(num_keep_all=1)),
                ("llama", {"num_hidden_layers": 12}, "3060", Levers(num_keep_attention=5)),
                (
                    "llama",
                    {"num_hidden_layers": 16},
                    "3060",
                    Levers(num_keep_all=5, num_keep_attention=5),
                ),
                ("gemma2", {"num_hidden_layers": 16}, "3060", Levers(num_keep_all=7)),
                ("gemma2", {"num_hidden_layers": 12}, "3060", USUAL),
                ("gemma3", {"num_hidden_layers": 13, "layer_types": THIRDS[:13]}, "3060", USUAL),
                ("gemma3", {"num_hidden_layers": 13, "layer_types": THIRDS[:13]}, "T4", USUAL),
            )
        ),
    ],
)
def test_a_model_rehearsed_by_few_layers_is_the_whole_model_to_the_byte(
    monkeypatch, family, changes, card, levers
):
    config = config_of(family, **changes)
    rehearsed_layers, traces = noted(monkeypatch)
    extended = rehearsal(config, card, levers)
    monkeypatch.setattr(extension, "shorten", lambda types, *_: Short(list(range(len(types))), []))
    whole = rehearsal(config, card, levers)
    *few, all_layers = rehearsed_layers
    assert max(few) < all_layers == config.num_hidden_layers
    for (ours, our_bytes), (theirs, their_bytes) in zip(*traces, strict=True):
        assert (ours.key, ours.is_birth, our_bytes) == (theirs.key, theirs.is_birth, their_bytes)
    for name in ("flops", "bytes_moved", "link_bytes", "seconds"):
        assert getattr(extended, name) == pytest.approx(getattr(whole, name), rel=1e-12), name
    same = {
        name: getattr(whole, name) for name in ("flops", "bytes_moved", "link_bytes", "seconds")
    }
    assert dataclasses.replace(extended, **same) == whole


@pytest.mark.slow
@pytest.mark.parametrize(
    "levers", [Levers(num_keep_all=6), Levers(num_keep_all=3, num_keep_attention=2)], ids=str
)
def test_layers_that_keep_different_things_are_rehearsed_as_such(levers):
    """Between all that keep nothing and all that keep all, by what each layer keeps."""
    config = config_of(num_hidden_layers=8, hidden_size=512, intermediate_size=1024)
    found = [rehearsal(config, levers=each) for each in (USUAL, levers, Levers(num_keep_all=8))]
    for less, more in itertools.pairwise(found):
        assert less.flops > more.flops
        assert less.peak_allocated_bytes < more.peak_allocated_bytes


@pytest.mark.slow
def test_steps_followed_before_serve_other_numbers_of_layers_that_keep_all(monkeypatch):
    config, followed = config_of(num_hidden_layers=16), {}
    rehearsed_layers, _ = noted(monkeypatch)
    first, second = (
        rehearse(
            config,
            find_card("3060"),
            settings_of(),
            Levers(num_keep_all=num_keep_all),
            [[tree_of_shape(TreeShape(20, 20, 20))]] * 2,
            pack_tokens=64,
            followed=followed,
        )
        for num_keep_all in (5, 9)
    )
    assert rehearsed_layers == [8, 10]
    assert second == rehearsal(config, "3060", Levers(num_keep_all=9))
    assert first.flops > second.flops


@pytest.mark.slow
def test_layers_that_do_not_repeat_are_rehearsed_as_a_whole():
    kinds = ["full_attention"] * 7 + ["sliding_attention"]
    config = config_of("qwen2-window", num_hidden_layers=8, layer_types=kinds, max_window_layers=7)
    assert rehearsal(config).launches > 1000


def test_components_and_makers_add_up_to_the_peak():
    config = config_of(num_hidden_layers=7, hidden_size=512, intermediate_size=1024, head_dim=128)
    found = rehearsal(config, length=200)
    assert sum(found.components.values()) == sum(found.makers.values())
    # What tensors take, and what torch takes for them: each rounded up to 512 bytes.
    assert 0 <= found.peak_allocated_bytes - sum(found.components.values()) < 2**20
    assert found.peak_allocated_bytes <= found.peak_reserved_bytes
    assert found.components["embedding"] == found.components["head"] == 2 * 96 * 512
    targets = 7 * (4 * 512 + 2 * (512 + 256) + 3 * (512 + 1024))  # sizes in and out of adapters
    assert found.components["adapter"] == 4 * TrainConfig().lora_r * targets
    assert found.components["casts of the adapter"] == found.components["adapter"] // 2


@pytest.mark.slow
def test_layer_inputs_and_head_on_the_host_leave_the_card():
    config = config_of(num_hidden_layers=7, hidden_size=512, vocab_size=65536)
    here = rehearsal(config, length=400)
    there = rehearsal(config, levers=Levers(inputs_on_host=True, head_on_host=True), length=400)
    head_bytes, input_bytes = 2 * 65536 * 512, 2 * 512 * 1216
    assert "head" not in there.components
    assert there.host_components["head"] == head_bytes
    lost = there.host_components["layer inputs"] / 7 - input_bytes
    assert 0 <= lost < 2**17  # 13 times that as a whole, which would be a power of two
    assert here.components["layer inputs"] >= 7 * input_bytes
    assert here.link_bytes < 2**20 < 2 * 7 * input_bytes < there.link_bytes
    # Two slices of the head, of 8,192 rows, are on the card while it is read.
    assert there.peak_allocated_bytes < here.peak_allocated_bytes - head_bytes / 2


def test_an_optimizer_on_the_host_leaves_nothing_of_it_on_the_card():
    config = config_of(num_hidden_layers=7)
    here = rehearsal(config)
    there = rehearsal(config, levers=Levers(optimizer_on_host=True))
    matrix_bytes = here.components["adapter"]
    assert here.components["optimizer state"] >= 2 * matrix_bytes
    assert "optimizer state" not in there.components
    assert "optimizer state" not in here.host_components
    # Both moments, and matrices and gradients in pinned memory, of which torch takes powers of two.
    assert 4 * matrix_bytes < there.host_components["optimizer state"] < 6 * matrix_bytes + 2**10
    # Matrices and gradients down, matrices up.
    assert there.link_bytes - here.link_bytes == 3 * matrix_bytes
    assert there.components["adapter"] == there.components["gradients"] == matrix_bytes


def test_pairs_whose_answers_begin_alike_are_rehearsed_too():
    """What both score is scored once, and the prompt is not all of the trunk."""
    alike = fold(0, (1,) * 40, (2,) * 30, (3,) * 20, 25, 25)
    assert alike.num_chosen_tokens + alike.num_rejected_tokens > len(scored_tokens(alike).rows)
    packs = [[alike, tree_of_shape(TreeShape(9, 9, 9))]] * 2
    config = config_of(num_hidden_layers=1)
    found = rehearse(config, find_card("3060"), settings_of(), USUAL, packs, pack_tokens=128)
    assert found.fits and found.flops > 0


@pytest.mark.slow
def test_scoring_alone_needs_less_and_computes_less():
    config = config_of(num_hidden_layers=7, hidden_size=256)
    step, scoring = rehearsal(config, length=200), rehearsal(config, length=200, trains=False)
    assert scoring.peak_allocated_bytes < step.peak_allocated_bytes
    assert scoring.flops < step.flops / 2
    assert "gradients" not in scoring.components


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"optim": "adamw_8bit"}, {"lora_dropout": 0.1}], ids=str)
def test_a_card_without_triton_takes_torch_and_float16(changes):
    config = config_of(num_hidden_layers=6)
    new, old = rehearsal(config, "RTX 3090", **changes), rehearsal(config, "RTX 2070", **changes)
    assert not any("nf4_dequantize" in maker for maker in old.makers)
    assert old.launches > new.launches
    with pytest.raises(ValueError, match="the card has no bfloat16"):
        rehearsal(config, "RTX 2070", dtype="bfloat16")


@pytest.mark.slow
def test_a_limit_decides_whether_a_step_fits():
    config = config_of(num_hidden_layers=6, hidden_size=512, vocab_size=8192)
    found = rehearsal(config, length=400)
    assert found.fits
    assert not rehearsal(config, length=400, limit=found.peak_allocated_bytes - 1).fits
    assert rehearsal(config, length=400, limit=found.peak_reserved_bytes).fits


def test_a_rehearsal_leaves_cuda_alone():
    before = torch.cuda.is_initialized()
    rehearsal(config_of(num_hidden_layers=2))
    assert torch.cuda.is_initialized() == before


@pytest.mark.slow
def test_memory_of_8b_is_linear_in_tokens_and_no_matter_of_pairs_and_vocabulary():
    config = AutoConfig.for_model(**SHAPE_8B)
    at = {n: rehearsal(config, "H100", length=n, pairs=2) for n in (512, 1024, 2048)}
    peaks = {n: found.peak_allocated_bytes for n, found in at.items()}
    # Tiles of the MLP have up to 2,048 rows, so from there on what grows is linear.
    per_token = (peaks[2048] - peaks[1024]) / (3 * 1024)
    assert per_token < 2 * 4096 * 32 + 98_000  # layer inputs stay on the card
    more = rehearsal(config, "H100", length=1024, pairs=5)
    assert abs(more.peak_allocated_bytes - peaks[1024]) < 2**20
    wider = AutoConfig.for_model(**SHAPE_8B | {"vocab_size": 2 * 128256})
    grown = rehearsal(wider, "H100", length=1024).peak_allocated_bytes - peaks[1024]
    assert grown == 2 * (2 * 128256 * 4096)
    assert at[2048].peak_reserved_bytes < 9 * GIB


@pytest.mark.parametrize(
    "card, levers, expected",
    [
        # Integers of the pack, numbers of its pairs; three tables where attention is a kernel.
        ("T4", USUAL, 2),
        ("3090", USUAL, 5),
        ("3090", Levers(embedding_on_host=True), 6),
    ],
)
def test_a_micro_batch_is_sent_to_a_card_in_few_copies(card, levers, expected):
    def num_copies(num_packs):
        config = config_of(num_hidden_layers=2)
        packs = [[tree_of_shape(TreeShape(20 + i, 20, 20))] for i in range(num_packs)]
        arguments = levers, find_card(card), settings_of(), packs, 128, True
        work = rehearsed._follow(config, *arguments).work
        return sum(each.link_bytes > 0 for each in work)

    assert num_copies(3) - num_copies(2) == expected


def test_layers_on_the_disk_come_through_two_pinned_pieces_and_take_no_host_memory():
    config = config_of(num_hidden_layers=5)
    on_host, on_disk = (
        rehearsal(config, levers=Levers(num_slots=2, layers_on_disk=on_disk))
        for on_disk in (False, True)
    )
    assert on_disk.peak_allocated_bytes - on_host.peak_allocated_bytes < 5 * 7 * 512  # offsets
    assert "NF4 weights" in on_host.host_components
    assert "NF4 weights" not in on_disk.host_components
    assert on_disk.host_components["pieces from the disk"] == 2 * 2**24
    # 5 + 3 uploads of the first micro-batch, 3 + 3 of the second; offsets do not travel.
    assert on_host.link_bytes - on_disk.link_bytes == (8 + 6) * 7 * 256

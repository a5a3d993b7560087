"""Generation rehearsed: the bytes of the real one, and places in memory by which it fits."""

import dataclasses

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from lowmem_dpo.linears.lora import AdapterSpec
from lowmem_dpo.linears.nf4 import dynamic_code, nf4_levels
from lowmem_dpo.machine.card_table import find_card
from lowmem_dpo.memory import extension
from lowmem_dpo.memory.extension import Short, happenings
from lowmem_dpo.memory.fake_card import FakeCard
from lowmem_dpo.memory.levers import Levers
from lowmem_dpo.memory.rehearsal import CONTEXT_BYTES, rehearsal_of, totals_of
from lowmem_dpo.memory.trace import Follower
from lowmem_dpo.memory.weight_slots import WeightSlots
from lowmem_dpo.model.generation import answer_cache, continue_ids
from lowmem_dpo.model.surgery import prepare_model
from lowmem_dpo.settings.configs import GenerateConfig
from lowmem_dpo.steps.rehearsed import PLACES, followed, note_residents
from lowmem_dpo.steps.rehearsed_generation import (
    LAST_TOKEN,
    PREFILL,
    choose_generation_levers,
    follow_generation,
    rehearse_generation,
    uploads_a_token,
)
from lowmem_dpo.weights.folders import load_config
from lowmem_dpo.weights.loading import load_model, unfilled_model
from lowmem_dpo_kernels.triton_support import RehearsedCard, rehearsing
from tests.tiny import FAMILIES, SIZES

CPU = torch.device("cpu")
CARD = find_card("RTX 3060 12 GB")
SPEC = AdapterSpec(8, 16, 0.0, "all", False)
SETTINGS = GenerateConfig(max_new_tokens=16)
ON_HOST = Levers(num_slots=2, embedding_on_host=True, head_on_host=True)
MIB = 2**20


def config_of(family="llama", **changes):
    return AutoConfig.for_model(**SIZES | {"vocab_size": 96} | FAMILIES[family] | changes)


def wide_config(**changes):
    """Of a model whose weights are large beside what the allocator rounds up."""
    sizes = {"hidden_size": 1024, "intermediate_size": 8192, "vocab_size": 32768, "head_dim": 256}
    return config_of(**{"num_hidden_layers": 6} | sizes | changes)


def real_model(folder, dtype, levers):
    config = load_config(str(folder))
    how = {"quantization": "nf4", "dtype": dtype, "device": CPU, "levers": levers}
    model = load_model(str(folder), config=config, quantized_copy=False, **how)
    return prepare_model(model, SPEC, levers)


def events(follower):
    return [
        (event.storage.key, event.storage.nbytes, event.is_birth, event.storage.maker)
        for section in follower.sections
        for event in section.events
    ]


@pytest.mark.parametrize(
    ("family", "dtype", "levers", "sampling"),
    [
        ("llama", torch.bfloat16, Levers(), SETTINGS),
        ("llama", torch.float32, ON_HOST, dataclasses.replace(SETTINGS, temperature=0)),
        ("gemma2", torch.bfloat16, Levers(), SETTINGS),
        ("gemma2", torch.float32, Levers(num_slots=2), dataclasses.replace(SETTINGS, top_k=9)),
        ("qwen3", torch.bfloat16, Levers(), dataclasses.replace(SETTINGS, max_new_tokens=1)),
        ("qwen3", torch.float32, Levers(), dataclasses.replace(SETTINGS, max_new_tokens=2)),
    ],
    ids=str,
)
def test_a_rehearsal_has_the_bytes_of_the_real_one(
    tiny_checkpoint, family, dtype, levers, sampling
):
    folder, _ = tiny_checkpoint(family)
    real, model = Follower("cpu", PLACES), real_model(folder, dtype, levers)
    for remembered in (dynamic_code, nf4_levels):
        remembered.cache_clear()
    follow_generation(model, real, sampling, 20)
    found, mode = Follower("cpu", PLACES), FakeCard()
    how = {"quantization": "nf4", "dtype": dtype, "device": CPU, "levers": levers}
    with rehearsing(RehearsedCard((8, 6), found.note_launch)):
        model = unfilled_model(load_config(str(folder)), mode=mode, **how)
        with mode:
            follow_generation(prepare_model(model, SPEC, levers), found, sampling, 20)
    assert len(events(real)) > 300
    assert events(found) == events(real)
    assert found.work == real.work
    phases = {section.phase for section in real.sections if section.work}
    assert set(PREFILL) <= phases and {"start", "cache"} >= phases - {*PREFILL, *LAST_TOKEN}


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3", "mistral-window"])
def test_first_and_last_token_have_the_peak_of_the_whole_answer(tiny_checkpoint, family):
    """A real answer, token by token, takes what is rehearsed of its first and last token."""
    folder, _ = tiny_checkpoint(family)
    sampling = dataclasses.replace(SETTINGS, max_new_tokens=40)

    def peak(follower):
        trace = [(each, each.storage.nbytes) for each in happenings(follower.sections)]
        return rehearsal_of(
            trace, totals_of(((each, 1) for each in follower.work), CARD), CARD
        ).peak_allocated_bytes

    whole, rehearsed_one = Follower("cpu", PLACES), Follower("cpu", PLACES)
    model = real_model(folder, torch.float32, Levers())
    note_residents(whole, model)
    model.network.generation_config.eos_token_id = None
    with followed(whole, model):
        ids = torch.randint(90, (1, 20))
        cache = answer_cache(model, 1, 60)
        assert continue_ids(model, ids, torch.ones_like(ids), cache, sampling, []).shape == (1, 60)
    follow_generation(real_model(folder, torch.float32, Levers()), rehearsed_one, sampling, 20)
    assert peak(rehearsed_one) == pytest.approx(peak(whole), rel=0.005)


@pytest.mark.parametrize(("family", "num_full"), [("llama", 8), ("gemma2", 4), ("qwen3", 8)])
def test_memory_grows_with_the_answer_by_the_cache_alone(family, num_full):
    config = config_of(family, num_hidden_layers=8)
    peaks = [
        rehearse_generation(
            config,
            CARD,
            SETTINGS,
            SPEC,
            dataclasses.replace(SETTINGS, max_new_tokens=number),
            Levers(),
            prompt_tokens=64,
        ).rehearsal.peak_allocated_bytes
        for number in (64, 128)
    ]
    bytes_a_token = num_full * 2 * config.num_key_value_heads * 16 * 2
    assert peaks[1] - peaks[0] == 64 * bytes_a_token


@pytest.mark.slow
@pytest.mark.parametrize("family, card", [("llama", "T4"), ("gemma2", "3060"), ("phi3", "3060")])
def test_no_square_of_the_prompt_is_needed(family, card):
    how = find_card(card), SETTINGS, None, SETTINGS, Levers()
    short, long = (
        rehearse_generation(
            config_of(family), *how, prompt_tokens=length
        ).rehearsal.peak_allocated_bytes
        for length in (2048, 4096)
    )
    assert long < 2.2 * short


@pytest.mark.slow
def test_a_model_rehearsed_by_few_layers_is_the_whole_model(monkeypatch):
    config, changes = config_of("gemma2", num_hidden_layers=12), {"prompt_tokens": 20}
    found = rehearse_generation(config, CARD, SETTINGS, SPEC, SETTINGS, Levers(), **changes)
    whole_at_once = lambda types, *_: Short(list(range(len(types))), [])  # noqa: E731
    monkeypatch.setattr(extension, "shorten", whole_at_once)
    whole = rehearse_generation(config, CARD, SETTINGS, SPEC, SETTINGS, Levers(), **changes)
    for name in ("peak_allocated_bytes", "peak_reserved_bytes", "host_bytes", "components"):
        assert getattr(found.rehearsal, name) == getattr(whole.rehearsal, name), name
    for one, other in ((found.prefill, whole.prefill), (found.token, whole.token)):
        assert one == pytest.approx(other) and one.flops > 0
    assert found.rehearsal.flops == pytest.approx(found.prefill.flops + found.token.flops)


def choose(config, limit, *, card=CARD, **changes):
    settings = dataclasses.replace(SETTINGS, memory_limit=limit, **changes)
    return choose_generation_levers(
        config,
        card,
        card.memory_bytes - CONTEXT_BYTES,
        settings,
        settings,
        SPEC,
        settings,
        prompt_tokens=100,
    )


def peak_of(config, levers):
    found = rehearse_generation(
        config, CARD, SETTINGS, SPEC, SETTINGS, levers, prompt_tokens=100
    ).rehearsal
    return found.peak_reserved_bytes


@pytest.mark.slow
def test_as_much_stays_on_the_card_as_fits():
    config = wide_config()
    rungs = [
        Levers(),
        Levers(embedding_on_host=True),
        Levers(embedding_on_host=True, head_on_host=True),
    ]
    peaks = [peak_of(config, levers) for levers in rungs]
    assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) == 3
    for levers, peak in zip(rungs, peaks, strict=True):
        plan = choose(config, f"{peak // 1024}KiB")
        assert (plan.levers, plan.reserved_bytes, plan.fits) == (levers, peak, True)
    least = peak_of(config, ON_HOST)
    for num_slots in (2, 3):
        levers = dataclasses.replace(ON_HOST, num_slots=num_slots)
        peak = peak_of(config, levers)
        plan = choose(config, f"{(peak + 21 * MIB) // 1024}KiB")
        assert plan.levers == levers
        assert plan.reserved_bytes == pytest.approx(peak, abs=2 * MIB)
    with pytest.raises(ValueError, match=r"needs at least \d+ MiB, and RTX 3060 12 GB has \d+ MiB"):
        choose(config, f"{least // 2048}KiB")


@pytest.mark.slow
def test_small_slots_count_as_what_they_hold():
    """Slots of less than a megabyte, several of which fit into what torch takes at a time."""
    config = wide_config(hidden_size=256, intermediate_size=1024, num_hidden_layers=40)
    peaks = [peak_of(config, dataclasses.replace(ON_HOST, num_slots=number)) for number in (2, 39)]
    kept = {"layer_weights": "host", "embedding_weight": "host", "head_weight": "host"}
    plan = choose(config, f"{(peaks[0] + 25 * MIB) // 1024}KiB", **kept)
    held = dataclasses.replace(ON_HOST, num_slots=plan.levers.num_slots)
    assert 2 < plan.levers.num_slots < 39
    assert peak_of(config, held) <= peaks[0] + 25 * MIB < peaks[1]


@pytest.mark.slow
def test_settings_are_kept_and_the_refusal_names_them():
    config = wide_config()
    limit = f"{peak_of(config, Levers()) * 9 // 10240}KiB"
    plan = choose(config, limit, embedding_weight="device", head_weight="device")
    assert not plan.levers.embedding_on_host and not plan.levers.head_on_host
    assert plan.levers.num_slots is not None
    assert choose(config, None, head_weight="host").levers == Levers(head_on_host=True)
    assert choose(config, None, layer_weights="host").levers.num_slots == 5
    message = "leave embedding_weight device and layer_weights device out"
    with pytest.raises(ValueError, match=message):
        choose(config, "50MiB", embedding_weight="device", layer_weights="device")


@pytest.mark.slow
def test_what_a_model_has_not_is_not_moved():
    """A head that is the embedding, one in int8, and layers that are not in NF4."""
    tied = wide_config(tie_word_embeddings=True)
    limit = f"{peak_of(tied, Levers()) * 9 // 10240}KiB"
    plan = choose(tied, limit)
    assert not plan.levers.embedding_on_host and not plan.levers.head_on_host
    assert not choose(wide_config(), "250MiB", head_quantization="int8").levers.head_on_host
    with pytest.raises(ValueError, match="needs at least"):
        choose(tied, limit, quantization="none")


def test_uploads_a_token_are_those_of_the_slots():
    class Weight(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("data", torch.zeros(4))
            self.lease = None

    for num_layers, num_slots in ((2, 2), (5, 2), (5, 4), (12, 5)):
        slots = WeightSlots([[Weight()] for _ in range(num_layers)], CPU, num_slots)
        counts = []
        for _ in range(61):
            for layer in range(num_layers):
                with slots.hold(layer, returns=False):
                    pass
            counts.append(slots.num_uploads)
        average = (counts[-1] - counts[0]) / 60
        assert average == pytest.approx(uploads_a_token(num_layers, num_slots), abs=0.05)

"""Wherever the parts of a model are, it gives the same answers, to the token."""

from contextlib import nullcontext

import pytest

from lowmem_dpo.demo.byte_tokenizer import byte_tokenizer
from lowmem_dpo.linears.lora import (
    adapters_disabled,
)
from lowmem_dpo.memory.levers import Levers
from lowmem_dpo.model.generation import generate_text
from lowmem_dpo.settings.groups import SamplingSettings
from tests.model.nf4_models import nf4_model, poison_slots
from tests.tiny import FAMILIES

PROMPTS = [[*range(30, 50)], [50, 51], [60, 61, 62]]
WHOLE = {"embedding_on_host": True, "head_on_host": True}


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    poison_slots(monkeypatch)


def build(family, num_slots, *, head_quantization="none", **on_host):
    levers = Levers(num_slots=num_slots, **on_host)
    return nf4_model(family, levers, head_quantization=head_quantization)


def answers(model):
    """Answers of a model with and without its adapter, to prompts alone and together."""
    greedy = SamplingSettings(max_new_tokens=6, temperature=0)
    sampled = SamplingSettings(max_new_tokens=6, temperature=1.0, top_p=0.9, seed=3)
    found = []
    for adapter_or_not in (nullcontext(), adapters_disabled(model.network)):
        with adapter_or_not:
            for sampling in (greedy, sampled):
                for prompts in ([each] for each in PROMPTS):
                    found += generate_text(model, byte_tokenizer(), prompts, sampling)
                found += generate_text(model, byte_tokenizer(), PROMPTS, sampling)
    return found


@pytest.mark.parametrize(
    ("family", "num_slots", "more"),
    [
        ("llama", 2, {}),
        ("llama", 3, WHOLE),
        ("llama", None, {"head_on_host": True}),
        ("llama", 2, {"head_quantization": "int8", "embedding_on_host": True}),
        ("gemma2", 2, {}),
        ("gemma3", 3, {}),
        ("qwen3", 4, {}),
        ("mistral-window", 2, WHOLE),
        ("phi3", 2, WHOLE),
    ],
)
def test_a_model_on_the_host_answers_as_a_resident_one(family, num_slots, more):
    quantization = more.get("head_quantization", "none")
    expected = answers(build(family, None, head_quantization=quantization))
    model = build(family, num_slots, **more)
    assert answers(model) == expected
    assert len(set(expected)) > 8  # the adapter and the sampling are of consequence
    assert model.slots is None or model.slots.num_uploads > 16 * 6 * (5 - num_slots)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_computes_the_last_position_of_a_prompt_alone(family):
    model = build(family, None, **({} if FAMILIES[family].get("tie_word_embeddings") else WHOLE))
    seen = []
    model.network.lm_head.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape))
    generate_text(model, byte_tokenizer(), PROMPTS, SamplingSettings(max_new_tokens=3))
    assert len(seen) == 3 and {shape[:2] for shape in seen} == {(3, 1)}

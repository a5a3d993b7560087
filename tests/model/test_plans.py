"""Places in memory change no bit of a step, plan by plan."""

import functools

import pytest
import torch

from lowmem_dpo.demo.byte_tokenizer import byte_tokenizer
from lowmem_dpo.linears.lora import (
    lora_layers,
)
from lowmem_dpo.memory.levers import Levers
from lowmem_dpo.model.embedding import HostEmbedding
from lowmem_dpo.model.generation import generate_text
from lowmem_dpo.settings.groups import SamplingSettings
from tests.model.nf4_models import NUM_LAYERS, PACK_TOKENS, nf4_model, poison_slots, step
from tests.tiny import FAMILIES

RESIDENT = Levers()
PLANS = {
    "streamed, 2 slots": Levers(num_slots=2),
    "streamed, 3 slots": Levers(num_slots=3),
    "inputs on the host": Levers(inputs_on_host=True),
    "attention kept": Levers(num_keep_attention=NUM_LAYERS),
    "all kept": Levers(num_keep_all=NUM_LAYERS),
    "mixed": Levers(num_keep_all=1, num_keep_attention=1),
    "mixed, inputs and embedding on the host": Levers(
        num_keep_all=2, num_keep_attention=1, inputs_on_host=True, embedding_on_host=True
    ),
    "streamed, inputs and embedding on the host": Levers(
        num_slots=2, inputs_on_host=True, embedding_on_host=True
    ),
}
QUICK = {
    ("llama", "streamed, inputs and embedding on the host", 64, 0.2),
    ("llama", "mixed", 24, 0.0),
    ("llama-tied", "inputs on the host", 24, 0.2),
    ("qwen3", "attention kept", 24, 0.2),
    ("gemma2", "streamed, 3 slots", 24, 0.2),
    ("gemma2", "mixed, inputs and embedding on the host", 64, 0.2),
    ("phi3", "all kept", 64, 0.2),
    ("cohere", "mixed", 64, 0.2),
    ("cohere2", "streamed, 2 slots", 24, 0.0),
}
SLOW = {
    (family, plan, *rest)
    for family in FAMILIES
    for plan in PLANS
    for rest in ((64, 0.2), (24, 0.0))
} - QUICK
CASES = [*sorted(QUICK), *(pytest.param(*each, marks=pytest.mark.slow) for each in sorted(SLOW))]


@pytest.fixture(autouse=True)
def _host(monkeypatch):
    """Slots are poisoned, and memory need not be pinned."""
    poison_slots(monkeypatch)
    monkeypatch.setattr("lowmem_dpo.model.layer._to_host", lambda x: x.detach().clone())


def build(family, levers, *, dropout=0.0, tile_rows=64):
    model = nf4_model(family, levers, dropout=dropout)
    for layer in model.layers:
        layer.token_wise.tile_rows = tile_rows
    return model


@functools.cache
def resident_step(family, tile_rows, dropout):
    return step(build(family, RESIDENT, dropout=dropout, tile_rows=tile_rows))


@pytest.mark.parametrize("family, plan, tile_rows, dropout", CASES)
def test_a_plan_changes_no_bit(family, plan, tile_rows, dropout):
    """But where all is kept of several tiles, whose gradients autograd adds from the last on."""
    levers = PLANS[plan]
    model = build(family, levers, dropout=dropout, tile_rows=tile_rows)
    assert [layer.keeps for layer in model.layers] == levers.keeps(NUM_LAYERS)
    (want_logps, want), (logps, found) = resident_step(family, tile_rows, dropout), step(model)
    assert len(logps) == len(want_logps) == 6 and len(found) == len(want) >= 2 * 4 * NUM_LAYERS
    for got, expected in zip(logps, want_logps, strict=True):
        assert torch.equal(got, expected)
    is_exact = levers.num_keep_all == 0 or tile_rows >= PACK_TOKENS
    for got, expected in zip(found, want, strict=True):
        assert expected.abs().sum() > 0
        if is_exact:
            assert torch.equal(got, expected)
        else:
            assert (got - expected).norm() <= 1e-5 * expected.norm()


def test_dropout_and_tiles_matter_here():
    """What the cases differ in shows in their numbers."""
    usual = resident_step("llama", 64, 0.0)
    dropped, tiled = resident_step("llama", 64, 0.2), resident_step("llama", 24, 0.0)
    assert torch.equal(usual[0][0], dropped[0][0]) and not torch.equal(usual[0][1], dropped[0][1])
    assert torch.equal(usual[0][1], tiled[0][1])
    assert not all(torch.equal(a, b) for a, b in zip(usual[1], tiled[1], strict=True))


def test_an_embedding_on_the_host_is_said_in_the_table_of_storage():
    model = build("llama", Levers(embedding_on_host=True))
    assert isinstance(model.backbone.get_input_embeddings(), HostEmbedding)
    assert model.storage[1].format == "float32, in host memory"


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_model_on_the_host_answers_as_a_resident_one(family):
    sampling = SamplingSettings(max_new_tokens=6, temperature=1.0)
    on_host = Levers(num_slots=2, embedding_on_host=True)
    models = [build(family, RESIDENT), build(family, on_host)]
    prompts = [[*range(30, 42)], [50, 51]]
    texts = [generate_text(each, byte_tokenizer(), prompts, sampling) for each in models]
    assert texts[0] == texts[1] and any(texts[0])
    assert models[1].slots.num_uploads > 6 * (5 - 2)


def test_streamed_layers_are_there_in_their_turn_only():
    model = build("llama", Levers(num_slots=2))
    layer = lora_layers(model.network)["model.layers.3.mlp.up_proj"]
    with pytest.raises(RuntimeError, match="layer 3 is read outside of its turn"):
        layer(torch.zeros(1, layer.in_features))
    x = torch.randn(4, layer.in_features, requires_grad=True)
    with model.layers[3].hold(returns=True):
        y = layer(x)
    # The layer before takes the slot; a backward pass now would multiply by its weights.
    for i in (4, 1, 0):
        with model.layers[i].hold(returns=True):
            pass
    with pytest.raises(RuntimeError, match="layer 3 is read outside of its turn"):
        y.sum().backward()


def test_streaming_is_said_in_the_table_of_storage():
    assert build("llama", RESIDENT).storage[0].format == "nf4"
    row = build("llama", Levers(num_slots=2)).storage[0]
    assert row.format == "nf4, in host memory, 2 layers at a time on the device"

import gc
import weakref

import pytest
import torch
from torch import nn

from lowmem_dpo.linears.lora import (
    AdapterSpec,
    LoraLinear,
    add_lora,
    dropout_live,
    lora_parameters,
    wrap_linears,
)
from lowmem_dpo.model.families import FAMILIES as RECORDS
from lowmem_dpo.model.layer import DecoderLayer
from lowmem_dpo.model.surgery import replace_norms
from tests.tiny import FAMILIES, tiny_model

NUM_TOKENS = 20


def adapted_model(family="llama", *, dropout=0.0, own_norms=False, **changes):
    """A tiny model with a live adapter on every linear and norms that are not ones."""
    model = tiny_model(family, **changes).requires_grad_(False)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.add_(0.2 * torch.randn_like(parameter))
    wrap_linears(model.model.layers, "model.layers")
    add_lora(model, AdapterSpec(3, 6.0, dropout, "all", rank_stabilised=False), seed=0)
    for name, parameter in lora_parameters(model).items():
        if name.endswith("lora_b"):
            nn.init.normal_(parameter, std=0.1)
    if own_norms:
        replace_norms(model.model, RECORDS[model.config.model_type])
    return model


def with_halves(model, *, tile_rows=64, has_dropout=False, on_host=False):
    """The same model with its layers replaced."""
    family = RECORDS[model.config.model_type]
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = DecoderLayer(
            layer,
            family,
            residual_multiplier=family.residual_multiplier(model.config),
            inputs_on_host=on_host,
            has_dropout=has_dropout,
            tile_rows=tile_rows,
        )
    return model


def keeping_all(model):
    """Let ordinary autograd differentiate the halves, with everything inside kept."""
    for layer in model.model.layers:
        layer.forward = lambda x, layer=layer, **kwargs: layer.token_wise(
            *layer.attention(x, **kwargs)
        )
    return model


def gradients(model):
    """Hidden states, and the gradients of the embeddings and of every adapter matrix."""
    device = model.model.embed_tokens.weight.device
    ids = torch.arange(NUM_TOKENS, device=device)[None] + 30
    embeddings = model.model.embed_tokens(ids).requires_grad_()
    torch.manual_seed(5)
    with dropout_live(model):
        hidden = model.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        upstream = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(3))
        hidden.backward(upstream.to(hidden))
    found = {name: p.grad for name, p in lora_parameters(model).items()}
    return {"hidden": hidden.detach(), "embeddings": embeddings.grad, **found}


def assert_equal(got, want):
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert tensor.abs().sum() > 0, name
        assert torch.equal(got[name], tensor), name


def assert_close(got, want):
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert (got[name] - tensor).norm() <= 1e-5 * tensor.norm(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_tile_has_the_bits_of_transformers_layer(family, dtype):
    plain, ours = (adapted_model(family, own_norms=True).to(dtype) for _ in range(2))
    want, got = gradients(plain), gradients(with_halves(ours))
    assert torch.equal(got["hidden"], want["hidden"])
    if family == "olmo2":  # three gradients meet before its MLP, and autograd adds them otherwise
        assert all((got[n] - want[n]).norm() <= 0.02 * want[n].norm() for n in want)
    else:
        assert_equal(got, want)


@pytest.mark.parametrize("family", FAMILIES)
def test_several_tiles_and_own_norms_give_the_plain_outputs_and_gradients(family):
    want = gradients(adapted_model(family))
    assert_close(gradients(with_halves(adapted_model(family, own_norms=True), tile_rows=7)), want)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_and_no_gradient_give_the_same_bits(family):
    model, ids = with_halves(adapted_model(family), tile_rows=7), torch.arange(NUM_TOKENS)[None]
    with torch.no_grad():
        want = model.model(ids, use_cache=False).last_hidden_state
    embeddings = model.model.embed_tokens(ids).requires_grad_()
    got = model.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
    assert got.requires_grad and torch.equal(got, want)


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere"])
def test_one_tile_repeats_the_dropout_of_transformers_layer(family):
    plain, ours = (adapted_model(family, dropout=0.3, own_norms=True) for _ in range(2))
    assert_equal(gradients(with_halves(ours, has_dropout=True)), gradients(plain))


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere"])
def test_several_tiles_repeat_their_dropout(family):
    """Ordinary autograd over the same halves draws the same masks and keeps them."""
    settings = {"tile_rows": 7, "has_dropout": True}
    want = gradients(keeping_all(with_halves(adapted_model(family, dropout=0.3), **settings)))
    assert_close(gradients(with_halves(adapted_model(family, dropout=0.3), **settings)), want)


def test_without_saved_generators_a_second_run_would_draw_other_dropout():
    want = gradients(adapted_model(dropout=0.3))
    got = gradients(with_halves(adapted_model(dropout=0.3)))
    assert torch.equal(got["hidden"], want["hidden"])
    assert not torch.allclose(got["embeddings"], want["embeddings"], rtol=0.01)


def test_the_generators_are_left_where_a_plain_backward_would_leave_them():
    gradients(adapted_model(dropout=0.3))
    want = torch.get_rng_state()
    gradients(with_halves(adapted_model(dropout=0.3), has_dropout=True))
    assert torch.equal(torch.get_rng_state(), want)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_each_product_is_computed_as_often_as_needed(family, monkeypatch):
    """Forward, for the gradient of what it feeds, and for the gradient of its input."""
    counts = {}
    dense_weight = LoraLinear.dense_weight

    def count(self, dtype):
        name = self.name.rpartition(".")[2]
        counts[name] = counts.get(name, 0) + 1
        return dense_weight(self, dtype)

    monkeypatch.setattr(LoraLinear, "dense_weight", count)
    gradients(with_halves(adapted_model(family)))
    num_layers = 2
    for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"):
        assert counts[name] == 3 * num_layers
    # Gemma's last norm reads what comes out, Llama's residual does not.
    assert counts["down_proj"] == (2 if family == "llama" else 3) * num_layers


def test_nothing_inside_a_layer_waits_for_the_backward_pass():
    model = with_halves(adapted_model())
    inside, kept = [], []
    for module in model.model.layers[0].modules():
        module.register_forward_hook(
            lambda module, args, out: inside.extend(
                weakref.ref(t) for t in (out if isinstance(out, tuple) else (out,)) if t is not None
            )
        )
    layer = model.model.layers[0]
    x = torch.randn(1, NUM_TOKENS, 64, requires_grad=True)
    rotary = model.model.rotary_emb(x, torch.arange(NUM_TOKENS)[None])
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(x, position_embeddings=rotary, attention_mask=None)
    gc.collect()
    alive = [reference() for reference in inside if reference() is not None]
    assert len(inside) > 10 and {t.data_ptr() for t in alive} == {y.data_ptr()}
    assert not kept
    y.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("gradient", [False, True])
def test_attention_runs_again_only_for_a_gradient(gradient):
    model, runs = with_halves(adapted_model()), []
    model.model.layers[0].attention.register_forward_hook(lambda *_: runs.append(1))
    with torch.set_grad_enabled(gradient):
        embeddings = model.model.embed_tokens(torch.tensor([[5, 6]])).requires_grad_(gradient)
        out = model.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
    assert len(runs) == 1
    if gradient:
        out.sum().backward()
        assert len(runs) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_inputs_that_wait_on_the_host_give_the_same_bits(dropout):
    results = []
    for on_host in (False, True):
        model = adapted_model(dropout=dropout).cuda()
        results.append(gradients(with_halves(model, on_host=on_host, has_dropout=dropout > 0)))
    assert_equal(*results)


def token_wise(tile_rows, family="llama"):
    return with_halves(adapted_model(family), tile_rows=tile_rows).model.layers[0].token_wise


def hidden_states(num_rows, seed=2, batch=1):
    return torch.randn(batch, num_rows, 64, generator=torch.Generator().manual_seed(seed))


def half_gradients(half, function, num_rows, batch=1):
    """Output, gradients of both inputs, and of the adapters."""
    h, x = (hidden_states(num_rows, seed, batch).requires_grad_() for seed in (2, 3))
    grad_y = hidden_states(num_rows, 4, batch)
    half.zero_grad()
    y, grad_x = function(half, h, x, grad_y)
    return [y.detach(), grad_x, *(p.grad for p in half.parameters() if p.requires_grad)]


def by_autograd(half, h, x, grad_y):
    half.tile_rows = 10**6
    y = half(h, x)
    y.backward(grad_y)
    assert torch.equal(h.grad, grad_y)
    return y, x.grad


def by_tiles(half, h, x, grad_y):
    with torch.no_grad():
        return half(h, x), half.input_gradient(x, grad_y)


@pytest.mark.parametrize("num_rows", [1, 7, 8, 20])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("family", ["llama", "olmo2", "granite"])
def test_token_wise_half_gives_the_output_and_gradients_of_autograd(family, batch, num_rows):
    found = half_gradients(token_wise(7, family), by_tiles, num_rows, batch)
    wanted = half_gradients(token_wise(7, family), by_autograd, num_rows, batch)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_tiles_have_one_shape_and_cover_every_row():
    half = token_wise(2048)
    for num_rows in (1, 2047, 2048, 2049, 4097, 8192):
        slices = half.tiles(num_rows, torch.device("cpu"))
        assert [i for s in slices for i in range(num_rows)[s]] == list(range(num_rows))
        heights = [s.stop - s.start for s in slices]
        assert len(set(heights[:-1])) <= 1 and heights[-1] <= heights[0] <= 2048
        assert len(slices) == -(-num_rows // 2048)


def test_tiles_of_a_card_are_multiples_of_128_where_there_are_several():
    half, card = token_wise(2048), torch.device("cuda")
    for num_rows in (2112, 2240, 2432, 4160, 8192):
        slices = half.tiles(num_rows, card)
        assert [i for s in slices for i in range(num_rows)[s]] == list(range(num_rows))
        assert slices[0].stop % 128 == 0 and slices[0].stop <= 2048
        assert len(slices) == -(-num_rows // 2048)
    assert half.tiles(3, card) == [slice(0, 3)]  # a generated token is no tile


def test_rows_have_the_same_bits_in_any_tile():
    half, h, x = token_wise(64), hidden_states(150), hidden_states(150, 3)
    order = torch.randperm(150, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(half(h[:, order], x[:, order]), half(h, x)[:, order])


def test_token_wise_half_holds_one_tile_at_a_time():
    half, heights = token_wise(8), []
    half.mlp.up_proj.register_forward_hook(lambda module, args, out: heights.append(out.shape[1]))
    x = hidden_states(30)
    with torch.no_grad():
        half(x, x)
        half.input_gradient(x, x)
    assert heights == [8] * 8


def test_a_layer_with_a_part_that_its_family_does_not_know_is_refused():
    model = adapted_model()
    model.model.layers[0].extra_norm = nn.LayerNorm(64)
    with pytest.raises(ValueError, match=r"LlamaDecoderLayer .* has extra_norm, which"):
        with_halves(model)
    model = adapted_model()
    model.model.layers[0].scale = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match=r"has scale, which"):
        with_halves(model)

import gc
import math
import weakref
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lowmem_dpo.linears.lora import (
    AdapterSpec,
    LoraLinear,
    adapters_disabled,
    add_lora,
    dropout_live,
    linear_layers,
    lora_layers,
    lora_parameters,
    wrap_linears,
)
from lowmem_dpo.linears.nf4 import quantize_nf4

NUM_TOKENS, IN, OUT, RANK = 5, 32, 24, 3
ADAPTER = AdapterSpec(RANK, alpha=6.0, dropout=0.0, targets="all", rank_stabilised=False)


def make_layer(
    base="dense", *, rank=RANK, bias=True, dropout=0.0, dtype=torch.float32, name="layer"
):
    torch.manual_seed(0)
    weight = torch.randn(OUT, IN)
    frozen = (
        quantize_nf4(weight)
        if base == "nf4"
        else nn.Parameter(weight.to(dtype), requires_grad=False)
    )
    layer = LoraLinear(
        name,
        frozen,
        nn.Parameter(torch.randn(OUT).to(dtype), requires_grad=False) if bias else None,
    )
    if rank:
        layer.add_adapter(rank, scaling=0.7, dropout=dropout, seed=1)
        nn.init.normal_(layer.lora_b)
    return layer


def plain_formula(layer, x):
    """The layer in ordinary operations, differentiated by autograd."""
    y = F.linear(
        x, layer.dense_weight(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype)
    )
    return y + layer.scaling * (x @ layer.lora_a.to(x.dtype).T @ layer.lora_b.to(x.dtype).T)


class Tower(nn.Module):
    """Two decoder-like layers of two linears each."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        block = lambda: nn.ModuleDict({"q_proj": nn.Linear(8, 6), "up_proj": nn.Linear(6, 8)})  # noqa: E731
        self.layers = nn.ModuleList([block(), block()])
        wrap_linears(self.layers, "model.layers")

    def forward(self, x):
        for layer in self.layers:
            x = layer["up_proj"](layer["q_proj"](x))
        return x


@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(NUM_TOKENS, IN), (2, NUM_TOKENS, IN), (IN,)])
def test_forward_and_gradients_equal_the_plain_formula(base, bias, shape):
    layer = make_layer(base, bias=bias)
    x = torch.randn(shape, requires_grad=True)
    upstream = torch.randn(*shape[:-1], OUT)
    wanted = torch.autograd.grad(plain_formula(layer, x), [x, layer.lora_a, layer.lora_b], upstream)
    y = layer(x)
    torch.testing.assert_close(y, plain_formula(layer, x))
    got = torch.autograd.grad(y, [x, layer.lora_a, layer.lora_b], upstream)
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradcheck_in_float64(base, dropout):
    layer = make_layer(base, dropout=dropout).double()
    if base == "nf4":  # .double() must not touch the scales of a quantised weight
        layer.weight = make_layer(base).weight
    layer.dropout_live = True

    def run(x, lora_a, lora_b):
        torch.manual_seed(5)
        layer._parameters.update(lora_a=lora_a, lora_b=lora_b)
        return layer(x)

    x = torch.randn(2, NUM_TOKENS, IN, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, layer.lora_a, layer.lora_b))


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_gradcheck_without_an_adapter(base):
    layer = make_layer(base, rank=0)
    x = torch.randn(NUM_TOKENS, IN, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_forward_with_b_zero_is_the_base_to_the_bit(base, dtype):
    layer = make_layer(base, dtype=dtype)
    nn.init.zeros_(layer.lora_b)
    x = torch.randn(NUM_TOKENS, IN).to(dtype)
    with_adapter = layer(x)
    layer.enabled = False
    assert torch.equal(with_adapter, layer(x))
    assert torch.equal(with_adapter, F.linear(x, layer.dense_weight(dtype), layer.bias.to(dtype)))


def test_forward_with_the_adapter_off_is_the_base_to_the_bit():
    layer = make_layer("nf4")
    base = make_layer("nf4", rank=0)
    x = torch.randn(NUM_TOKENS, IN)
    assert not torch.equal(layer(x), base(x))
    layer.enabled = False
    assert torch.equal(layer(x), base(x))


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_dtypes_compute_in_that_of_x_and_give_fp32_gradients(base):
    layer = make_layer(base, dtype=torch.bfloat16)
    x = torch.randn(NUM_TOKENS, IN).bfloat16().requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16
    assert layer.lora_a.grad.dtype == layer.lora_b.grad.dtype == torch.float32


def saved_tensors(layer, x):
    """What autograd keeps of one call."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        layer(x)
    return kept


def test_forward_keeps_x_itself_and_nothing_as_large():
    layer = make_layer("nf4")
    x = torch.randn(NUM_TOKENS, IN, requires_grad=True)
    kept = saved_tensors(layer, x)
    assert [t for t in kept if t.data_ptr() == x.data_ptr()]
    others = [t for t in kept if t.data_ptr() != x.data_ptr()]
    assert sorted(tuple(t.shape) for t in others) == sorted(
        [(NUM_TOKENS, RANK), (RANK, IN), (OUT, RANK)]
    )


def test_forward_with_a_frozen_adapter_keeps_no_input():
    layer = make_layer("nf4").requires_grad_(False)
    x = torch.randn(NUM_TOKENS, IN, requires_grad=True)
    shapes = [tuple(t.shape) for t in saved_tensors(layer, x)]
    assert sorted(shapes) == sorted([(RANK, IN), (OUT, RANK)])


@pytest.mark.parametrize("off", ["no adapter", "disabled"])
def test_forward_without_an_adapter_keeps_nothing(off):
    layer = make_layer("nf4", rank=0 if off == "no adapter" else RANK)
    layer.enabled = False
    assert saved_tensors(layer, torch.randn(NUM_TOKENS, IN, requires_grad=True)) == []


def test_forward_and_backward_keep_no_dequantised_weight():
    layer = make_layer("nf4")
    alive = weakref.WeakSet()
    dequantize = layer.weight.dequantize

    def watched(dtype):
        dense = dequantize(dtype)
        alive.add(dense)
        return dense

    layer.weight.dequantize = watched
    x = torch.randn(NUM_TOKENS, IN, requires_grad=True)
    y = layer(x)
    gc.collect()
    assert len(alive) == 0
    y.sum().backward()
    gc.collect()
    assert len(alive) == 0


def test_backward_reads_the_weight_as_it_is_then():
    layer = make_layer("nf4", rank=0)
    x = torch.randn(NUM_TOKENS, IN, requires_grad=True)
    y = layer(x)
    other = quantize_nf4(torch.randn(OUT, IN))
    layer.weight = other  # as weights that are streamed in do
    y.backward(torch.ones_like(y))
    torch.testing.assert_close(
        x.grad, torch.ones(NUM_TOKENS, OUT) @ other.dequantize(torch.float32)
    )


def test_backward_skips_the_gradient_of_an_input_that_needs_none():
    layer = make_layer("nf4")
    y = layer(torch.randn(NUM_TOKENS, IN))
    layer.weight.dequantize = lambda dtype: pytest.fail("dX was computed")
    y.sum().backward()
    assert layer.lora_a.grad is not None and layer.lora_b.grad is not None


def test_dropout_acts_only_while_live():
    layer = make_layer(dropout=0.5)
    x = torch.randn(NUM_TOKENS, IN)
    layer.train()
    assert torch.equal(layer(x), layer(x))
    with dropout_live(layer):
        assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer(x), layer(x))


def test_dropout_repeats_with_the_state_of_the_generator():
    layer = make_layer(dropout=0.5)
    x = torch.randn(NUM_TOKENS, IN)
    with dropout_live(layer):
        state = torch.get_rng_state()
        first = layer(x)
        torch.set_rng_state(state)
        assert torch.equal(layer(x), first)


def test_dropout_keeps_the_mean():
    layer = make_layer(dropout=0.25, bias=False)
    x = torch.randn(1, IN)
    wanted = layer(x)
    with dropout_live(layer):
        mean = layer(x.expand(20_000, IN)).mean(dim=0, keepdim=True)
    torch.testing.assert_close(mean, wanted, rtol=0, atol=0.15)


def test_add_lora_starts_as_peft_does_and_changes_nothing():
    tower = Tower()
    x = torch.randn(NUM_TOKENS, 8)
    before = tower(x)
    names = add_lora(tower, ADAPTER, seed=3)
    assert names == [
        "model.layers.0.q_proj",
        "model.layers.0.up_proj",
        "model.layers.1.q_proj",
        "model.layers.1.up_proj",
    ]
    assert torch.equal(tower(x), before)
    for layer in lora_layers(tower).values():
        bound = 1 / math.sqrt(layer.in_features)
        assert layer.lora_a.dtype == layer.lora_b.dtype == torch.float32
        assert bound / 2 < layer.lora_a.abs().max() <= bound
        assert not layer.lora_b.any()
        assert layer.scaling == 2.0


def test_add_lora_draws_a_by_seed_and_name_alone():
    towers = [Tower() for _ in range(4)]
    add_lora(towers[0], ADAPTER, seed=3)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    add_lora(towers[1], ADAPTER, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    add_lora(towers[2], replace(ADAPTER, targets=["up_proj"]), seed=3)
    add_lora(towers[3], ADAPTER, seed=4)
    layers = [lora_layers(tower) for tower in towers]
    for name, layer in layers[0].items():
        assert torch.equal(layer.lora_a, layers[1][name].lora_a)
        assert not torch.equal(layer.lora_a, layers[3][name].lora_a)
        if name.endswith("up_proj"):
            assert torch.equal(layer.lora_a, layers[2][name].lora_a)
    first, second = layers[0]["model.layers.0.q_proj"], layers[0]["model.layers.1.q_proj"]
    assert not torch.equal(first.lora_a, second.lora_a)


def test_add_lora_scales_rank_stabilised_by_the_square_root():
    tower = Tower()
    add_lora(tower, replace(ADAPTER, rank=4, rank_stabilised=True), seed=3)
    assert {layer.scaling for layer in lora_layers(tower).values()} == {3.0}


def test_add_lora_gives_each_layer_the_rank_and_alpha_of_the_first_pattern_that_its_name_ends_in():
    tower = Tower()
    ranks = {"1.q_proj": 5, "q_proj": 2, "p_proj": 7}  # up_proj does not end in the part p_proj
    alphas = {r"layers\.0\..*": 4.0}
    adapter = replace(ADAPTER, rank_pattern=ranks, alpha_pattern=alphas)
    names = add_lora(tower, adapter, seed=3)
    layers = lora_layers(tower).values()
    assert [layer.rank for layer in layers] == [2, RANK, 5, RANK]
    assert [layer.scaling for layer in layers] == [4 / 2, 4 / RANK, 6 / 5, 6 / RANK]
    for name, layer in zip(names, layers, strict=True):
        assert adapter.rank_and_scaling(name) == (layer.rank, layer.scaling)
        assert (layer.lora_a.shape[0], layer.lora_b.shape[1]) == (layer.rank, layer.rank)


def test_add_lora_takes_parts_of_names():
    tower = Tower()
    assert add_lora(tower, replace(ADAPTER, targets=["1.q_proj"]), seed=3) == [
        "model.layers.1.q_proj"
    ]
    assert list(lora_layers(tower)) == ["model.layers.1.q_proj"]
    assert len(linear_layers(tower)) == 4


@pytest.mark.parametrize("targets", [["q_proj", "k_prj"], ["_proj"], []])
def test_add_lora_refuses_unknown_targets_and_names_the_known(targets):
    with pytest.raises(
        ValueError, match=r"no linear layer .*; use all, or some of q_proj, up_proj$"
    ):
        add_lora(Tower(), replace(ADAPTER, targets=targets), seed=3)


def test_names_are_canonical_under_wrappers():
    class Wrapper(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

    tower = Tower()
    tower.layers[0] = Wrapper(tower.layers[0])
    add_lora(tower, replace(ADAPTER, targets=["q_proj"]), seed=3)
    assert list(lora_parameters(tower)) == [
        "model.layers.0.q_proj.lora_a",
        "model.layers.0.q_proj.lora_b",
        "model.layers.1.q_proj.lora_a",
        "model.layers.1.q_proj.lora_b",
    ]


def test_lora_parameters_are_all_that_needs_a_gradient():
    tower = Tower()
    add_lora(tower, ADAPTER, seed=3)
    trainable = {id(p) for p in tower.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in lora_parameters(tower).values()}


def test_adapters_disabled_gives_the_base_and_comes_back():
    tower = Tower()
    x = torch.randn(NUM_TOKENS, 8)
    before = tower(x)
    add_lora(tower, ADAPTER, seed=3)
    for layer in lora_layers(tower).values():
        nn.init.normal_(layer.lora_b)
    after = tower(x)
    with pytest.raises(KeyError), adapters_disabled(tower):
        assert torch.equal(tower(x), before)
        raise KeyError
    assert torch.equal(tower(x), after) and not torch.equal(after, before)


@pytest.mark.parametrize("rank", [0, RANK])
def test_without_values_the_output_is_left_out_and_the_gradients_are_those_of_forward(rank):
    results = []
    for left_out in (False, True):
        layer = make_layer("nf4", rank=rank)
        x = torch.randn(NUM_TOKENS, IN, generator=torch.Generator().manual_seed(2)).requires_grad_()
        y = layer(x, needs_values=not left_out)
        assert y.isnan().all() == left_out and y.shape == (NUM_TOKENS, OUT)
        assert y.untyped_storage().nbytes() == (4 if left_out else 4 * y.numel())
        y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape))
        results.append([x.grad, *(p.grad for p in layer.parameters() if p.requires_grad)])
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


def test_without_values_there_is_no_product_with_the_weight_before_the_backward_pass():
    layer = make_layer("nf4")
    layer.weight.dequantize = lambda dtype: pytest.fail("the weight was made dense")
    layer(torch.randn(NUM_TOKENS, IN, requires_grad=True), needs_values=False)


def test_without_values_the_dropout_of_forward_is_drawn():
    results = []
    for left_out in (False, True):
        layer = make_layer(dropout=0.5)
        x = torch.ones(NUM_TOKENS, IN, requires_grad=True)
        torch.manual_seed(4)
        with dropout_live(layer):
            y = layer(x, needs_values=not left_out)
        state = torch.get_rng_state()
        y.backward(torch.ones_like(y))
        results.append([state, x.grad, layer.lora_a.grad, layer.lora_b.grad])
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)

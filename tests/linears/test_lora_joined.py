"""Layers of one input as one function, as on a card; here on a CPU, made to join."""

import pytest
import torch
from torch import nn

from lowmem_dpo.linears import lora
from lowmem_dpo.linears.lora import (
    adapters_disabled,
    casts_kept,
    dropout_live,
    linear_layers,
    lora_parameters,
    project,
)
from lowmem_dpo.model import attention, layer
from lowmem_dpo.model.scoring import score
from lowmem_dpo.settings.configs import TrainConfig
from lowmem_dpo.steps.update import new_state
from tests.linears.test_lora import IN, NUM_TOKENS, make_layer
from tests.model.test_scoring import (
    build_tree,
    pack_trees,
    packed_loss,
    plain_loss,
    policy,  # noqa: F401 - a fixture
    take_gradients,
    token_pairs,
)


@pytest.fixture
def joins(monkeypatch):
    """Let every device join its products."""
    for module in (lora, layer):
        monkeypatch.setattr(module, "joins_products", lambda device, dtype: True)


def make_layers(*, ranks=(3, 5, 2), dropout=0.0, dtype=torch.float32):
    """Layers of one input as q, k and v are; rank 0 is one without an adapter."""
    layers = nn.ModuleList()
    for i, rank in enumerate(ranks):
        layers.append(make_layer("nf4", rank=rank, dropout=dropout, dtype=dtype, name=f"l{i}"))
        layers[-1].scaling = 0.7 + i
    return layers


def run(layers, one_by_one, *, times=1, trains_x=True):
    """Outputs, the gradient of x and those of the matrices, after some backward passes."""
    layers.zero_grad()
    torch.manual_seed(2)
    x = torch.randn(2, NUM_TOKENS, IN, requires_grad=trains_x)
    torch.manual_seed(4)
    with dropout_live(layers):
        for _ in range(times):
            outputs = [each(x) for each in layers] if one_by_one else project(x, list(layers))
            sum((y * (i + 1)).square().sum() for i, y in enumerate(outputs)).backward()
    found = [p.grad for p in layers.parameters() if p.requires_grad]
    return [y.detach() for y in outputs], x.grad, found


@pytest.mark.parametrize("ranks", [(3, 5, 2), (4, 4, 4), (0, 3, 0), (3, 0, 1), (0, 0, 0)])
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("trains_x", [True, False])
def test_joined_layers_give_outputs_and_gradients_of_layers_one_by_one(
    ranks, times, trains_x, monkeypatch
):
    if not trains_x and not any(ranks):
        pytest.skip("nothing to differentiate")
    layers = make_layers(ranks=ranks)
    outputs, grad_x, wanted = run(layers, True, times=times, trains_x=trains_x)
    monkeypatch.setattr(lora, "joins_products", lambda device, dtype: True)
    found = run(layers, False, times=times, trains_x=trains_x)
    for got, want in zip(found[0], outputs, strict=True):
        torch.testing.assert_close(got, want)
    assert (found[1] is None) == (grad_x is None) == (not trains_x)
    for got, want in zip([found[1], *found[2]], [grad_x, *wanted], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        assert want is None or want.abs().sum() > 0


def test_joined_layers_are_one_node_that_keeps_their_input_once(joins):
    layers, kept = make_layers(), []
    x = torch.randn(NUM_TOKENS, IN, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        outputs = project(x, list(layers))
    assert len({y.grad_fn for y in outputs}) == 1
    assert [t.shape for t in kept if t.data_ptr() == x.data_ptr()] == [x.shape]
    assert (NUM_TOKENS, 10) in [tuple(t.shape) for t in kept]  # x A^T of all three, 3 + 5 + 2


def test_layers_are_not_joined_on_a_cpu():
    outputs = project(torch.randn(NUM_TOKENS, IN, requires_grad=True), list(make_layers()))
    assert len({y.grad_fn for y in outputs}) == 3


def test_dropout_draws_for_each_layer_by_itself(joins):
    layers = make_layers(dropout=0.5)
    results = [run(layers, one_by_one) for one_by_one in (True, False)]
    for got, want in zip(results[1][0], results[0][0], strict=True):
        assert torch.equal(got, want)
    for got, want in zip(results[1][2], results[0][2], strict=True):
        torch.testing.assert_close(got, want)


def test_joined_layers_with_the_adapters_off_are_their_bases_to_the_bit(joins):
    layers, x = make_layers(), torch.randn(NUM_TOKENS, IN)
    with adapters_disabled(layers):
        found = project(x, list(layers))
    bases = make_layers(ranks=(0, 0, 0))
    for got, base in zip(found, bases, strict=True):
        assert torch.equal(got, base(x))


def test_a_frozen_matrix_gets_no_gradient_of_joined_layers(joins):
    layers = make_layers()
    layers[1].lora_a.requires_grad_(False)
    sum(y.sum() for y in project(torch.randn(NUM_TOKENS, IN), list(layers))).backward()
    assert layers[1].lora_a.grad is None
    assert all(p.grad is not None for p in layers.parameters() if p.requires_grad)


def test_joined_attention_and_mlp_give_loss_and_gradients_of_plain_sequences(policy, joins):  # noqa: F811
    pairs = token_pairs()
    loss = packed_loss(policy, [build_tree(pair) for pair in pairs], 64)
    gradients = take_gradients(policy)
    wanted_loss = plain_loss(policy, pairs)
    wanted = take_gradients(policy)
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    for name, gradient in gradients.items():
        assert (gradient - wanted[name]).norm() < 2e-5 * wanted[name].norm(), name


def test_joined_layers_score_the_same_bits_in_any_order_and_as_the_base_at_the_start(
    policy,  # noqa: F811
    joins,
):
    network = policy.model.network
    for name, parameter in lora_parameters(network).items():
        if name.endswith("lora_b"):
            nn.init.zeros_(parameter)
    trees, by_row = [build_tree(pair) for pair in token_pairs()], {}
    for order, gradient in ((trees, True), (trees, False), (trees[::-1], False)):
        for pack in pack_trees(order, 192):
            with torch.set_grad_enabled(gradient):
                logps = score(policy.model, pack).detach()
            with adapters_disabled(network), torch.no_grad():
                assert torch.equal(score(policy.model, pack), logps)
            runs = logps.split([sum(counts) for counts in pack.counts])
            for tree, part in zip(pack.trees, runs, strict=True):
                assert torch.equal(by_row.setdefault(tree.row, part), part)


def test_which_attention_modules_are_joined(policy, joins, monkeypatch):  # noqa: F811
    """Those with q, k and v apart and rotation by halves; other families keep transformers'."""
    calls = []
    monkeypatch.setattr(
        layer,
        "joined_attention",
        lambda *a, **k: calls.append(1) or attention.joined_attention(*a, **k),
    )
    (pack,) = pack_trees([build_tree(token_pairs()[0])], 64)
    score(policy.model, pack)
    family = policy.model.config.model_type
    known = family not in ("phi3", "olmo2", "cohere", "cohere2")
    assert len(calls) == (len(policy.model.layers) if known else 0)


@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit"])
def test_casts_are_those_of_the_matrices_after_an_optimizer_step(optim):
    """Neither optimizer raises a tensor's version, so nothing but the end of the step tells."""
    layers = make_layers(dtype=torch.bfloat16)
    x = torch.randn(NUM_TOKENS, IN).bfloat16().requires_grad_()
    settings = TrainConfig(
        optim=optim, learning_rate=0.1, lr_scheduler_type="constant", warmup_ratio=0.0
    )
    parameters = [p for p in layers.parameters() if p.requires_grad]
    optimizer = new_state(settings, parameters, 10).optimizer
    for _ in range(3):
        with casts_kept(layers):
            outputs = [each(x) for each in layers]
            sum(y.float().square().sum() for y in outputs).backward()
        fresh = [each(x) for each in layers]
        assert all(map(torch.equal, outputs, fresh))
        optimizer.step()
        optimizer.zero_grad()
        assert not any(map(torch.equal, fresh, [each(x) for each in layers]))


def test_casts_are_made_once_inside_and_gone_afterwards():
    layers = make_layers(dtype=torch.bfloat16)
    x = torch.randn(NUM_TOKENS, IN).bfloat16()

    def casts():
        return [(*each.casts.values(),) for each in layers]

    with pytest.raises(KeyError), casts_kept(layers):
        [each(x) for each in layers]
        first = casts()
        [each(x) for each in layers]
        for (one,), (other,) in zip(first, casts(), strict=True):
            assert one is other and one[0].dtype == torch.bfloat16
        raise KeyError
    assert all(each.casts is None for each in layers)


def test_casts_are_kept_by_type(joins):
    """A value computed in float64 for a check must not come from casts of before."""
    layers = make_layers()
    x = torch.randn(NUM_TOKENS, IN, dtype=torch.float64)
    wanted = [y for each in (x, x.float()) for y in project(each, list(layers))]
    with casts_kept(layers):
        found = [y for each in (x, x.float()) for y in project(each, list(layers))]
    assert all(map(torch.equal, found, wanted))


def test_casts_of_every_layer_of_a_model_are_kept_once(policy, joins):  # noqa: F811
    """The joined A matrices stand in place of their own: the memory is that of the matrices."""
    network = policy.model.network
    (pack,) = pack_trees([build_tree(token_pairs()[0])], 64)
    with casts_kept(network):
        score(policy.model, pack).sum().backward()
        layers = linear_layers(network).values()
        found = [each.casts.values() for each in layers if each.casts]
        casts = [
            cast for casts in found for lora_a, lora_bs in casts for cast in (lora_a, *lora_bs)
        ]
        parameters = lora_parameters(network)
        assert sum(c.numel() for c in casts) == sum(p.numel() for p in parameters.values())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_joined_layers_on_a_card_give_gradients_in_fp32_as_near_the_exact_ones(dtype):
    torch.manual_seed(0)
    layers = make_layers(dtype=dtype).cuda()
    x = torch.randn(NUM_TOKENS, IN, device="cuda", dtype=dtype, requires_grad=True)
    for _ in range(2):
        sum(y.float().square().sum() for y in project(x, list(layers))).backward()
    found = [p.grad.clone() for p in layers.parameters() if p.requires_grad]
    layers.zero_grad()
    exact = x.detach().double().cpu().requires_grad_()
    layers.cpu()
    for _ in range(2):
        sum(each(exact).square().sum() for each in layers).backward()
    wanted = [p.grad for p in layers.parameters() if p.requires_grad]
    bound = 1e-4 if dtype == torch.float32 else 2e-2
    for got, want in zip(found, wanted, strict=True):
        assert got.dtype == torch.float32
        assert (got.cpu() - want).norm() <= bound * want.norm()

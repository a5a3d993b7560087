import gc
import weakref

import pytest
import torch
from lowmem_dpo.model.runner import LayerRunner, wrap_layers
from torch import nn


class Layer(nn.Module):
    """Counts its runs; its dropout makes a second run differ unless the generators are restored."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.dropout = dropout
        self.runs = 0
        self.inside: list[weakref.ref] = []

    def forward(self, hidden, *, factor=1.0):
        self.runs += 1
        inner = torch.tanh(self.linear(hidden)) * factor
        self.inside.append(weakref.ref(inner))
        return hidden + nn.functional.dropout(inner, self.dropout, training=True)


def stack(dropout: float = 0.0, num_layers: int = 3) -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(Layer(dropout) for _ in range(num_layers))


def run(layers, hidden):
    torch.manual_seed(1)
    for layer in layers:
        hidden = layer(hidden, factor=0.5)
    return hidden


def gradients(layers):
    hidden = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(2), requires_grad=True)
    output = run(layers, hidden)
    output.square().sum().backward()
    return [output.detach(), hidden.grad, *(p.grad for p in layers.parameters())]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_layer_runner_gives_the_plain_outputs_and_gradients(dropout):
    plain = gradients(stack(dropout))
    layers = stack(dropout)
    wrap_layers(layers, inputs_on_host=False, has_randomness=dropout > 0)
    for got, want in zip(gradients(layers), plain, strict=True):
        assert torch.equal(got, want)


def test_layer_runner_without_saved_randomness_would_draw_other_dropout():
    layers = stack(0.5)
    wrap_layers(layers, inputs_on_host=False, has_randomness=False)
    assert not torch.equal(gradients(layers)[1], gradients(stack(0.5))[1])


def test_layer_runner_leaves_the_generators_where_a_plain_backward_would():
    states = []
    for wrap in (False, True):
        layers = stack(0.5)
        if wrap:
            wrap_layers(layers, inputs_on_host=False, has_randomness=True)
        gradients(layers)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_layer_runner_keeps_nothing_inside_between_forward_and_backward():
    runner = LayerRunner(Layer(), inputs_on_host=False, has_randomness=False)
    output = runner(torch.randn(1, 5, 8, requires_grad=True))
    gc.collect()
    assert all(reference() is None for reference in runner.layer.inside)
    output.sum().backward()
    assert runner.layer.runs == 2


def test_layer_runner_runs_once_without_a_gradient():
    runner = LayerRunner(Layer(), inputs_on_host=False, has_randomness=False)
    with torch.no_grad():
        runner(torch.randn(1, 5, 8))
    assert runner.layer.runs == 1


@pytest.mark.gpu
def test_layer_runner_with_inputs_on_the_host_gives_the_same_bits():
    results = []
    for on_host in (False, True):
        layers = stack().cuda()
        wrap_layers(layers, inputs_on_host=on_host, has_randomness=False)
        hidden = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(2)).cuda()
        hidden.requires_grad_()
        run(layers, hidden).square().sum().backward()
        results.append([hidden.grad, *(p.grad for p in layers.parameters())])
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)

"""The layer runner: one decoder layer as the unit of memory.

Activations of a whole model do not fit; those of one layer do. A `LayerRunner` wraps a decoder
layer, remembers only the layer's input, on the device or in pinned host memory, and runs the layer
a second time in the backward pass. A pack of N tokens then costs N * D numbers a layer instead of
everything inside it.

The autograd function is re-entrant: its backward calls `torch.autograd.backward`, so adapter
gradients arrive through `.backward()` only (not `torch.autograd.grad`) and add up in place. The
hidden states that enter the first layer must require a gradient, or no layer's backward would run.

Shapes: N packed tokens, D hidden.
"""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from lowmem_dpo.model.second_run import output_unread, random_state, restored
from lowmem_dpo.model.tiles import TokenTiles


class LayerRunner(nn.Module):
    """A decoder layer that keeps nothing but its input for the backward pass.

    Args:
        layer: The decoder layer: hidden [1, N, D] and keyword arguments to hidden [1, N, D].
        inputs_on_host: Let the input wait in pinned host memory; for layers on a CUDA device.
        has_randomness: Save the state of the random generators, so that the second run repeats the
            first one's dropout.
    """

    def __init__(self, layer: nn.Module, *, inputs_on_host: bool, has_randomness: bool) -> None:
        super().__init__()
        self.layer = layer
        self.inputs_on_host = inputs_on_host
        self.has_randomness = has_randomness

    def tail(self) -> TokenTiles | None:
        """The part whose output is only added to the residual: no second run needs its value."""
        return next((m for m in self.layer.modules() if isinstance(m, TokenTiles)), None)

    def forward(self, hidden: Tensor, **kwargs: Any) -> Tensor:
        """Run the layer; with a gradient to come, keep only its input."""
        if torch.is_grad_enabled() and hidden.requires_grad:
            return _RunLayer.apply(hidden, self, kwargs)
        return self.layer(hidden, **kwargs)


class _RunLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, runner: LayerRunner, kwargs: dict[str, Any]) -> Tensor:
        ctx.runner, ctx.kwargs, ctx.device = runner, kwargs, hidden.device
        ctx.random_state = random_state(hidden.device) if runner.has_randomness else None
        output = runner.layer(hidden, **kwargs)
        ctx.input = _to_host(hidden) if runner.inputs_on_host else hidden.detach()
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, None, None]:
        hidden = ctx.input.to(ctx.device, non_blocking=True).detach().requires_grad_()
        ctx.input = None
        state = ctx.random_state
        repeated = restored(state, ctx.device) if state else nullcontext()
        with torch.enable_grad(), repeated, output_unread(ctx.runner.tail()):
            output = ctx.runner.layer(hidden, **ctx.kwargs)
        edge = get_gradient_edge(output)
        del output  # only its place in the graph is needed
        torch.autograd.backward(edge, grad_outputs)
        return hidden.grad, None, None


def _to_host(hidden: Tensor) -> Tensor:
    """A pinned copy; copies to and from the host run in stream order, so none needs a wait."""
    host = torch.empty(hidden.shape, dtype=hidden.dtype, pin_memory=True)
    return host.copy_(hidden.detach(), non_blocking=True)


def wrap_layers(layers: nn.ModuleList, *, inputs_on_host: bool, has_randomness: bool) -> None:
    """Replace every decoder layer of a model by its runner, in place."""
    for i, layer in enumerate(layers):
        layers[i] = LayerRunner(layer, inputs_on_host=inputs_on_host, has_randomness=has_randomness)

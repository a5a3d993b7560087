"""A gated MLP that keeps gate and up alone, and differentiates its product in place.

    y = down(act(gate) * up),  act SiLU (SwiGLU) or the tanh approximation of GELU (GeGLU)

Ordinary operations keep act(gate) too, and their backward pass writes three more tensors of that
size before the first is freed: seven are alive, of the intermediate size each. Here act(gate) is
computed again and the gradient of the product becomes that of the gate where it lies: four.

Values and gradients have the bits of the ordinary operations, which do the arithmetic.

Shapes: N tokens (leading dimensions kept), I intermediate size.
Source: Shazeer (arXiv 2002.05202).
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Activation = Literal["silu", "gelu_tanh"]

_ACTIVATIONS: dict[str, Activation] = {
    "SiLUActivation": "silu",
    "SiLU": "silu",
    "GELUTanh": "gelu_tanh",
}


class GatedMlp(nn.Module):
    """The MLP of a decoder layer; it takes the linears of the one whose place it takes.

    Args:
        mlp: Has `down_proj`, and `gate_proj` and `up_proj` or both in one as `gate_up_proj`.
        activation: Of the gate.
    """

    gate_up_proj: nn.Module
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def __init__(self, mlp: nn.Module, activation: Activation) -> None:
        super().__init__()
        self.activation: Activation = activation
        for name in ("gate_up_proj", "gate_proj", "up_proj", "down_proj"):
            if hasattr(mlp, name):
                self.add_module(name, mlp.get_submodule(name))

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., hidden] to [..., hidden]."""
        if hasattr(self, "gate_up_proj"):
            gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(_GatedProduct.apply(gate, up, self.activation))


class _GatedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return _activated(gate, activation).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        grad_up = _activated(gate, ctx.activation).mul_(grad)
        grad.mul_(up)  # the down projection made it for nobody else
        if ctx.activation == "silu":
            torch.ops.aten.silu_backward.grad_input(grad, gate, grad_input=grad)
        else:
            torch.ops.aten.gelu_backward.grad_input(grad, gate, approximate="tanh", grad_input=grad)
        return grad, grad_up, None


def _activated(gate: Tensor, activation: Activation) -> Tensor:
    return F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")


def gate_activation(mlp: nn.Module) -> Activation | None:
    """The activation of an MLP that `GatedMlp` can take the place of, or None."""
    is_gated = hasattr(mlp, "down_proj") and (
        hasattr(mlp, "gate_up_proj") or (hasattr(mlp, "gate_proj") and hasattr(mlp, "up_proj"))
    )
    function = getattr(mlp, "act_fn", None) or getattr(mlp, "activation_fn", None)
    return _ACTIVATIONS.get(type(function).__name__) if is_gated else None

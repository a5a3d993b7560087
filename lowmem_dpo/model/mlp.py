"""A gated MLP that keeps gate and up alone, and differentiates its product in place.

    y = down(act(gate) * up),  act SiLU (SwiGLU) or the tanh approximation of GELU (GeGLU)

Ordinary operations keep act(gate) too, and their backward pass writes three more tensors of that
size before the first is freed: seven are alive, of the intermediate size each. Here act(gate) is
computed again and the gradient of the product becomes that of the gate where it lies: four.

Values and gradients have the bits of the ordinary operations, which do the arithmetic. Any other
activation runs by these.

Shapes: N tokens (leading dimensions kept), I intermediate size.
Source: Shazeer (arXiv 2002.05202).
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lowmem_dpo.model.lora import LoraLinear

Activation = Literal["silu", "gelu_tanh"]

_ACTIVATIONS: dict[str, Activation] = {
    "SiLUActivation": "silu",
    "SiLU": "silu",
    "GELUTanh": "gelu_tanh",
}


class GatedMlp(nn.Module):
    """The MLP of a decoder layer; it takes the parts of the one whose place it takes.

    Args:
        mlp: Has `down_proj`, and `gate_proj` and `up_proj` or both in one as `gate_up_proj`, all
            LoraLinear; and its activation, as `act_fn` or `activation_fn`.
    """

    gate_up_proj: LoraLinear
    gate_proj: LoraLinear
    up_proj: LoraLinear
    down_proj: LoraLinear

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.in_one = hasattr(mlp, "gate_up_proj")
        gates = ("gate_up_proj",) if self.in_one else ("gate_proj", "up_proj")
        for name in (*gates, "down_proj"):
            self.add_module(name, mlp.get_submodule(name))
        self.act_fn = mlp.get_submodule("act_fn" if hasattr(mlp, "act_fn") else "activation_fn")
        self.activation = _ACTIVATIONS.get(type(self.act_fn).__name__)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., hidden] to [..., hidden]."""
        return self.down_proj(self._gated(x))

    def for_gradient(self, x: Tensor) -> Tensor:
        """`forward` for its gradients alone: its values are NaN; see `LoraLinear.for_gradient`."""
        return self.down_proj.for_gradient(self._gated(x))

    def _gated(self, x: Tensor) -> Tensor:
        """act(gate) * up, [..., I]."""
        if self.in_one:
            gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)
        if self.activation is None:
            return self.act_fn(gate) * up
        return _GatedProduct.apply(gate, up, self.activation)


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

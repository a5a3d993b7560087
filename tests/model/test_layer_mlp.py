import functools

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from lowmem_dpo.model.layer import GatedMlp
from lowmem_dpo.model.lora import AdapterSpec, LoraLinear, add_lora, lora_parameters, wrap_linears

HIDDEN, INNER, NUM_TOKENS = 24, 40, 6


class Mlp(nn.Module):
    """As transformers writes it, both projections apart or in one."""

    def __init__(self, act="silu", in_one=False):
        super().__init__()
        torch.manual_seed(0)
        if in_one:
            self.gate_up_proj = nn.Linear(HIDDEN, 2 * INNER, bias=False)
        else:
            self.gate_proj = nn.Linear(HIDDEN, INNER)
            self.up_proj = nn.Linear(HIDDEN, INNER)
        self.down_proj = nn.Linear(INNER, HIDDEN)
        self.act_fn = ACT2FN[act]
        self.requires_grad_(False)
        wrap_linears(self, "layers.0.mlp")
        add_lora(self, AdapterSpec(2, 2.0, 0.0, "all", rank_stabilised=False), seed=0)
        for name, parameter in lora_parameters(self).items():
            if name.endswith("lora_b"):
                nn.init.normal_(parameter)

    def forward(self, x):
        if hasattr(self, "gate_up_proj"):
            gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
            return self.down_proj(up * self.act_fn(gate))
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def gradients(function, mlp, dtype=torch.float32):
    """Output of a function, and gradients of its input and of the adapters of an MLP."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(1, NUM_TOKENS, HIDDEN, generator=generator).to(dtype).requires_grad_()
    out = function(x)
    out.backward(torch.randn(out.shape, generator=generator).to(dtype))
    return [out.detach(), x.grad, *(p.grad for p in lora_parameters(mlp).values())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("in_one", [False, True])
@pytest.mark.parametrize("act", ["silu", "gelu_pytorch_tanh", "relu", "gelu", "gelu_new"])
def test_gated_mlp_has_the_bits_of_the_plain_one(act, in_one, dtype):
    plain, mlp = Mlp(act, in_one), GatedMlp(Mlp(act, in_one))
    assert (mlp.activation is None) == (act not in ("silu", "gelu_pytorch_tanh"))
    want = gradients(plain, plain, dtype)
    assert len(want) == 2 + 2 * (2 if in_one else 3)
    for got, expected in zip(gradients(mlp, mlp, dtype), want, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("act", ["silu", "gelu_new"])
def test_without_values_forward_gives_nan_with_its_gradients(act):
    mlp = GatedMlp(Mlp(act))
    want = gradients(mlp, mlp)
    mlp.zero_grad()
    got = gradients(functools.partial(mlp, needs_values=False), mlp)
    assert got[0].isnan().all() and got[0].shape == want[0].shape
    for ours, expected in zip(got[1:], want[1:], strict=True):
        assert torch.equal(ours, expected)


def test_gated_mlp_keeps_gate_and_up_and_the_inputs_of_its_linears():
    mlp, kept = GatedMlp(Mlp()), {}
    x = torch.randn(1, NUM_TOKENS, HIDDEN, requires_grad=True)

    def keep(tensor):
        kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        mlp(x)
    wide = [t for t in kept.values() if t.shape[-1] == INNER and t.numel() == NUM_TOKENS * INNER]
    assert len(wide) == 3  # gate, up and their product, which the down projection reads


def test_gated_mlp_refuses_an_mlp_without_a_gate():
    plain = nn.Module()
    plain.up_proj, plain.down_proj, plain.act_fn = nn.Identity(), nn.Identity(), ACT2FN["silu"]
    with pytest.raises(AttributeError, match="gate_proj"):
        GatedMlp(plain)


def test_gated_mlp_takes_the_linears_as_they_are():
    mlp = Mlp()
    linears = [m for m in mlp.modules() if isinstance(m, LoraLinear)]
    assert [m for m in GatedMlp(mlp).modules() if isinstance(m, LoraLinear)] == linears

import functools
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from lowmem_dpo.linears.lora import AdapterSpec, LoraLinear, add_lora, lora_parameters, wrap_linears
from lowmem_dpo.model import layer
from lowmem_dpo.model.layer import GatedMlp, mlp_path
from lowmem_dpo_kernels import twins

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


@pytest.fixture
def kernels(monkeypatch):
    """A card that is not there: the plain twin stands for its kernels; the calls are returned."""
    calls, faults = [], {}

    def by_kernel(gate, up, activation):
        calls.append((gate.shape, gate.stride(), gate.dtype, activation))
        out = twins.gated_product(gate, up + faults.get("up", 0) * (up - up.detach()), activation)
        return out * faults.get("value", 1.0)

    module = SimpleNamespace(gated_product=by_kernel)
    monkeypatch.setitem(sys.modules, "lowmem_dpo_kernels.gated_product", module)
    layer._kernels_agree.cache_clear()
    yield SimpleNamespace(calls=calls, faults=faults)
    layer._kernels_agree.cache_clear()


CARD = torch.device("cpu"), torch.bfloat16


@pytest.mark.parametrize("in_one", [False, True])
@pytest.mark.parametrize("act, name", [("silu", "silu"), ("gelu_pytorch_tanh", "gelu_tanh")])
def test_mlp_kernels_are_tried_once_as_the_model_has_them(act, name, in_one, kernels):
    mlps = nn.ModuleList(GatedMlp(Mlp(act, in_one), CARD) for _ in range(2))
    assert all(mlp.by_kernel for mlp in mlps) and mlp_path(mlps) == "triton"
    tried = (70 * 2 * INNER, 2 * INNER, 1) if in_one else (70 * INNER, INNER, 1)
    assert kernels.calls == [((1, 70, INNER), tried, torch.bfloat16, name)]
    x = torch.randn(1, NUM_TOKENS, HIDDEN)
    assert torch.equal(mlps[0](x), GatedMlp(Mlp(act, in_one))(x))
    ((shape, stride, dtype, activation),) = kernels.calls[1:]
    assert (shape, stride[1], dtype) == ((1, NUM_TOKENS, INNER), tried[1], torch.float32)
    assert activation == name


@pytest.mark.parametrize("fault", [{"value": 1.1}, {"up": 0.1}, {"value": torch.nan}], ids=str)
def test_mlp_kernels_that_are_wrong_give_way_to_pytorch(fault, kernels, capsys):
    kernels.faults.update(fault)
    mlp = GatedMlp(Mlp(), CARD)
    assert not mlp.by_kernel and mlp_path(nn.ModuleList([mlp])) == "torch"
    said = capsys.readouterr().out
    assert said.startswith("warning: the MLP's kernels failed their trial on cpu (")
    assert "PyTorch is used" in said
    mlp(torch.randn(1, NUM_TOKENS, HIDDEN))
    assert len(kernels.calls) == 1


def test_mlp_kernels_are_asked_neither_without_leave_nor_for_another_activation(kernels):
    for mlp in (GatedMlp(Mlp()), GatedMlp(Mlp("relu"), CARD)):
        mlp(torch.randn(1, NUM_TOKENS, HIDDEN))
        assert not mlp.by_kernel
    assert not kernels.calls

import functools

import pytest
import torch
from lowmem_dpo.model.fused import FusedRmsNorm, fuse_mlps, fuse_norms, tile_layers
from lowmem_dpo.model.runner import wrap_layers
from torch import nn

from lowmem_dpo.machine.trial import passes_trial
from lowmem_dpo.model import fused
from lowmem_dpo.model.lora import LoraLinear, add_lora, lora_parameters, wrap_linears
from lowmem_dpo_kernels import rms_norm
from tests.tiny import FAMILIES, tiny_model

NUM_TOKENS = 20
HAS_NO_RMS_NORM = {"cohere", "cohere2"}


def make_model(family):
    """A tiny model with a live adapter on every linear and norms that are not ones."""
    model = tiny_model(family).requires_grad_(False)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.add_(0.2 * torch.randn_like(parameter))
    wrap_linears(model.model.layers, "model.layers")
    add_lora(model, targets="all", rank=3, alpha=6, dropout=0, rank_stabilised=False, seed=0)
    for name, parameter in lora_parameters(model).items():
        if name.endswith("lora_b"):
            nn.init.normal_(parameter, std=0.1)
    return model


def gradients(model):
    """Hidden states, and the gradient of every adapter matrix."""
    ids = torch.arange(NUM_TOKENS)[None] + 30
    embeddings = model.model.embed_tokens(ids).requires_grad_()
    hidden = model.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
    upstream = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(3))
    (hidden * upstream).sum().backward()
    parameters = lora_parameters(model)
    return {"hidden": hidden.detach(), **{name: p.grad for name, p in parameters.items()}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - HAS_NO_RMS_NORM))
def test_fused_norms_have_the_bits_of_their_family(family, dtype):
    norms = {
        name: module
        for name, module in make_model(family).to(dtype).named_modules()
        if type(module).__name__.endswith("RMSNorm")
    }
    model = make_model(family).to(dtype)
    assert fuse_norms(model.model) == len(norms) > 0
    for name, norm in norms.items():
        replaced = model.get_submodule(name)
        assert isinstance(replaced, FusedRmsNorm)
        x = (3 * torch.randn(40, len(norm.weight))).to(dtype)
        assert torch.equal(replaced(x), norm(x))


@pytest.mark.parametrize("tile_rows", [7, 64])
@pytest.mark.parametrize("family", FAMILIES)
def test_fused_layers_give_the_plain_outputs_and_gradients(family, tile_rows):
    want = gradients(make_model(family))
    model = make_model(family)
    fuse_norms(model.model)
    assert fuse_mlps(model.model.layers) == 2
    assert tile_layers(model.model.layers, has_randomness=False, tile_rows=tile_rows) == 2
    wrap_layers(model.model.layers, inputs_on_host=False, has_randomness=False)
    got = gradients(model)
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert (got[name] - tensor).norm() <= 1e-5 * tensor.norm(), name


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_tiled_layers_compute_each_product_as_often_as_needed(family, monkeypatch):
    """Forward, for the gradient of what it feeds, and for the gradient of its input."""
    counts = {}
    dense_weight = LoraLinear.dense_weight

    def count(self, dtype):
        name = self.name.rpartition(".")[2]
        counts[name] = counts.get(name, 0) + 1
        return dense_weight(self, dtype)

    monkeypatch.setattr(LoraLinear, "dense_weight", count)
    model = make_model(family)
    tile_layers(model.model.layers, has_randomness=False)
    wrap_layers(model.model.layers, inputs_on_host=False, has_randomness=False)
    gradients(model)
    num_layers = 2
    assert counts["gate_proj"] == counts["up_proj"] == counts["o_proj"] == 3 * num_layers
    # Gemma's last norm reads what comes out, Llama's residual does not.
    assert counts["down_proj"] == (2 if family == "llama" else 3) * num_layers


def test_unknown_layers_and_norms_stay_as_they_are():
    class NewRMSNorm(nn.Module):
        pass

    layers = nn.ModuleList([nn.ModuleDict({"norm": NewRMSNorm(), "mlp": nn.Linear(4, 4)})])
    assert fuse_norms(layers) == 0
    assert fuse_mlps(layers) == 0
    assert tile_layers(layers, has_randomness=False) == 0
    assert isinstance(layers[0]["norm"], NewRMSNorm)


@pytest.mark.parametrize("is_right", [True, False])
def test_norm_kernels_are_tried_before_they_are_used(is_right, monkeypatch, caplog):
    """A card that is not there: PyTorch stands for its kernels, and is wrong by a tenth or not."""

    def by_kernel(x, weight, rule, *, implementation):
        assert implementation == "triton"
        return rms_norm(x, weight, rule) * (1.0 if is_right else 1.1)

    monkeypatch.setattr(fused, "rms_norm", by_kernel)
    trial = functools.partial(fused._try_norm_kernels, torch.device("cpu"), torch.float32)
    assert passes_trial(trial, "the norms' kernels", torch.device("cpu"), "PyTorch") == is_right
    assert ("the norms' kernels failed their trial" in caplog.text) != is_right


def test_norms_run_by_pytorch_without_a_card():
    assert fused.norm_implementation(torch.device("cpu"), torch.bfloat16) == "torch"

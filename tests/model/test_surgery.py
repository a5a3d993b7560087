from dataclasses import replace

import pytest
import torch
from torch import nn

from lowmem_dpo.linears.lora import AdapterSpec, lora_layers, wrap_linears
from lowmem_dpo.linears.nf4 import quantize_nf4
from lowmem_dpo.memory.levers import Levers
from lowmem_dpo.model import surgery
from lowmem_dpo.model.attention import TREE_ATTENTION
from lowmem_dpo.model.head import HostHead, Int8Head
from lowmem_dpo.model.language_model import LanguageModel, StorageRow
from lowmem_dpo.model.layer import DecoderLayer, mlp_path
from lowmem_dpo.model.scoring import other_attention
from lowmem_dpo.model.surgery import FusedRmsNorm, norm_path, prepare_model
from tests.tiny import FAMILIES, tiny_model

ADAPTER = AdapterSpec(rank=4, alpha=8.0, dropout=0.0, targets="all", rank_stabilised=False)
IDS = torch.arange(30, 50)[None]


def loaded(family="llama", dtype=torch.float32):
    """As `weights.loading` leaves a model."""
    network = tiny_model(family).requires_grad_(False).to(dtype)
    wrap_linears(network.model.layers, "model.layers")
    return LanguageModel.of(network, "tiny", [StorageRow("head", 1, "float32", 0)])


def hidden_states(network):
    with torch.no_grad():
        return network.model(IDS, use_cache=False).last_hidden_state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_prepare_model_changes_no_bit_of_what_transformers_computes(family, dtype):
    plain = tiny_model(family).to(dtype)
    model = prepare_model(loaded(family, dtype), ADAPTER)
    with other_attention(model, model.family.plain_attention):
        plain.set_attn_implementation(model.family.plain_attention)
        assert torch.equal(hidden_states(model.network), hidden_states(plain))


@pytest.mark.parametrize("name", ["", "head", "attention", "norms", "nf4", "mlp"])
def test_prepare_model_leaves_out_the_kernels_that_it_may_not_use(name, monkeypatch):
    """Every kernel passes its trial here, so the allowed ones are those that would run."""
    monkeypatch.setattr(surgery, "norm_implementation", lambda *_: "triton")
    monkeypatch.setattr(surgery, "runs_triton", lambda device: True)
    monkeypatch.setattr("lowmem_dpo.model.layer._kernels_agree", lambda *_: True)
    monkeypatch.setattr(surgery, "with_tried_head_kernels", lambda model: model)
    model = loaded()
    linear = model.layers[0].self_attn.q_proj
    weight = quantize_nf4(linear.weight)
    del linear.weight
    linear.weight = weight
    model = prepare_model(model, ADAPTER, kernels=[name] if name else [])
    assert (model.head_implementation == "auto") == (name == "head")
    assert (norm_path(model.backbone) == "triton") == (name == "norms")
    assert weight.may_use_kernel == (name == "nf4")
    assert (mlp_path(model.backbone) == "triton") == (name == "mlp")
    by_kernel = model.config._attn_implementation == TREE_ATTENTION
    assert by_kernel == (name == "attention")


def test_tree_attention_by_torch_asks_no_kernel_and_outlives_a_check(monkeypatch):
    monkeypatch.setattr(surgery, "with_tried_head_kernels", lambda model: model)
    model, usual = prepare_model(loaded(), kernels=[]), prepare_model(loaded())
    monkeypatch.setattr("lowmem_dpo.model.attention._kernel_path", pytest.fail)
    with other_attention(model, "sdpa"):
        pass
    layout = {"inputs_embeds": torch.randn(1, 20, 64), "tree_layout": ((0, 9, 6, 5),)}
    layout |= {"position_ids": torch.arange(20)[None], "use_cache": False}
    found = model.backbone(**layout).last_hidden_state
    monkeypatch.undo()
    assert torch.equal(found, usual.backbone(**layout).last_hidden_state)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_prepare_model_replaces_layers_and_norms_and_sets_attention(dropout):
    adapter = replace(ADAPTER, targets=["q_proj"], dropout=dropout)
    model = prepare_model(loaded(), adapter, head_kernel="torch")
    assert all(isinstance(layer, DecoderLayer) for layer in model.layers)
    assert all(layer.has_dropout == (dropout > 0) for layer in model.layers)
    assert not any(layer.inputs_on_host for layer in model.layers)
    norms = [m for n, m in model.network.named_modules() if "norm" in n.rpartition(".")[2]]
    norms = [norm for norm in norms if not isinstance(norm, nn.Identity)]  # where there is none
    assert len(norms) == 5 and all(isinstance(norm, FusedRmsNorm) for norm in norms)
    assert model.config._attn_implementation == TREE_ATTENTION
    assert list(lora_layers(model.network)) == [
        f"model.layers.{i}.self_attn.q_proj" for i in range(2)
    ]
    trained = {name for name, p in model.network.named_parameters() if p.requires_grad}
    assert {name.rpartition(".")[2] for name in trained} == {"lora_a", "lora_b"}
    assert model.head_implementation == "torch"


def test_prepare_model_tries_the_head_that_it_has_put_in(monkeypatch):
    def trial(model):
        assert isinstance(model.head_weight, Int8Head) and model.head_implementation == "auto"
        return replace(model, head_implementation="torch")

    monkeypatch.setattr(surgery, "with_tried_head_kernels", trial)
    before = loaded()
    model = prepare_model(before, ADAPTER, head_quantization="int8")
    assert model.head_implementation == "torch"
    assert model.identity != before.identity
    assert model.storage[0].format.startswith("int8")


def test_prepare_model_moves_the_head_to_the_host():
    model = prepare_model(loaded(), ADAPTER, Levers(head_on_host=True, inputs_on_host=True))
    assert isinstance(model.head_weight, HostHead)
    assert all(layer.inputs_on_host for layer in model.layers)


def test_prepare_model_without_an_adapter_leaves_nothing_to_train():
    model = prepare_model(loaded())
    assert not lora_layers(model.network) and not any(layer.has_dropout for layer in model.layers)
    assert not [p for p in model.network.parameters() if p.requires_grad]

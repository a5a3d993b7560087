import pytest
import torch
from torch import nn

from lowmem_dpo.model import surgery
from lowmem_dpo.model.families import FAMILIES as RECORDS
from lowmem_dpo.model.surgery import FusedRmsNorm, replace_norms
from lowmem_dpo_kernels import NormKind, rms_norm
from tests.model.test_layer import adapted_model
from tests.tiny import FAMILIES

HAS_RMS_NORM = [
    name for name, changes in FAMILIES.items() if RECORDS[changes["model_type"]].rms_norm
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", HAS_RMS_NORM)
def test_replaced_norms_have_the_bits_of_their_family(family, dtype):
    plain = {
        name: module
        for name, module in adapted_model(family).to(dtype).named_modules()
        if type(module).__name__.endswith("RMSNorm")
    }
    model = adapted_model(family).to(dtype)
    assert replace_norms(model.model, RECORDS[model.config.model_type]) == len(plain) > 0
    for name, norm in plain.items():
        replaced = model.get_submodule(name)
        assert isinstance(replaced, FusedRmsNorm)
        x = (3 * torch.randn(40, len(norm.weight))).to(dtype)
        assert torch.equal(replaced(x), norm(x))


def test_norms_of_another_class_stay_as_they_are():
    class NewRMSNorm(nn.Module):
        pass

    layers = nn.ModuleList([NewRMSNorm(), nn.LayerNorm(4)])
    for family in RECORDS.values():
        assert replace_norms(layers, family) == 0
    assert [type(layer) for layer in layers] == [NewRMSNorm, nn.LayerNorm]


CASE = torch.device("cpu"), torch.float32, 96, NormKind(1e-6, 1.0, False)


@pytest.mark.parametrize("is_right", [True, False])
def test_norm_kernels_are_tried_as_the_model_has_them(is_right, monkeypatch, capsys):
    """A card that is not there: PyTorch stands for its kernels, and is wrong by a tenth or not."""

    def by_kernel(x, weight, rule, *, implementation):
        assert implementation == "triton"
        assert x.shape[-1] == 96 and rule == CASE[3]
        return rms_norm(x, weight, rule) * (1.0 if is_right else 1.1)

    monkeypatch.setattr(surgery, "rms_norm", by_kernel)
    monkeypatch.setattr(surgery, "runs_triton", lambda device: True)
    surgery.norm_implementation.cache_clear()
    assert surgery.norm_implementation(*CASE) == ("triton" if is_right else "torch")
    surgery.norm_implementation.cache_clear()
    assert ("the norms' kernels failed their trial" in capsys.readouterr().out) != is_right


def test_norms_run_by_pytorch_without_a_card_and_where_their_kernel_is_left_out(monkeypatch):
    assert surgery.norm_implementation(*CASE) == "torch"
    monkeypatch.setattr(surgery, "norm_implementation", lambda *_: "triton")
    model = adapted_model("llama")
    assert surgery.norm_path(model.model) == "torch"
    replace_norms(model.model, RECORDS["llama"])
    assert surgery.norm_path(model.model) == "triton"
    model = adapted_model("llama")
    replace_norms(model.model, RECORDS["llama"], may_use_kernel=False)
    assert surgery.norm_path(model.model) == "torch"

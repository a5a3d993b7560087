import functools

import pytest
import torch
from torch import nn

from lowmem_dpo.machine.device import passes_trial
from lowmem_dpo.model import surgery
from lowmem_dpo.model.families import FAMILIES as RECORDS
from lowmem_dpo.model.surgery import FusedRmsNorm, replace_norms
from lowmem_dpo_kernels import rms_norm
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


@pytest.mark.parametrize("is_right", [True, False])
def test_norm_kernels_are_tried_before_they_are_used(is_right, monkeypatch, capsys):
    """A card that is not there: PyTorch stands for its kernels, and is wrong by a tenth or not."""

    def by_kernel(x, weight, rule, *, implementation):
        assert implementation == "triton"
        return rms_norm(x, weight, rule) * (1.0 if is_right else 1.1)

    monkeypatch.setattr(surgery, "rms_norm", by_kernel)
    trial = functools.partial(surgery._try_norm_kernels, torch.device("cpu"), torch.float32)
    assert passes_trial(trial, "the norms' kernels", torch.device("cpu"), "PyTorch") == is_right
    assert ("the norms' kernels failed their trial" in capsys.readouterr().out) != is_right


@pytest.mark.parametrize("is_wrong", [(0.0, True), (0.0, False), (1.0, False)], ids=str)
def test_the_norm_of_every_family_is_tried(is_wrong, monkeypatch):
    def by_kernel(x, weight, rule, *, implementation):
        fault = (rule.offset, rule.rounds_first) == is_wrong
        return rms_norm(x, weight, rule) * (1.1 if fault else 1.0)

    monkeypatch.setattr(surgery, "rms_norm", by_kernel)
    with pytest.raises(ValueError, match="value at 128: relative error 1"):
        surgery._try_norm_kernels(torch.device("cpu"), torch.float32)


def test_norms_run_by_pytorch_without_a_card():
    assert surgery.norm_implementation(torch.device("cpu"), torch.bfloat16) == "torch"

"""Whole models with the attention kernels, on the CPU. Needs TRITON_INTERPRET=1.

`test_attention.py` starts it, in the process that all such files share.
"""

import pytest
import torch

import lowmem_dpo.model.attention as model_attention
from lowmem_dpo.linears.lora import lora_parameters
from lowmem_dpo.settings.configs import TrainConfig
from lowmem_dpo.tokens.trees import build_tree
from tests.model.test_scoring import packed_loss, take_gradients, token_pairs
from tests.policies import policy_for
from tests.tiny import save_tiny_model


@pytest.fixture
def kernel_calls(monkeypatch):
    """Let the kernels run where they would on a card; counts the calls."""
    calls = []
    kernel = model_attention.lowmem_dpo_kernels.tree_attention

    def counted(*arguments, **settings):
        calls.append(settings)
        return kernel(*arguments, **settings)

    monkeypatch.setattr(model_attention.lowmem_dpo_kernels, "tree_attention", counted)
    return calls


@pytest.mark.parametrize("family", ["gemma2", "phi3"])
def test_model_with_kernels_equals_the_portable_path(family, tmp_path, monkeypatch, kernel_calls):
    """Loss and adapter gradients, under windows and soft-caps, with views of a fused product."""
    directory = save_tiny_model(tmp_path / "model", family)
    policy = policy_for(
        TrainConfig(model=str(directory), dtype="float32", quantization="none", device="cpu")
    )
    for name, parameter in lora_parameters(policy.model.network).items():
        if name.endswith("lora_b"):  # or lora_a would have no gradient to compare
            torch.nn.init.normal_(parameter, std=0.05)
    trees = [build_tree(pair) for pair in token_pairs()[:2]]

    wanted_loss, wanted = packed_loss(policy, trees, 64), take_gradients(policy)
    assert not kernel_calls
    monkeypatch.setattr(model_attention, "tree_attention_path", lambda *_: "triton")
    monkeypatch.setattr(model_attention, "_kernels_agree", lambda *_: True)
    loss, gradients = packed_loss(policy, trees, 64), take_gradients(policy)
    assert len(kernel_calls) >= 4  # two layers, forth and back
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    for name, gradient in gradients.items():
        error = (gradient - wanted[name]).norm() / wanted[name].norm()
        assert error < 2e-5, (name, error)
    if family == "gemma2":
        assert [c["sliding_window"] for c in kernel_calls[:2]] == [8, None]
        assert all(c["softcap"] == 2.0 for c in kernel_calls)


def test_the_kernels_pass_their_trial():
    variant = model_attention.Variant(4, 2, 16, True, True)
    model_attention._try_kernels(torch.device("cpu"), torch.float32, variant)

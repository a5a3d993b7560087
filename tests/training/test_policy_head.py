"""Settings of the head, where config.json and the files say different things of it."""

import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lowmem_dpo.model import surgery
from lowmem_dpo.model.scoring import other_attention
from lowmem_dpo.settings.configs import TrainConfig
from lowmem_dpo.settings.groups import MemorySettings, ModelSettings
from lowmem_dpo.trainer import Trainer
from lowmem_dpo.training import policy
from lowmem_dpo.training.policy import load_policy, read_source, stored_config
from lowmem_dpo.weights.folders import load_config
from tests.tiny import save_tiny_model

IDS = torch.arange(24).view(2, 12)


def settings(model: Path | str, **changes) -> ModelSettings:
    return ModelSettings(model=str(model), device="cpu", quantization="none", **changes)


@pytest.fixture
def tied(tmp_path) -> Path:
    return save_tiny_model(tmp_path / "model", "llama-tied")


def store_head(folder: Path, change) -> None:
    """Store a head beside the embedding, made of it."""
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = change(tensors["model.embed_tokens.weight"])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def another(weight: torch.Tensor) -> torch.Tensor:
    return torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * 0.2


@torch.no_grad()
def test_own_head_of_a_model_that_config_json_calls_tied_is_quantised(tied):
    store_head(tied, another)
    theirs = AutoModelForCausalLM.from_pretrained(tied, dtype=torch.float32)
    head = theirs.lm_head.weight
    assert not torch.equal(head, theirs.model.embed_tokens.weight)
    scales = head.abs().amax(1, keepdim=True) / 127
    head.copy_((head / scales).round() * scales)
    model = load_policy(settings(tied, head_quantization="int8")).model
    with other_attention(model, "eager"):
        ours = model.network(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(ours, theirs(IDS).logits, rtol=0, atol=2e-5)


def test_stored_config_tells_of_a_head_of_its_own_alone(tied):
    config = load_config(str(tied))
    assert stored_config(str(tied), config) is config
    assert stored_config("some/model", config) is config  # whose files may not be here
    store_head(tied, another)
    assert stored_config(str(tied), config).tie_word_embeddings is False
    assert config.tie_word_embeddings is True


def test_dense_head_is_gone_before_kernels_are_tried(tmp_path, monkeypatch):
    folder = save_tiny_model(tmp_path / "model", "llama")
    load, tried, dense, held = policy.load_model, surgery.with_tried_head_kernels, [], []

    def loading(*arguments, **options):
        model = load(*arguments, **options)
        dense.append(weakref.ref(model.network.lm_head.weight))
        return model

    def looking(model):
        held.append(dense[0]() is not None)
        return tried(model)

    monkeypatch.setattr(policy, "load_model", loading)
    monkeypatch.setattr(surgery, "with_tried_head_kernels", looking)
    load_policy(settings(folder, head_quantization="int8"))
    assert held == [False]


@pytest.mark.parametrize("stored", ["no head", "an equal head", "the head alone"])
def test_head_that_is_the_embedding_is_not_quantised_whatever_is_stored(tied, stored):
    if stored != "no head":
        store_head(tied, torch.clone)
    if stored == "the head alone":
        tensors = load_file(tied / "model.safetensors")
        del tensors["model.embed_tokens.weight"]
        save_file(tensors, tied / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"head is its embedding.*head_quantization out$"):
        read_source(settings(tied, head_quantization="int8"))


def test_head_in_host_memory_is_judged_by_the_files_too(tied):
    config = load_config(str(tied))
    asked = (str(tied), config, settings(tied), MemorySettings(head_weight="host"))
    with pytest.raises(ValueError, match="leave head_weight out"):
        policy._check_head(*asked)
    store_head(tied, another)
    policy._check_head(*asked)


def test_head_of_an_id_is_judged_by_config_json_before_any_download(tied, monkeypatch):
    monkeypatch.setattr(policy, "load_config", lambda *arguments: load_config(str(tied)))
    monkeypatch.setattr(policy, "check_download", lambda *a: pytest.fail("asked for weights"))
    with pytest.raises(ValueError, match="head_quantization out; where org/name stores one of"):
        read_source(settings("org/name", head_quantization="int8"))


def test_run_with_a_quantised_own_head_has_an_exact_step_zero(tied, pairs_file, tmp_path, capsys):
    store_head(tied, another)
    config = TrainConfig(
        model=str(tied),
        data=str(pairs_file(6)),
        output_dir=str(tmp_path / "out"),
        head_quantization="int8",
        device="cpu",
        batch_size=3,
        max_steps=1,
        save_strategy="no",
    )
    for name in ("out", "again"):  # the second start reads the quantised copy
        Trainer(replace(config, output_dir=str(tmp_path / name))).fit()
        printed = capsys.readouterr().out
        assert "every margin is exactly 0" in printed and "int8, a scale a row" in printed
        assert printed.count("stores a head of its own, which is used") == 1
    assert "read from its quantised copy" in printed

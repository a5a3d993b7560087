import json
from dataclasses import replace

import pytest
import torch

from lowmem_dpo import TrainConfig, Trainer
from lowmem_dpo.model import surgery
from lowmem_dpo.model.head import Int8Head
from lowmem_dpo.pipeline.generate import generate
from lowmem_dpo.settings.configs import GenerateConfig
from lowmem_dpo.settings.groups import ModelSettings
from lowmem_dpo.training import policy
from lowmem_dpo.training.policy import load_policy, read_source
from tests.policies import policy_for
from tests.tiny import save_tiny_model

pytestmark = pytest.mark.usefixtures("without_plots")


def test_read_source_warns_of_an_adapter_trained_on_another_base(llama_dir, tmp_path, capsys):
    base = TrainConfig(model=str(llama_dir), device="cpu", quantization="none")
    policy_for(base).save(tmp_path / "a")
    capsys.readouterr()
    read_source(base, init_adapter=str(tmp_path / "a"))
    assert "warning" not in capsys.readouterr().out
    generate(
        GenerateConfig(
            adapter=str(tmp_path / "a"),
            prompt="a",
            max_new_tokens=1,
            device="cpu",
            dtype="bfloat16",
        )
    )
    printed = " ".join(capsys.readouterr().out.split())
    assert (
        "trained with quantization none, dtype float32, this run has quantization nf4, dty"
        in printed
    )


def test_runs_with_a_quantised_head_have_an_exact_step_zero(llama_dir, pairs_file, tmp_path):
    config = TrainConfig(
        model=str(llama_dir),
        data=str(pairs_file(6)),
        output_dir=str(tmp_path / "out"),
        head_quantization="int8",
        device="cpu",
        batch_size=3,
        max_steps=1,
        save_strategy="no",
    )
    Trainer(config).fit()
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["step_zero"]["exact"]
    assert record["numerics"]["head"].startswith("torch,")


def test_fingerprint_names_all_that_can_move_a_last_bit(llama_dir, monkeypatch):
    wanted = policy_for(TrainConfig(model=str(llama_dir), device="cpu"))
    found = wanted.fingerprint(448)
    assert found.keys() == {
        "device",
        "threads",
        "dtype",
        "pack_tokens",
        "head",
        "kernels",
        "attention",
        "norms",
        "tile_rows",
        "matmul_precision",
        "torch",
        "triton",
        "transformers",
        "bitsandbytes",
    }
    assert found["head"].startswith("torch, blocks of ")
    assert (found["attention"], found["pack_tokens"]) == ("lowmem_dpo_tree", 448)
    wanted = replace(wanted, model=replace(wanted.model, head_implementation="triton"))
    assert wanted.fingerprint(448)["head"].startswith("triton, blocks of ")
    settings = {"cublas_workspace_config": ":16:8"}
    monkeypatch.setattr(policy, "matmul_settings", lambda: settings)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "RTX")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(policy, "joins_products", lambda *arguments: False)
    card = replace(wanted.model, device=torch.device("cuda"))
    on_card = replace(wanted, model=card).fingerprint(448)
    assert on_card.keys() == found.keys() | settings.keys() | {"mlp"}
    assert (on_card["device"], on_card["mlp"]) == ("RTX", "torch")
    monkeypatch.setattr(policy, "joins_products", lambda *arguments: True)
    joined = replace(wanted, model=card).fingerprint(448)
    assert joined == on_card | {"joined_products": True}
    monkeypatch.setattr(policy, "attention_path", lambda *arguments: "lowmem_dpo_tree, triton")
    assert wanted.fingerprint(448)["attention"] == "lowmem_dpo_tree, triton"


def test_load_policy_takes_torchs_products_where_the_heads_kernels_fail(llama_dir, monkeypatch):
    monkeypatch.setattr(
        surgery,
        "with_tried_head_kernels",
        lambda model: replace(model, head_implementation="torch"),
    )
    made = policy_for(TrainConfig(model=str(llama_dir), device="cpu"))
    assert made.model.head_implementation == "torch"


def test_policies_with_another_head_are_another_model(llama_dir):
    none, int8 = (
        load_policy(TrainConfig(model=str(llama_dir), device="cpu", head_quantization=method))
        for method in ("none", "int8")
    )
    assert none.identity != int8.identity


@pytest.mark.parametrize(
    ("family", "scale", "softcap"), [("gemma2", 1.0, 5.0), ("cohere", 0.3, None)]
)
def test_the_rule_of_the_logits_is_part_of_the_identity(tmp_path, family, scale, softcap):
    model = save_tiny_model(tmp_path / "model", family)
    identity = load_policy(ModelSettings(model=str(model), device="cpu")).identity
    assert (identity["logit_scale"], identity["logit_softcap"]) == (scale, softcap)


def test_generate_uses_a_quantised_head(llama_dir, monkeypatch):
    used = []
    forward = Int8Head.forward
    monkeypatch.setattr(
        Int8Head, "forward", lambda self, hidden: used.append(1) or forward(self, hidden)
    )
    generate(
        GenerateConfig(
            model=str(llama_dir),
            prompt="a",
            max_new_tokens=2,
            temperature=0.0,
            top_p=0.95,
            device="cpu",
            head_quantization="int8",
        )
    )
    assert used


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"head_weight": "host"}, "head_weight host has no effect on cpu"),
        ({"head_kernel": "fused"}, "head_kernel: implementation fused needs CUDA, got cpu"),
        ({"kernels": "off"}, r"kernels \['off'\] has no effect on cpu; leave it out"),
    ],
)
def test_read_source_refuses_heads_that_cannot_be(llama_dir, settings, message):
    with pytest.raises(ValueError, match=message):
        config = TrainConfig(model=str(llama_dir), device="cpu", **settings)
        read_source(config, config)


def test_read_source_refuses_to_quantise_a_tied_head(tmp_path):
    model = save_tiny_model(tmp_path / "model", "llama-tied")
    with pytest.raises(ValueError, match=r"head_quantization int8 cannot be: .* leave"):
        read_source(TrainConfig(model=str(model), device="cpu", head_quantization="int8"))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, []),
        ({"lora_target_modules": ["v_proj", "q_proj"]}, []),
        ({"lora_target_modules": ["q_proj"]}, ["lora_target_modules"]),
        ({"lora_r": 8, "lora_target_modules": ["q_proj"]}, ["lora_r", "lora_target_modules"]),
    ],
)
def test_settings_that_a_starting_adapter_overrides_are_said(
    llama_dir, tmp_path, capsys, settings, said
):
    config = TrainConfig(
        model=str(llama_dir), cache_dir=str(tmp_path / "cache"), quantization="none"
    )
    shape = {"lora_target_modules": ["q_proj", "v_proj"]}
    policy_for(replace(config, **shape)).save(tmp_path / "start")
    capsys.readouterr()
    policy_for(replace(config, init_adapter=str(tmp_path / "start"), **settings))
    warnings = [line for line in capsys.readouterr().out.splitlines() if "no effect" in line]
    assert [line.split(": ")[1] for line in warnings] == said

import dataclasses

import pytest

from lowmem_dpo.settings.configs import GenerateConfig, PlanConfig, TrainConfig
from lowmem_dpo.settings.fields import parse_config, to_yaml


@pytest.mark.parametrize(
    "given, allowed",
    [
        ("auto", {"head", "attention", "norms", "nf4", "mlp"}),
        ("off", set()),
        ("norms,head", {"head", "norms"}),
        ("[nf4]", {"nf4"}),
    ],
)
def test_kernels_are_read_alike_from_words_and_yaml(given, allowed, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(f"kernels: {given}\n")
    config = TrainConfig.from_yaml(path)
    assert config.allowed_kernels == allowed
    assert parse_config(GenerateConfig, ["--kernels", given]).allowed_kernels == allowed
    path.write_text(to_yaml(config))
    assert TrainConfig.from_yaml(path) == config


@pytest.mark.parametrize("given", ["attn", "off,head", "auto,nf4"])
def test_kernels_that_are_not_there_are_refused(given):
    with pytest.raises(ValueError, match="kernels must be auto, off, or of head, attention"):
        parse_config(TrainConfig, ["--kernels", given])


def test_warmup_settings_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match=r"warmup_ratio=0\.2 has no effect with warmup_steps=5"):
        TrainConfig(warmup_steps=5, warmup_ratio=0.2)
    with pytest.raises(ValueError, match="warmup_steps=5 has no effect with lr_scheduler_type"):
        TrainConfig(warmup_steps=5, lr_scheduler_type="constant")


@pytest.mark.parametrize("config", [TrainConfig, GenerateConfig, PlanConfig])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"memory_limit": "much"}, "memory_limit must be a size"),
        ({"layer_weights": "host", "quantization": "none", "quantized_copy": True}, "is for NF4"),
        ({"head_weight": "host", "head_quantization": "int8"}, "keeps the head on the device"),
        ({"embedding_weight": "disk"}, "must be one of auto, device, host"),
    ],
)
def test_places_in_memory_are_checked_alike_for_every_use_of_a_model(config, settings, message):
    with pytest.raises(ValueError, match=message):
        config(**settings)


def test_what_only_answers_has_no_settings_of_a_step():
    names = {field.name for field in dataclasses.fields(GenerateConfig)}
    assert {"memory_limit", "layer_weights", "embedding_weight", "head_weight"} <= names
    assert not {"pack_tokens", "keep_activations", "layer_inputs", "head_kernel"} & names

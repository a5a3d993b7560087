import pytest
from transformers import LlamaConfig, Qwen3Config

from lowmem_dpo.weights.folders import load_config
from lowmem_dpo.weights.loading import load_model
from lowmem_dpo.weights.size import ModelSize
from tests.tiny import FAMILIES, save_tiny_model, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_model_size_counts_what_the_model_has(family):
    model = tiny_model(family)
    size = ModelSize.of(model.config)
    assert size.total == sum(parameter.numel() for parameter in model.parameters())
    assert size.head == model.lm_head.weight.numel()
    named = model.model.layers.named_parameters()
    matrices = [p for name, p in named if name.endswith("proj.weight")]
    assert size.linears == sum(matrix.numel() for matrix in matrices)
    assert size.forward_flops(10) == 20 * (size.linears + size.head)


def test_model_size_of_known_models():
    llama = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    size = ModelSize.of(llama)
    assert size.total == 8_030_261_248 and size.is_large_for_a_cpu
    assert 5.8e9 < size.nf4_bytes < 6.1e9
    small = Qwen3Config(
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        tie_word_embeddings=True,
    )
    assert ModelSize.of(small).total == 596_049_920
    assert not ModelSize.of(small).is_large_for_a_cpu


def test_nf4_bytes_leave_room_for_the_quantised_model(tmp_path):
    folder = str(save_tiny_model(tmp_path / "m", hidden_size=256, intermediate_size=512))
    config = load_config(folder)
    loaded = load_model(folder, config=config, quantization="nf4", dtype=config.dtype, device="cpu")
    stored = sum(row.nbytes for row in loaded.storage if row.kind != "rotary tables")
    float32_surplus = 2 * (ModelSize.of(config).total - ModelSize.of(config).linears)
    assert stored - float32_surplus <= ModelSize.of(config).nf4_bytes <= 1.1 * stored

import pytest
import torch
from transformers import AutoModelForCausalLM as Auto
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

CONFIGS = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}


@pytest.fixture
def tiny_checkpoint(tmp_path):
    """Write a small random checkpoint as transformers does; gives its folder and the model."""

    def write(family="llama", *, name="base", dtype=torch.float32, shards=False, **changes):
        settings = SIZES | ({"sliding_window": None} if family == "mistral" else {}) | changes
        torch.manual_seed(0)
        model = Auto.from_config(CONFIGS[family](**settings)).to(dtype).eval()
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if "norm" in parameter_name or parameter_name.endswith("bias"):
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(tmp_path / name, **({"max_shard_size": "20KB"} if shards else {}))
        return tmp_path / name, model

    return write

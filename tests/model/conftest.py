import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.tiny import FAMILIES

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
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


@pytest.fixture
def tiny_checkpoint(tmp_path):
    """Write a small random checkpoint as transformers does; gives its folder and the model."""

    def write(family="llama", *, name="base", dtype=torch.float32, shards=False, **changes):
        config = AutoConfig.for_model(**SIZES | FAMILIES[family] | changes)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if "norm" in parameter_name or parameter_name.endswith("bias"):
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(tmp_path / name, **({"max_shard_size": "20KB"} if shards else {}))
        return tmp_path / name, model

    return write

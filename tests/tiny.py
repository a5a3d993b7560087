"""Random-weight models of every supported family, small enough for a test, as checkpoints."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from lowmem_dpo.pipeline.byte_tokenizer import CHAT_TEMPLATE, byte_tokenizer

FAMILIES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama-tied": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16, "tie_word_embeddings": True}),
}


def tiny_model(family: str, seed: int = 0, **changes: Any) -> Any:
    """A random model in fp32; biases get random values too, so that a dropped one shows."""
    config_class, model_class, extra = FAMILIES[family]
    settings = {
        "vocab_size": len(byte_tokenizer()),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": byte_tokenizer().eos_token_id,
        "pad_token_id": None,
    }
    torch.manual_seed(seed)
    model = model_class(config_class(**{**settings, **extra, **changes}))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def save_tiny_model(
    directory: Path,
    family: str = "llama",
    *,
    chat_template: str | None = CHAT_TEMPLATE,
    seed: int = 0,
    **changes: Any,
) -> Path:
    """Write a checkpoint with its tokenizer; returns the folder."""
    tiny_model(family, seed, **changes).save_pretrained(directory)
    byte_tokenizer(chat_template=chat_template).save_pretrained(directory)
    return directory

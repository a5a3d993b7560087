"""Random-weight models of every supported family, small enough for a test, as checkpoints.

torch and transformers are imported by the functions, so that a test may import this without them.
"""

from pathlib import Path
from typing import Any

WINDOW = 8  # shorter than the tests' sequences
_LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.2, 1.4, 1.6],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
    "original_max_position_embeddings": 256,
    "partial_rotary_factor": 0.5,
}

# Every tiny model has these sizes, whatever its family's own defaults are. Rows are whole blocks of
# NF4: bitsandbytes' own CPU kernel is wrong where blocks straddle rows.
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}

# What each family can do that others cannot, in values that matter at this size.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "mistral-window": {"model_type": "mistral", "sliding_window": WINDOW},
    "qwen2": {"model_type": "qwen2"},
    "qwen2-window": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": True},
    "gemma2": {
        "model_type": "gemma2",
        "sliding_window": WINDOW,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 5.0,
        "query_pre_attn_scalar": 10,
        "tie_word_embeddings": True,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0},
        },
        "final_logit_softcapping": 8.0,
        "query_pre_attn_scalar": 10,
        "tie_word_embeddings": True,
    },
    "phi3": {
        "model_type": "phi3",
        "sliding_window": WINDOW,
        "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5},
    },
    "phi3-longrope": {
        "model_type": "phi3",
        "rope_parameters": _LONGROPE,
        "original_max_position_embeddings": 256,
    },
    "granite": {
        "model_type": "granite",
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.5,
        "residual_multiplier": 0.6,
        "attention_multiplier": 0.1,
        "tie_word_embeddings": True,
    },
    "olmo2": {"model_type": "olmo2"},
    "cohere": {
        "model_type": "cohere",
        "logit_scale": 0.3,
        "use_qk_norm": True,
        "tie_word_embeddings": True,
    },
    "cohere2": {
        "model_type": "cohere2",
        "logit_scale": 0.4,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
        "tie_word_embeddings": True,
    },
}


def tiny_model(family: str, seed: int = 0, **changes: Any) -> Any:
    """A random model in fp32; biases get random values too, so that a dropped one shows."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from lowmem_dpo.demo.byte_tokenizer import byte_tokenizer

    tokenizer = byte_tokenizer()
    settings = SIZES | {
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "initializer_range": 0.2,
    }
    torch.manual_seed(seed)
    config = AutoConfig.for_model(**settings | FAMILIES[family] | changes)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def save_tiny_model(
    directory: Path, family: str = "llama", *, seed: int = 0, **changes: Any
) -> Path:
    """Write a checkpoint with its tokenizer; returns the folder."""
    from lowmem_dpo.demo.byte_tokenizer import byte_tokenizer

    tiny_model(family, seed, **changes).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory

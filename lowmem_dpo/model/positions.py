"""Position encodings of a model, read off its config.json."""

from typing import Any

from transformers import PretrainedConfig

LAYER_TYPES = {"full_attention", "sliding_attention"}


def rope_limit(config: PretrainedConfig) -> int | None:
    """Longest sequence, in tokens, whose position encoding is that of every shorter one.

    Longrope has two sets of frequencies. Which one a batch gets depends on its longest sequence, so
    up to this length all get the first.
    """
    limits = [
        rope["original_max_position_embeddings"]
        for rope in rope_settings(config)
        if rope.get("rope_type") == "longrope"
    ]
    return min(limits, default=None)


def rope_settings(config: PretrainedConfig) -> list[dict[str, Any]]:
    """The position encodings of a model: one, or one for each type of layer."""
    rope = config.rope_parameters or {}
    by_layer_type = [rope[name] for name in LAYER_TYPES if rope.get(name)]
    return by_layer_type or [rope]

"""What sets the model families apart: one record for every type of model that is trained.

A decoder layer of each is attention and a gated MLP, with a residual around either:

    h = x + r * norm(attention(norm(x))),  y = h + r * norm(mlp(norm(h)))

Families differ in which of the four norms there are, in the factor r, in what a norm does, and in
the logits. In a parallel layer the MLP reads what attention reads: y = h + mlp(norm(x)).

To add a family, write its record here, a configuration into `tests/tiny.py` and a line into the
README's table.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

NormNames = tuple[str | None, str | None]


@dataclass(frozen=True)
class RmsNorm:
    """The RMS norm of a family.

    Attributes:
        class_name: In transformers.
        offset: Added to the weight.
        rounds_first: Whether rows are rounded before the product with the weight.
    """

    class_name: str
    offset: float = 0.0
    rounds_first: bool = True


@dataclass(frozen=True)
class Family:
    """How a family is computed; where nothing is said, as Llama is.

    Attributes:
        rms_norm: Its norm, or None where it has one of another kind.
        attention_norms: Names in a layer of the norms before and after attention.
        mlp_norms: Names in a layer of the norms before and after the MLP.
        is_parallel: Whether the MLP reads what attention reads.
        residual_multiplier: Factor on what attention and MLP add to the residual, by config.json.
        logit_scale: Factor on the logits, by config.json.
        logit_softcap: The c of c * tanh(logits / c) by config.json, or None.
        plain_attention: The attention function of transformers that computes it.
        is_joined: Whether its attention module is q, k and v apart, norms of heads, a rotation by
            halves, and o: such are joined on a card. With `has_softcap` there may be a soft-cap.
        adopted_code: What old checkpoints name in `auto_map` for code of their own, which
            transformers has under the same names by now.
    """

    rms_norm: RmsNorm | None
    attention_norms: NormNames = ("input_layernorm", None)
    mlp_norms: NormNames = ("post_attention_layernorm", None)
    is_parallel: bool = False
    residual_multiplier: Callable[[Any], float] = lambda config: 1.0
    logit_scale: Callable[[Any], float] = lambda config: 1.0
    logit_softcap: Callable[[Any], float | None] = lambda config: None
    plain_attention: str = "sdpa"
    is_joined: bool = False
    has_softcap: bool = False
    adopted_code: Mapping[str, str] = field(default_factory=dict)


_GEMMA_ATTENTION_NORMS = ("input_layernorm", "post_attention_layernorm")
_GEMMA_MLP_NORMS = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
_COHERE = Family(
    rms_norm=None,
    mlp_norms=(None, None),
    is_parallel=True,
    logit_scale=lambda config: float(config.logit_scale),
)

FAMILIES: dict[str, Family] = {
    "cohere": _COHERE,
    "cohere2": _COHERE,
    "gemma2": Family(
        rms_norm=RmsNorm("Gemma2RMSNorm", offset=1.0, rounds_first=False),
        attention_norms=_GEMMA_ATTENTION_NORMS,
        mlp_norms=_GEMMA_MLP_NORMS,
        logit_softcap=lambda config: config.final_logit_softcapping,
        # sdpa has no soft-cap: transformers 5.17 leaves it out without a word, later ones refuse.
        plain_attention="eager",
        is_joined=True,
        has_softcap=True,
    ),
    "gemma3_text": Family(
        rms_norm=RmsNorm("Gemma3RMSNorm", offset=1.0, rounds_first=False),
        attention_norms=_GEMMA_ATTENTION_NORMS,
        mlp_norms=_GEMMA_MLP_NORMS,
        logit_softcap=lambda config: config.final_logit_softcapping,
        is_joined=True,
    ),
    "granite": Family(
        rms_norm=RmsNorm("GraniteRMSNorm"),
        residual_multiplier=lambda config: config.residual_multiplier,
        logit_scale=lambda config: 1 / config.logits_scaling,
        is_joined=True,
    ),
    "llama": Family(rms_norm=RmsNorm("LlamaRMSNorm"), is_joined=True),
    "mistral": Family(rms_norm=RmsNorm("MistralRMSNorm"), is_joined=True),
    "olmo2": Family(
        rms_norm=RmsNorm("Olmo2RMSNorm", rounds_first=False),
        attention_norms=(None, "post_attention_layernorm"),
        mlp_norms=(None, "post_feedforward_layernorm"),
    ),
    "phi3": Family(
        rms_norm=RmsNorm("Phi3RMSNorm"),
        adopted_code={"AutoConfig": "Phi3Config", "AutoModelForCausalLM": "Phi3ForCausalLM"},
    ),
    "qwen2": Family(rms_norm=RmsNorm("Qwen2RMSNorm"), is_joined=True),
    "qwen3": Family(rms_norm=RmsNorm("Qwen3RMSNorm"), is_joined=True),
}
"""By the `model_type` of config.json."""

"""What is done to a loaded model before it is run: one operation, whose steps have an order.

The head changes before its kernels are tried, adapters are put on the linears while these are where
transformers has them, and norms are replaced before the layers that hold them are taken apart.
"""

from collections.abc import Sequence
from dataclasses import replace

from lowmem_dpo.model.attention import TREE_ATTENTION
from lowmem_dpo.model.head import HeadQuantization, head_to_host, quantize_head
from lowmem_dpo.model.language_model import LanguageModel
from lowmem_dpo.model.layer import DecoderLayer
from lowmem_dpo.model.lora import add_lora
from lowmem_dpo.model.norms import replace_norms
from lowmem_dpo.model.selfcheck import head_that_passed_its_trial


def make_trainable(
    model: LanguageModel,
    *,
    targets: str | Sequence[str],
    rank: int,
    alpha: float,
    dropout: float,
    rank_stabilised: bool,
    seed: int,
    head_quantization: HeadQuantization = "none",
    head_on_host: bool = False,
    head_kernel: str = "auto",
    layer_inputs_on_host: bool = False,
) -> LanguageModel:
    """Give a loaded model a new adapter, and everything that lets it be trained in little memory.

    Args:
        model: As it was loaded; its network is changed in place.
        targets: Layers that get an adapter, as `add_lora` takes them.
        rank: R of the adapter.
        alpha: The adapter's output is scaled by alpha / R, rank-stabilised by alpha / sqrt(R).
        dropout: Probability in [0, 1) on the adapter's input.
        rank_stabilised: Which scaling.
        seed: Of the adapter's A matrices.
        head_quantization: none or int8.
        head_on_host: Keep the head in pinned host memory.
        head_kernel: Implementation of `token_logps`; torch takes its place where it is wrong.
        layer_inputs_on_host: Let the layers' inputs wait in pinned host memory.

    Returns:
        The model as it is then.

    Raises:
        ValueError: If a target names no layer, the head cannot be quantised, or a layer has a part
            that is not known.
    """
    model = quantize_head(model, head_quantization)
    if head_on_host:
        model = head_to_host(model, model.device)
    add_lora(
        model.network,
        targets=targets,
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        rank_stabilised=rank_stabilised,
        seed=seed,
    )
    model = head_that_passed_its_trial(replace(model, head_implementation=head_kernel))
    replace_norms(model.backbone, model.family)
    for i, layer in enumerate(model.layers):
        model.layers[i] = DecoderLayer(
            layer,
            model.family,
            residual_multiplier=model.family.residual_multiplier(model.config),
            inputs_on_host=layer_inputs_on_host,
            has_dropout=dropout > 0,
        )
    model.backbone.set_attn_implementation(TREE_ATTENTION)
    return model

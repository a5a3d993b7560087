"""What is done to a loaded model before it is run: one operation, whose steps have an order.

The head changes before its kernels are tried, adapters are put on the linears while these are where
transformers has them, and norms are replaced before the layers that hold them are taken apart.
"""

from dataclasses import replace

from lowmem_dpo.model.attention import TREE_ATTENTION
from lowmem_dpo.model.head import HeadQuantization, head_to_host, quantize_head
from lowmem_dpo.model.language_model import LanguageModel
from lowmem_dpo.model.layer import DecoderLayer
from lowmem_dpo.model.lora import AdapterSpec, add_lora
from lowmem_dpo.model.norms import replace_norms
from lowmem_dpo.model.selfcheck import head_that_passed_its_trial


def prepare_model(
    model: LanguageModel,
    adapter: AdapterSpec | None = None,
    *,
    seed: int = 0,
    head_quantization: HeadQuantization = "none",
    head_on_host: bool = False,
    head_kernel: str = "auto",
    layer_inputs_on_host: bool = False,
) -> LanguageModel:
    """Give a loaded model its adapter, and everything that lets it be trained in little memory.

    Args:
        model: As it was loaded; its network is changed in place.
        adapter: What kind of adapter it gets; None for none.
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
    if head_quantization == "int8":
        model = quantize_head(model)
    if head_on_host:
        model = head_to_host(model)
    if adapter is not None:
        add_lora(model.network, adapter, seed)
    model = head_that_passed_its_trial(replace(model, head_implementation=head_kernel))
    replace_norms(model.backbone, model.family)
    has_dropout = adapter is not None and adapter.dropout > 0
    for i, layer in enumerate(model.layers):
        model.layers[i] = DecoderLayer(
            layer,
            model.family,
            residual_multiplier=model.family.residual_multiplier(model.config),
            inputs_on_host=layer_inputs_on_host,
            has_dropout=has_dropout,
        )
    model.backbone.set_attn_implementation(TREE_ATTENTION)
    return model

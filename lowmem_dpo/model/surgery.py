"""What is done to a loaded model before it is run: one operation, whose steps have an order.

The head changes before its kernels are tried, adapters are put on the linears while these are where
transformers has them, and norms are replaced before the layers that hold them are taken apart. The
RMS norms that take the place of transformers' own, to keep less for the backward pass, are here
too.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lowmem_dpo.machine.device import check_error, passes_trial
from lowmem_dpo.model.attention import TREE_ATTENTION
from lowmem_dpo.model.families import FAMILIES, Family
from lowmem_dpo.model.head import HeadQuantization, head_to_host, quantize_head
from lowmem_dpo.model.language_model import LanguageModel
from lowmem_dpo.model.layer import DecoderLayer
from lowmem_dpo.model.lora import AdapterSpec, add_lora
from lowmem_dpo.model.scoring import with_tried_head_kernels
from lowmem_dpo_kernels import NormKind, rms_norm, triton_problem, twins


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
    model = with_tried_head_kernels(replace(model, head_implementation=head_kernel))
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


def replace_norms(backbone: nn.Module, family: Family) -> int:
    """Replace every RMS norm of a model, in place.

    Args:
        backbone: Frozen.
        family: Names the class of its norms; a norm of another class stays as it is.

    Returns:
        How many.
    """
    if family.rms_norm is None:
        return 0
    record = family.rms_norm
    found = [
        (parent, name, child)
        for parent in backbone.modules()
        for name, child in parent.named_children()
        if type(child).__name__ == record.class_name
    ]
    for parent, name, norm in found:
        eps: Any = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
        weight: Any = norm.weight
        kind = NormKind(eps, record.offset, record.rounds_first)
        setattr(parent, name, FusedRmsNorm(weight, kind))
    return len(found)


class FusedRmsNorm(nn.Module):
    """An RMS norm with a frozen weight; see `lowmem_dpo_kernels.rms_norm`.

    Args:
        weight: [D], frozen.
        kind: How the family normalises.
    """

    def __init__(self, weight: nn.Parameter, kind: NormKind) -> None:
        super().__init__()
        self.implementation = norm_implementation(weight.device, weight.dtype)
        self.weight = weight
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the rows of [..., D]."""
        return rms_norm(x, self.weight, self.kind, implementation=self.implementation)

    def extra_repr(self) -> str:
        """Sizes for `print(model)`."""
        return f"{tuple(self.weight.shape)}, eps={self.kind.eps}"


@functools.cache
def norm_implementation(device: torch.device, dtype: torch.dtype) -> str:
    """Triton on cards where its kernels can be compiled and are right, torch elsewhere."""
    if device.type != "cuda" or dtype == torch.float64 or triton_problem() is not None:
        return "torch"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "torch"
    trial = functools.partial(_try_norm_kernels, device, dtype)
    return "triton" if passes_trial(trial, "the norms' kernels", device, "PyTorch") else "torch"


def _try_norm_kernels(device: torch.device, dtype: torch.dtype) -> None:
    """Compare values and gradients with the twin in float64, at a head's and a row's width."""
    generator = torch.Generator().manual_seed(0)
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    for width in (128, 4096):
        x, grad = torch.randn(2, 70, width, generator=generator).to(device, dtype)
        weight = torch.randn(width, generator=generator).to(device, dtype)
        norms = [family.rms_norm for family in FAMILIES.values() if family.rms_norm]
        for offset, rounds_first in sorted({(norm.offset, norm.rounds_first) for norm in norms}):
            kind = NormKind(1e-6, offset, rounds_first)
            found = _value_and_gradient(
                functools.partial(rms_norm, implementation="triton"), x, weight, grad, kind
            )
            exact = (x.double(), weight.double(), grad.double(), kind)
            expected = _value_and_gradient(twins.rms_norm, *exact)
            for got, want, what in zip(found, expected, ("value", "gradient"), strict=True):
                check_error(got, want, limit, f"{what} at {width}")


def _value_and_gradient(
    norm: Callable[..., Tensor], x: Tensor, weight: Tensor, grad: Tensor, kind: NormKind
) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        out = norm(x, weight, kind)
    out.backward(grad)
    assert x.grad is not None
    return out.detach(), x.grad

"""Modules of transformers' layers replaced by ones that keep less for the backward pass.

Found by the name of their class, put in their place under the same name; what is not in the table
stays as it is and computes the same with more memory.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lowmem_dpo.machine.trial import check_error, passes_trial
from lowmem_dpo.model.gated_mlp import GatedMlp, gate_activation
from lowmem_dpo.model.lora import LoraLinear
from lowmem_dpo.model.tiles import TILE_ROWS, TokenTiles
from lowmem_dpo_kernels import NormKind, rms_norm, triton_problem, twins

# Class name to (offset of the weight, whether rows are rounded before the product with it).
_NORMS = {
    "LlamaRMSNorm": (0.0, True),
    "MistralRMSNorm": (0.0, True),
    "Qwen2RMSNorm": (0.0, True),
    "Qwen3RMSNorm": (0.0, True),
    "Phi3RMSNorm": (0.0, True),
    "GraniteRMSNorm": (0.0, True),
    "Olmo2RMSNorm": (0.0, False),
    "Gemma2RMSNorm": (1.0, False),
    "Gemma3RMSNorm": (1.0, False),
}

# Class of decoder layer to the norms right before and after its MLP. What comes after those is
# added to the residual, which is what lets `TokenTiles` leave it out of a second run.
_TOKEN_WISE: dict[str, tuple[str | None, str | None]] = {
    "LlamaDecoderLayer": ("post_attention_layernorm", None),
    "MistralDecoderLayer": ("post_attention_layernorm", None),
    "Qwen2DecoderLayer": ("post_attention_layernorm", None),
    "Qwen3DecoderLayer": ("post_attention_layernorm", None),
    "Phi3DecoderLayer": ("post_attention_layernorm", None),
    "GraniteDecoderLayer": ("post_attention_layernorm", None),
    "Olmo2DecoderLayer": (None, "post_feedforward_layernorm"),
    "Gemma2DecoderLayer": ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    "Gemma3DecoderLayer": ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    "CohereDecoderLayer": (None, None),  # attention and MLP share one norm
    "Cohere2DecoderLayer": (None, None),
}


class FusedRmsNorm(nn.Module):
    """An RMS norm with a frozen weight; see `lowmem_dpo_kernels.rms_norm`.

    Args:
        weight: [D], frozen.
        rule: How the family normalises.
    """

    def __init__(self, weight: nn.Parameter, rule: NormKind) -> None:
        super().__init__()
        self.implementation = norm_implementation(weight.device, weight.dtype)
        self.weight = weight
        self.rule = rule

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the rows of [..., D]."""
        return rms_norm(x, self.weight, self.rule, implementation=self.implementation)

    def extra_repr(self) -> str:
        """Sizes for `print(model)`."""
        return f"{tuple(self.weight.shape)}, eps={self.rule.eps}"


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
        for offset, rounds_first in sorted(set(_NORMS.values())):
            rule = NormKind(1e-6, offset, rounds_first)
            found = _value_and_gradient(
                functools.partial(rms_norm, implementation="triton"), x, weight, grad, rule
            )
            exact = (x.double(), weight.double(), grad.double(), rule)
            expected = _value_and_gradient(twins.rms_norm, *exact)
            for got, want, what in zip(found, expected, ("value", "gradient"), strict=True):
                check_error(got, want, limit, f"{what} at {width}")


def _value_and_gradient(
    norm: Callable[..., Tensor], x: Tensor, weight: Tensor, grad: Tensor, rule: NormKind
) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        out = norm(x, weight, rule)
    out.backward(grad)
    assert x.grad is not None
    return out.detach(), x.grad


def fuse_norms(model: nn.Module) -> int:
    """Replace every RMS norm whose family is known, in place.

    Args:
        model: Frozen.

    Returns:
        How many.
    """
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child).__name__ in _NORMS
    ]
    for parent, name, norm in found:
        offset, rounds_first = _NORMS[type(norm).__name__]
        eps: Any = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
        weight: Any = norm.weight
        setattr(parent, name, FusedRmsNorm(weight, NormKind(eps, offset, rounds_first)))
    return len(found)


def fuse_mlps(layers: nn.ModuleList) -> int:
    """Replace the gated MLPs of known decoder layers, in place.

    Args:
        layers: The decoder layers, before `tile_layers`.

    Returns:
        How many.
    """
    num_fused = 0
    for layer in layers:
        mlp = layer.get_submodule("mlp") if type(layer).__name__ in _TOKEN_WISE else None
        if mlp is not None and (activation := gate_activation(mlp)):
            layer.mlp = GatedMlp(mlp, activation)
            num_fused += 1
    return num_fused


def tile_layers(layers: nn.ModuleList, *, has_randomness: bool, tile_rows: int = TILE_ROWS) -> int:
    """Let the MLP of every layer whose family is known, with its norms, run in tiles of tokens.

    Args:
        layers: The decoder layers, linears replaced by LoraLinear.
        has_randomness: Whether the adapters have dropout.
        tile_rows: Most rows of a tile.

    Returns:
        How many.
    """
    known = [layer for layer in layers if type(layer).__name__ in _TOKEN_WISE]
    for layer in known:
        before, after = _TOKEN_WISE[type(layer).__name__]
        names = [name for name in (before, "mlp", after) if name]
        last = layer.get_submodule("mlp.down_proj") if after is None else None
        assert last is None or isinstance(last, LoraLinear)
        modules = [layer.get_submodule(name) for name in names]
        for name in names:
            setattr(layer, name, nn.Identity())
        layer.mlp = TokenTiles(
            *modules, last=last, has_randomness=has_randomness, tile_rows=tile_rows
        )
    return len(known)

"""Linear layers with a frozen base, dense or NF4, and a LoRA adapter on top.

    y = x W^T + bias + scaling * dropout(x) A^T B^T

A base in NF4 is dequantised for each product and dropped at once, in the forward pass and again in
the backward pass, so that one dense weight is alive at a time. The backward pass needs x, and x
A^T, which is narrow; x itself is shared by the layers that read it. Without an adapter nothing but
the base is needed.

A and B are fp32 and are cast to x's dtype for the products. B is zero at the start, so the layer
begins as its base, to the bit.

Shapes: N tokens (leading dimensions flattened), R rank.
Source: Hu et al., LoRA (arXiv 2106.09685), section 4.1; Kalajdzievski, rsLoRA (arXiv 2312.03732).
"""

import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lowmem_dpo.model.nf4 import Nf4Weight


@dataclass(frozen=True)
class AdapterSpec:
    """What an adapter is, its values aside.

    Attributes:
        rank: R.
        alpha: The adapter's output is scaled by alpha / R, rank-stabilised by alpha / sqrt(R).
        dropout: Probability in [0, 1) that an element of the adapter's input is dropped.
        targets: all, or names: the last part of a layer's path (q_proj), or more of it.
        rank_stabilised: Which scaling.
        rank_pattern: Other ranks, by regular expressions for the end of a layer's path, in whole
            parts; the first that matches counts.
        alpha_pattern: Other alphas, likewise.
    """

    rank: int
    alpha: float
    dropout: float
    targets: str | Sequence[str]
    rank_stabilised: bool
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def rank_and_scaling(self, name: str) -> tuple[int, float]:
        """R of the layer of that name, and the factor on its adapter's output."""

        def first(patterns: Mapping[str, Any], default: Any) -> Any:
            matching = (patterns[key] for key in patterns if re.match(rf"(.*\.)?({key})$", name))
            return next(matching, default)

        rank = first(self.rank_pattern, self.rank)
        alpha = first(self.alpha_pattern, self.alpha)
        return rank, alpha / (math.sqrt(rank) if self.rank_stabilised else rank)


class LoraLinear(nn.Module):
    """A frozen linear layer that may carry a LoRA adapter.

    Args:
        name: Path in the model as Hugging Face has it, such as model.layers.0.self_attn.q_proj.
            Wrappers around decoder layers do not change it.
        weight: [out, in], frozen.
        bias: [out], frozen, or None.

    Attributes:
        rank: R; 0 without an adapter.
        lora_a: [R, in] fp32, or None without an adapter.
        lora_b: [out, R] fp32, or None without an adapter.
        scaling: Factor on the adapter's output.
        dropout: Probability that an element of the adapter's input is dropped while `dropout_live`.
        dropout_live: Whether dropout is on. `train()` and `eval()` do not touch it.
        enabled: Whether the adapter is on.
    """

    weight: Nf4Weight | nn.Parameter
    bias: nn.Parameter | None
    lora_a: nn.Parameter | None
    lora_b: nn.Parameter | None

    def __init__(
        self, name: str, weight: Nf4Weight | nn.Parameter, bias: nn.Parameter | None = None
    ) -> None:
        super().__init__()
        self.name = name
        self.out_features, self.in_features = weight.shape
        self.weight = weight
        self.bias = bias
        self.register_parameter("lora_a", None)
        self.register_parameter("lora_b", None)
        self.rank = 0
        self.scaling = 1.0
        self.dropout = 0.0
        self.dropout_live = False
        self.enabled = True

    def add_adapter(self, rank: int, *, scaling: float, dropout: float, seed: int) -> None:
        """Give the layer a new adapter whose output is zero.

        Args:
            rank: R.
            scaling: Factor on the adapter's output.
            dropout: Probability in [0, 1).
            seed: With the layer's name, it decides A: uniform within 1 / sqrt(in), as in PEFT.
        """
        digest = hashlib.sha256(f"{seed}:{self.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
        device = (
            self.weight.packed.device if isinstance(self.weight, Nf4Weight) else self.weight.device
        )
        lora_a = torch.empty(rank, self.in_features)
        nn.init.kaiming_uniform_(lora_a, a=math.sqrt(5), generator=generator)
        self.lora_a = nn.Parameter(lora_a.to(device))
        self.lora_b = nn.Parameter(torch.zeros(self.out_features, rank, device=device))
        self.rank, self.scaling, self.dropout = rank, scaling, dropout

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """The base weight [out, in] in `dtype`; a new tensor if it has to be."""
        if isinstance(self.weight, Nf4Weight):
            return self.weight.dequantize(dtype)
        return self.weight.detach().to(dtype)

    def forward(self, x: Tensor, *, needs_values: bool = True) -> Tensor:
        """Map [..., in] to [..., out] in x's dtype.

        Args:
            x: The input.
            needs_values: Whether anybody reads the output, or wants its gradients alone. Those need
                no product with the weight in the forward pass, so it is left out; the values are
                NaN then, in the memory of one number: whoever does read them will notice.
        """
        if not self.enabled or self.lora_a is None:
            return _LoraLinearFunction.apply(x, None, None, self, 0.0, needs_values)
        drop = self.dropout if self.dropout_live else 0.0
        return _LoraLinearFunction.apply(x, self.lora_a, self.lora_b, self, drop, needs_values)

    def extra_repr(self) -> str:
        """Sizes for `print(model)`."""
        return f"in={self.in_features}, out={self.out_features}, rank={self.rank}"


class _LoraLinearFunction(torch.autograd.Function):
    """The whole layer, so that no dense weight and no copy of x waits for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        layer: LoraLinear,
        drop: float,
        needs_values: bool,
    ) -> Tensor:
        y_shape = (*x.shape[:-1], layer.out_features)
        rows = x.reshape(-1, layer.in_features)
        if needs_values:
            bias = None if layer.bias is None else layer.bias.to(x.dtype)
            y = F.linear(rows, layer.dense_weight(x.dtype), bias)
        else:
            y = x.new_full((), torch.nan).expand(y_shape)
        ctx.layer, ctx.x_shape, ctx.dtype = layer, x.shape, x.dtype
        if lora_a is None or lora_b is None:
            ctx.save_for_backward(None, None, None, None, None)
            return y.view(y_shape)
        # Dropped elements are at zero; the scaling holds the factor 1 / (1 - p).
        keep = torch.empty_like(rows, dtype=torch.bool).bernoulli_(1 - drop) if drop else None
        ctx.scaling = layer.scaling / (1 - drop)
        low = (rows if keep is None else rows * keep) @ lora_a.to(x.dtype).T  # [N, R]
        trains = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        ctx.save_for_backward(x if trains else None, keep, low if trains else None, lora_a, lora_b)
        if not needs_values:
            return y
        return y.addmm_(low, lora_b.to(x.dtype).T, alpha=ctx.scaling).view(y_shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, keep, low, lora_a, lora_b = ctx.saved_tensors
        grad_y = grad_y.reshape(-1, grad_y.shape[-1])
        grad_x = grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_y @ ctx.layer.dense_weight(ctx.dtype)
        if lora_a is not None:
            grad_low = (grad_y @ lora_b.to(ctx.dtype)).mul_(ctx.scaling)  # [N, R]
            if ctx.needs_input_grad[1]:
                rows = x.reshape(-1, x.shape[-1])
                grad_a = (grad_low.T @ (rows if keep is None else rows * keep)).to(lora_a.dtype)
            if ctx.needs_input_grad[2]:
                grad_b = (grad_y.T @ low).to(lora_b.dtype).mul_(ctx.scaling)
            if grad_x is not None and keep is None:
                grad_x.addmm_(grad_low, lora_a.to(ctx.dtype))
            elif grad_x is not None:
                grad_x += (grad_low @ lora_a.to(ctx.dtype)) * keep
        if grad_x is not None:
            grad_x = grad_x.view(ctx.x_shape)
        return grad_x, grad_a, grad_b, None, None, None


def wrap_linears(layers: nn.Module, prefix: str) -> None:
    """Replace every nn.Linear under `layers` by a LoraLinear of the same frozen tensors, in place.

    Args:
        layers: The decoder layers.
        prefix: Their path in the model, such as model.layers.
    """
    for path, module in list(layers.named_modules(prefix=prefix)):
        for child_name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                linear = LoraLinear(f"{path}.{child_name}", child.weight, child.bias)  # type: ignore[arg-type]
                setattr(module, child_name, linear.requires_grad_(False))


def add_lora(model: nn.Module, adapter: AdapterSpec, seed: int) -> list[str]:
    """Give the targeted linears of the decoder layers a new adapter each, in place.

    Args:
        model: A model whose linears are LoraLinear.
        adapter: Of which kind.
        seed: Decides the A matrices, each by itself; torch's own generator plays no part.

    Returns:
        The names of the layers that got an adapter, in module order.

    Raises:
        ValueError: If a target names no layer.
    """
    layers = linear_layers(model)
    targets = adapter.targets
    names = list(layers) if targets == "all" else match_targets(layers, targets)
    for name in names:
        assert layers[name].rank == 0, f"{name} has an adapter already"
        rank, scaling = adapter.rank_and_scaling(name)
        layers[name].add_adapter(rank, scaling=scaling, dropout=adapter.dropout, seed=seed)
    return names


def match_targets(names: Iterable[str], targets: str | Sequence[str]) -> list[str]:
    """The names that end in one of the targets, counted in whole parts.

    Raises:
        ValueError: If a target names nothing.
    """
    names = list(names)
    targets = [targets] if isinstance(targets, str) else targets
    unknown = [t for t in targets if not any(f".{name}".endswith(f".{t}") for name in names)]
    if unknown or not targets:
        known = sorted({name.rpartition(".")[2] for name in names})
        raise ValueError(
            f"lora_target_modules: the model has no linear layer "
            f"{', '.join(unknown) or '(empty list)'}; use all, or some of {', '.join(known)}"
        )
    return [name for name in names if any(f".{name}".endswith(f".{t}") for t in targets)]


def linear_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """Every LoraLinear of a model, with an adapter or without, by its name and in module order."""
    return {module.name: module for module in model.modules() if isinstance(module, LoraLinear)}


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """The layers that carry an adapter, by name and in module order."""
    return {name: layer for name, layer in linear_layers(model).items() if layer.rank}


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained: `<layer>.lora_a` and `<layer>.lora_b`, in module order."""
    parameters: dict[str, nn.Parameter] = {}
    for name, layer in linear_layers(model).items():
        if layer.lora_a is not None and layer.lora_b is not None:
            parameters |= {f"{name}.lora_a": layer.lora_a, f"{name}.lora_b": layer.lora_b}
    return parameters


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Inside, the model is its base."""
    layers = [layer for layer in linear_layers(model).values() if layer.enabled]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True


@contextmanager
def dropout_live(model: nn.Module) -> Iterator[None]:
    """Inside, the adapters' dropout is on; backward passes that run layers again belong inside."""
    layers = [layer for layer in linear_layers(model).values() if not layer.dropout_live]
    for layer in layers:
        layer.dropout_live = True
    try:
        yield
    finally:
        for layer in layers:
            layer.dropout_live = False

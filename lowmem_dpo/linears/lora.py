"""Linear layers with a frozen base, dense or NF4, and a LoRA adapter on top.

    y = x W^T + bias + scaling * dropout(x) A^T B^T

A base in NF4 is dequantised for each product and dropped at once, in the forward pass and again in
the backward pass, so that one dense weight is alive at a time. The backward pass needs x, and x
A^T, which is narrow; x itself is shared by the layers that read it. Without an adapter nothing but
the base is needed.

A and B are fp32 and are cast to x's dtype for the products; while `casts_kept`, once for all. B is
zero at the start, so the layer begins as its base, to the bit.

Layers of one input, such as q, k and v, are one function on a card: x meets their A matrices in one
product, and products add up its gradient and, in fp32, those of A and B where they lie (`.grad`, so
`.backward()` only). These are sums in another order; elsewhere layers are computed one by one.

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

from lowmem_dpo.linears.nf4 import Nf4Weight
from lowmem_dpo.machine.products import add_product, joins_products


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
        choices: list[tuple[Mapping[str, Any], Any]]
        choices = [(self.rank_pattern, self.rank), (self.alpha_pattern, self.alpha)]
        rank, alpha = (
            next((of[key] for key in of if re.match(rf"(.*\.)?({key})$", name)), default)
            for of, default in choices
        )
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
        casts: A and B in other types, while `casts_kept`; else None.
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
        self.casts: dict[Any, Any] | None = None

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
        return project(x, (self,), needs_values=needs_values)[0]

    def extra_repr(self) -> str:
        """Sizes for `print(model)`."""
        return f"in={self.in_features}, out={self.out_features}, rank={self.rank}"


def project(
    x: Tensor, layers: Sequence[LoraLinear], *, needs_values: bool = True
) -> Sequence[Tensor]:
    """What each of some layers makes of one input; by itself where dropout changes that input."""
    drops = any(layer.dropout and layer.dropout_live for layer in layers)
    if len(layers) > 1 and (drops or not joins_products(x.device, x.dtype)):
        return [layer(x) for layer in layers]
    adapted = [layer for layer in layers if layer.enabled and layer.lora_a is not None]
    drop = layers[0].dropout if adapted and layers[0].dropout_live else 0.0
    matrices = [*(layer.lora_a for layer in adapted), *(layer.lora_b for layer in adapted)]
    return _LoraLinearFunction.apply(x, layers, adapted, drop, needs_values, *matrices)


def cast_matrices(
    matrices: Sequence[Tensor], dtype: torch.dtype
) -> tuple[Tensor, Sequence[Tensor]]:
    """The A matrices of layers of one input, joined to one [R, in], and their B matrices."""
    parts = [matrix.detach().to(dtype) for matrix in matrices]
    lora_as, lora_bs = parts[: len(parts) // 2], parts[len(parts) // 2 :]
    return lora_as[0] if len(lora_as) == 1 else torch.cat(lora_as), lora_bs


class _LoraLinearFunction(torch.autograd.Function):
    """Whole layers, so that no dense weight and no copy of x waits for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        layers: Sequence[LoraLinear],
        adapted: Sequence[LoraLinear],
        drop: float,
        needs_values: bool,
        *matrices: Tensor,
    ) -> tuple[Tensor, ...]:
        rows, outputs, keep, low = x.reshape(-1, x.shape[-1]), [], None, None
        for layer in layers:
            if needs_values:
                bias = None if layer.bias is None else layer.bias.to(x.dtype)
                outputs.append(F.linear(rows, layer.dense_weight(x.dtype), bias))
            else:
                outputs.append(x.new_full((), torch.nan).expand(len(rows), layer.out_features))
        ctx.layers, ctx.adapted, ctx.x_shape, ctx.dtype = layers, adapted, x.shape, x.dtype
        if adapted:
            # Dropped elements are at zero; the scaling holds the factor 1 / (1 - p).
            keep = torch.empty_like(rows, dtype=torch.bool).bernoulli_(1 - drop) if drop else None
            ctx.scalings = [layer.scaling / (1 - drop) for layer in adapted]
            kept, key = adapted[0].casts, (x.dtype, len(adapted))
            if kept is None or key not in kept:
                kept = {} if kept is None else kept
                kept[key] = cast_matrices(matrices, x.dtype)
            ctx.casts = lora_a, lora_bs = kept[key]
            low = (rows if keep is None else rows * keep) @ lora_a.T  # [N, R], R of all of them
            lows = low.split([layer.rank for layer in adapted], dim=1) if needs_values else ()
            for i, part in enumerate(lows):
                layer, lora_b, scaling = adapted[i], lora_bs[i], ctx.scalings[i]
                outputs[layers.index(layer)].addmm_(part, lora_b.T, alpha=scaling)
        trains = any(ctx.needs_input_grad[5:])
        ctx.save_for_backward(x if trains else None, keep, low if trains else None, *matrices)
        return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, keep, low, *matrices = ctx.saved_tensors
        layers, adapted, grad_x = ctx.layers, ctx.adapted, None
        grads_y = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        for layer, grad_y in zip(layers, grads_y, strict=True) if ctx.needs_input_grad[0] else ():
            if grad_x is None:
                grad_x = grad_y @ layer.dense_weight(ctx.dtype)
            else:
                grad_x.addmm_(grad_y, layer.dense_weight(ctx.dtype))
        found: list[Tensor | None] = [None] * len(matrices)
        if adapted:
            grads_y = [grads_y[layers.index(layer)] for layer in adapted]
            joins = joins_products(grads_y[0].device, ctx.dtype)
            lora_a, lora_bs = ctx.casts
            ranks = [layer.rank for layer in adapted]
            grad_low = lora_a.new_empty(len(grads_y[0]), sum(ranks))  # [N, R], R of all of them
            lefts = [*grad_low.split(ranks, dim=1), *grads_y]
            for i, grad_y in enumerate(grads_y):
                part, lora_b, scaling = lefts[i], lora_bs[i], ctx.scalings[i]
                if joins:
                    part.addmm_(grad_y, lora_b, beta=0, alpha=scaling)
                else:  # the other has other bits unless the scaling is a power of two
                    torch.mm(grad_y, lora_b, out=part).mul_(scaling)
            if x is not None:
                rows = x.reshape(-1, x.shape[-1])
                rows = rows if keep is None else rows * keep
                rights = [*[rows] * len(ranks), *low.split(ranks, dim=1)]
                factors = [1.0] * len(ranks) + ctx.scalings
                for i, (matrix, factor) in enumerate(zip(matrices, factors, strict=True)):
                    if ctx.needs_input_grad[5 + i] and joins:
                        if matrix.grad is None:
                            matrix.grad = torch.zeros_like(matrix)
                        add_product(matrix.grad, lefts[i], rights[i], factor)
                    elif ctx.needs_input_grad[5 + i]:
                        gradient = (lefts[i].T @ rights[i]).to(matrix.dtype)
                        found[i] = gradient if factor == 1.0 else gradient.mul_(factor)
            if grad_x is not None and keep is None:
                grad_x.addmm_(grad_low, lora_a)
            elif grad_x is not None:
                grad_x += (grad_low @ lora_a) * keep
        grad_x = None if grad_x is None else grad_x.view(ctx.x_shape)
        return grad_x, None, None, None, None, *found


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


@contextmanager
def casts_kept(model: nn.Module) -> Iterator[None]:
    """Inside, A and B are cast once for each type, so nothing may change them there.

    A change would not be seen: neither fused AdamW nor bitsandbytes raises a tensor's version.
    """
    layers = linear_layers(model).values()
    for layer in layers:
        layer.casts = {}
    try:
        yield
    finally:
        for layer in layers:
            layer.casts = None

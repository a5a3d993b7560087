"""A decoder layer as two halves: attention, and what is done to every token by itself.

    attention half    h = x + norm(attention(norm(x)))
    token-wise half   y = h + norm(mlp(norm(h)))

with the norms that the family has (`families`). In a parallel layer the MLP reads norm(x) as
attention does; then the attention half hands over that as well.

Activations of a whole model do not fit; those of one layer do. Only a layer's input waits for the
backward pass, on the device or in pinned host memory: N * D numbers a layer. There the attention
half runs again as a whole. The token-wise half runs again tile by tile, and each tile is
differentiated at once: what an MLP makes of all tokens, four times the intermediate size and as
much again in gradients, is alive for one tile only. Its output is not computed again, as it would
only be added to the residual; so no product runs more often than in the usual second run.

The autograd function is re-entrant: its backward calls `torch.autograd.backward`, so adapter
gradients arrive through `.backward()` only (not `torch.autograd.grad`) and add up in place. The
hidden states that enter the first layer must require a gradient, or no layer's backward would run.

All tiles have one shape, the last one padded, so that a token's bits do not depend on its place.

Shapes: B sequences (1 of a pack), N tokens, D hidden, I intermediate size, T rows of a tile.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge

from lowmem_dpo.linears.lora import LoraLinear, project
from lowmem_dpo.machine.device import PinnedCopy, cuda_devices
from lowmem_dpo.machine.products import joins_products
from lowmem_dpo.machine.trial import check_error, once_a_device, passes_trial, value_and_gradients
from lowmem_dpo.memory.levers import Keeps
from lowmem_dpo.model.attention import joined_attention
from lowmem_dpo.model.families import Family
from lowmem_dpo.packs.packing import CARD_TOKEN_MULTIPLE, round_up_tokens
from lowmem_dpo_kernels import twins

TILE_ROWS = 2048
"""Most rows of a tile. A tile's weights are dequantised for it: 5 to 10 % of its products' time."""


def stay(*, returns: bool) -> AbstractContextManager[None]:
    """What holds a layer's weights that are on the device for good: nothing."""
    return nullcontext()


class DecoderLayer(nn.Module):
    """A decoder layer that keeps nothing but its input for the backward pass.

    Args:
        layer: That of transformers, its linears LoraLinear; its modules are taken over.
        family: Which of them are where.
        residual_multiplier: Factor on what either half adds to the residual.
        inputs_on_host: Let the input wait in pinned host memory; for layers on a CUDA device.
        has_dropout: Save the state of the random generators, so that the second run repeats the
            dropout of the first.
        mlp_kernels: As for `GatedMlp`.
        tile_rows: Most rows of a tile.
        keeps: What is kept for the backward pass beside the input: nothing, so that both halves run
            again; what attention needs; or all, so that nothing runs again. Layers whose weights
            are there by turns keep nothing.
        hold: Has the layer's weights on the device while inside; `returns` says whether the pass
            comes back for the backward pass. By default they stay there.

    Raises:
        ValueError: If the layer has a part that its family's record does not know.
    """

    def __init__(
        self,
        layer: nn.Module,
        family: Family,
        *,
        residual_multiplier: float,
        inputs_on_host: bool,
        has_dropout: bool,
        mlp_kernels: tuple[torch.device, torch.dtype] | None = None,
        tile_rows: int = TILE_ROWS,
        keeps: Keeps = "nothing",
        hold: Callable[..., AbstractContextManager[None]] = stay,
    ) -> None:
        super().__init__()
        known = {"self_attn", "mlp", *family.attention_norms, *family.mlp_norms}
        parts = [n for n, child in layer.named_children() if not isinstance(child, nn.Dropout)]
        parts += [n for n, _ in layer.named_parameters(recurse=False)]
        if unknown := [name for name in parts if name not in known]:
            raise ValueError(
                f"{type(layer).__name__} of this transformers version has {', '.join(unknown)}, "
                "which this version of lowmem_dpo does not know; install the transformers it was "
                "tested with"
            )
        self.attention = AttentionHalf(layer, family, residual_multiplier)
        self.token_wise = TokenWiseHalf(layer, family, residual_multiplier, mlp_kernels, tile_rows)
        self.inputs_on_host = inputs_on_host
        self.has_dropout = has_dropout
        assert keeps == "nothing" or hold is stay, "a later layer would take the weights"
        self.keeps, self.hold = keeps, hold

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Map [B, N, D] to [B, N, D]; with a gradient to come, keep x and what `keeps` says.

        Args:
            x: Hidden states.
            **kwargs: For the attention module, as transformers' models pass them to a layer.
        """
        if torch.is_grad_enabled() and x.requires_grad:
            if self.keeps == "all":
                return self.token_wise(*self.attention(x, **kwargs))
            if self.keeps == "attention":
                return _TokenWiseFunction.apply(*self.attention(x, **kwargs), self)
            return _LayerFunction.apply(x, self, kwargs)
        with self.hold(returns=False):
            return self.token_wise(*self.attention(x, **kwargs))


class AttentionHalf(nn.Module):
    """h = x + norm(attention(norm(x))); the arguments are those of `DecoderLayer`."""

    def __init__(self, layer: nn.Module, family: Family, residual_multiplier: float) -> None:
        super().__init__()
        before, after = family.attention_norms
        self.norm_before = layer.get_submodule(before) if before else nn.Identity()
        self.norm_after = layer.get_submodule(after) if after else nn.Identity()
        self.self_attn = layer.get_submodule("self_attn")
        self.residual_multiplier = residual_multiplier
        self.family = family

    def forward(self, x: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Give h, and what the token-wise half reads: h, or norm(x) in a parallel layer."""
        normed = self.norm_before(x)
        is_pack = kwargs.get("tree_layout") is not None
        if is_pack and self.family.is_joined and joins_products(x.device, x.dtype):
            added = joined_attention(self.self_attn, normed, self.family.has_softcap, **kwargs)
        else:
            added = self.self_attn(normed, **kwargs)[0]
        added = self.norm_after(added)
        if self.residual_multiplier != 1.0:
            added = added * self.residual_multiplier
        h = x + added
        return h, normed if self.family.is_parallel else h


class TokenWiseHalf(nn.Module):
    """y = h + norm(mlp(norm(h))), tile by tile; the arguments are those of `DecoderLayer`."""

    def __init__(
        self,
        layer: nn.Module,
        family: Family,
        residual_multiplier: float,
        mlp_kernels: tuple[torch.device, torch.dtype] | None,
        tile_rows: int,
    ) -> None:
        super().__init__()
        before, after = family.mlp_norms
        self.norm_before = layer.get_submodule(before) if before else nn.Identity()
        self.norm_after = layer.get_submodule(after) if after else nn.Identity()
        self.mlp = GatedMlp(layer.get_submodule("mlp"), mlp_kernels)
        self.residual_multiplier = residual_multiplier
        self.tile_rows = tile_rows

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        """Map h and what the MLP reads (h too, or norm(x)), [B, N, D] each, to y."""
        tiles = self.tiles(x.shape[1], x.device)
        y = torch.empty_like(h) if len(tiles) > 1 else None
        kept = []  # with a gradient to come: then nothing is written in place
        for tile in tiles:
            part = x[:, tile]
            if missing := tiles[0].stop - part.shape[1]:
                part = F.pad(part, (0, 0, 0, missing))
            added = self.norm_after(self.mlp(self.norm_before(part)))
            if self.residual_multiplier != 1.0:
                added = added * self.residual_multiplier
            if y is None:
                return h + added
            rows = h[:, tile]
            rows = rows + added[:, : rows.shape[1]]
            if torch.is_grad_enabled():
                kept.append(rows)
            else:
                y[:, tile] = rows
        assert y is not None
        return torch.cat(kept, 1) if kept else y

    def input_gradient(self, x: Tensor, grad_y: Tensor) -> Tensor:
        """Run each tile again and differentiate it; the adapters' gradients are added up.

        Args:
            x: [B, N, D], as in the forward pass.
            grad_y: [B, N, D], which is the gradient of h too.

        Returns:
            The gradient of x, a new tensor.
        """
        tiles = self.tiles(x.shape[1], x.device)
        grad_x = torch.empty_like(x) if len(tiles) > 1 else None
        # What comes out of the MLP is read by a norm, if at all: the residual wants no gradient.
        needs_values = not isinstance(self.norm_after, nn.Identity)
        for tile in tiles:
            part, grad = x[:, tile].detach(), grad_y[:, tile]
            if missing := tiles[0].stop - part.shape[1]:
                part, grad = (F.pad(rows, (0, 0, 0, missing)) for rows in (part, grad))
            part.requires_grad_()
            if self.residual_multiplier != 1.0:
                grad = grad * self.residual_multiplier
            with torch.enable_grad():
                out = self.mlp(self.norm_before(part), needs_values=needs_values)
                edge = get_gradient_edge(self.norm_after(out))
                del out  # its place in the graph is all that is needed
            torch.autograd.backward(edge, grad)
            assert part.grad is not None
            if grad_x is None:
                return part.grad
            rows = grad_x[:, tile]
            rows.copy_(part.grad[:, : rows.shape[1]])
        assert grad_x is not None
        return grad_x

    def tiles(self, num_rows: int, device: torch.device) -> list[slice]:
        """As few as there can be, of one height but for the last; on a card as packs are, in 128.

        Elsewhere heights stay even, since padding costs time there.
        """
        num_tiles = max(1, -(-num_rows // self.tile_rows))
        height = -(-num_rows // num_tiles)
        if num_tiles > 1 and device.type == "cuda":
            height = round_up_tokens(height, CARD_TOKEN_MULTIPLE)
        return [slice(i, min(i + height, num_rows)) for i in range(0, num_rows, height or 1)]


class _Activation(NamedTuple):
    """What is done to the gate: the kernels' name for it, its values, its gradient in place."""

    name: str
    values: Callable[[Tensor], Tensor]
    write_gradient: Callable[..., Tensor]


_SILU = _Activation("silu", F.silu, torch.ops.aten.silu_backward.grad_input)
_GELU_TANH = _Activation(
    "gelu_tanh",
    functools.partial(F.gelu, approximate="tanh"),
    functools.partial(torch.ops.aten.gelu_backward.grad_input, approximate="tanh"),
)
_ACTIVATIONS = {"SiLUActivation": _SILU, "SiLU": _SILU, "GELUTanh": _GELU_TANH}


class GatedMlp(nn.Module):
    """The MLP of a decoder layer, which keeps gate and up alone and differentiates in place.

        y = down(act(gate) * up),  act SiLU (SwiGLU) or the tanh approximation of GELU (GeGLU)

    Ordinary operations keep act(gate) too, and their backward pass writes three more tensors of
    that size before the first is freed: seven are alive, of the intermediate size each. Here
    act(gate) is computed again and the gradient of the product becomes that of the gate where it
    lies: four.

    Values and gradients have the bits of the ordinary operations, which do the arithmetic where
    `lowmem_dpo_kernels.gated_product` may not. Any other activation runs by these.

    Args:
        mlp: That of transformers, whose parts are taken over. Has `down_proj`, and `gate_proj` and
            `up_proj` or both in one as `gate_up_proj`, all LoraLinear; and its activation, as
            `act_fn` or `activation_fn`.
        kernels: Card and type that Triton kernels may compute on and in, if they are right there.

    Attributes:
        by_kernel: Whether they do.

    Source: Shazeer (arXiv 2002.05202).
    """

    gate_up_proj: LoraLinear
    gate_proj: LoraLinear
    up_proj: LoraLinear
    down_proj: LoraLinear

    def __init__(
        self, mlp: nn.Module, kernels: tuple[torch.device, torch.dtype] | None = None
    ) -> None:
        super().__init__()
        self.in_one = hasattr(mlp, "gate_up_proj")
        gates = ("gate_up_proj",) if self.in_one else ("gate_proj", "up_proj")
        for name in (*gates, "down_proj"):
            self.add_module(name, mlp.get_submodule(name))
        self.act_fn = mlp.get_submodule("act_fn" if hasattr(mlp, "act_fn") else "activation_fn")
        self.activation = _ACTIVATIONS.get(type(self.act_fn).__name__)
        self.by_kernel = False
        if kernels is not None and self.activation is not None:
            width = self.down_proj.in_features
            self.by_kernel = _kernels_agree(*kernels, width, self.activation.name, self.in_one)

    def forward(self, x: Tensor, *, needs_values: bool = True) -> Tensor:
        """Map [..., D] to [..., D].

        Args:
            x: The input.
            needs_values: Whether the output is read or only differentiated: see `LoraLinear`.
        """
        if self.in_one:
            gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        else:
            gate, up = project(x, (self.gate_proj, self.up_proj))
        if self.activation is None:
            product = self.act_fn(gate) * up
        elif self.by_kernel:
            from lowmem_dpo_kernels.gated_product import gated_product  # imports triton

            product = gated_product(gate, up, self.activation.name)
        else:
            product = _GatedProduct.apply(gate, up, self.activation)
        del gate, up  # without a gradient to come, the last product runs without them
        return self.down_proj(product, needs_values=needs_values)


class _GatedProduct(torch.autograd.Function):
    """act(gate) * up, [..., I]."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: _Activation) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return activation.values(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        grad_up = ctx.activation.values(gate).mul_(grad)
        grad.mul_(up)  # the down projection made it for nobody else
        ctx.activation.write_gradient(grad, gate, grad_input=grad)
        return grad, grad_up, None


def mlp_path(backbone: nn.Module) -> str:
    """What a prepared model's MLPs run by; another path differs in the last bits."""
    mlps = [module for module in backbone.modules() if isinstance(module, GatedMlp)]
    return "triton" if any(mlp.by_kernel for mlp in mlps) else "torch"


@once_a_device
def _kernels_agree(
    device: torch.device, dtype: torch.dtype, width: int, activation: str, in_one: bool
) -> bool:
    trial = functools.partial(_try_kernels, device, dtype, width, activation, in_one)
    return passes_trial(trial, "mlp", "the MLP's kernels", device, "PyTorch")


def _try_kernels(
    device: torch.device, dtype: torch.dtype, width: int, activation: str, in_one: bool
) -> None:
    """Compare values and gradients with the twin in float64, gate and up as a model has them."""
    from lowmem_dpo_kernels.gated_product import gated_product  # imports triton

    generator = torch.Generator().manual_seed(0)
    both, grad = torch.randn(2, 1, 70, 2 * width, generator=generator).to(device, dtype)
    halves, grad = both.chunk(2, dim=-1), grad[..., :width]
    parts = halves if in_one else [half.contiguous() for half in halves]
    found = value_and_gradients(gated_product, parts, grad, activation)
    exact = ([part.double() for part in parts], grad.double(), activation)
    expected = value_and_gradients(twins.gated_product, *exact)
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    for got, want, what in zip(found, expected, ("value", "gate", "up"), strict=True):
        check_error(got, want, limit, f"{what} at {width}")


class _LayerFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: DecoderLayer, kwargs: dict[str, Any]) -> Tensor:
        ctx.layer, ctx.kwargs = layer, kwargs
        ctx.random_state = _random_state(x.device) if layer.has_dropout else None
        with layer.hold(returns=True):
            y = layer.token_wise(*layer.attention(x, **kwargs))
        ctx.x = _to_host(x) if layer.inputs_on_host else x.detach()
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, None, None]:
        layer: DecoderLayer = ctx.layer
        x = ctx.x.to(grad_y.device, non_blocking=True).detach().requires_grad_()
        ctx.x = None
        # What is drawn here is drawn in the order of the first run: attention, then tile by tile.
        with layer.hold(returns=True):
            with _repeated(*ctx.random_state) if layer.has_dropout else nullcontext():
                with torch.enable_grad():
                    h, read = layer.attention(x, **ctx.kwargs)
                edges = [get_gradient_edge(t) for t in ((h, read) if read is not h else (h,))]
                del h  # a parallel layer needs only its place in the graph
                grad_read = layer.token_wise.input_gradient(read, grad_y)
            del read
            grads = [grad_y, grad_read] if len(edges) > 1 else [grad_read.add_(grad_y)]
            torch.autograd.backward(edges, grads)
        return x.grad, None, None


class _TokenWiseFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, x: Tensor, layer: DecoderLayer) -> Tensor:
        ctx.save_for_backward(x)
        ctx.layer = layer
        ctx.random_state = _random_state(x.device) if layer.has_dropout else None
        return layer.token_wise(h, x)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor, None]:
        (x,), layer = ctx.saved_tensors, ctx.layer
        with _repeated(*ctx.random_state) if layer.has_dropout else nullcontext():
            grad_x = layer.token_wise.input_gradient(x, grad_y)
        return grad_y, grad_x, None


def _to_host(x: Tensor) -> PinnedCopy:
    """A pinned copy; copies to and from the host run in stream order, so none needs a wait."""
    return PinnedCopy(x)


def _random_state(device: torch.device) -> tuple[torch.device, Tensor, Tensor | None]:
    """A device, and the states of the CPU's generator and, on a card, of the card's."""
    on_card = torch.cuda.get_rng_state(device) if cuda_devices(device) else None
    return device, torch.get_rng_state(), on_card


@contextmanager
def _repeated(device: torch.device, on_cpu: Tensor, on_card: Tensor | None) -> Iterator[None]:
    """Inside, the generators repeat what followed a state; afterwards they go on."""
    with torch.random.fork_rng(cuda_devices(device)):
        torch.set_rng_state(on_cpu)
        if on_card is not None:
            torch.cuda.set_rng_state(on_card, device)
        yield

"""Every configuration of every Triton kernel, as launches by its own host code.

A list an operation: tests compile them, `kernel_resources.py` prints what they take. Where a table
decides by card, so does the list.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from lowmem_dpo_kernels import (
    NormKind,
    TreePlan,
    gated_product,
    nf4,
    rms_norm_triton,
    rotary,
    token_logps_triton,
    tree_attention_triton,
)
from lowmem_dpo_kernels import token_logps_fused as fused
from lowmem_dpo_kernels.heads import HeadSlice, ScoredRows


class Case(NamedTuple):
    """Launches that belong together.

    Attributes:
        label: Of the configuration, in words.
        kernels: Name of each launch, in order.
        launch: Calls the host code.
    """

    label: str
    kernels: tuple[str, ...]
    launch: Callable[[], object]


HALF_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
DTYPES = HALF_DTYPES | {"fp32": torch.float32}


def token_logps(capability: tuple[int, int]) -> Iterator[Case]:
    """The row kernel, on a slice of full width; it is the same on all cards."""
    logits = torch.zeros(1, 8192)
    for name, dtype in DTYPES.items():
        weights = logits if dtype == torch.float32 else logits.to(dtype)
        rows = scored_rows(1, 64, dtype)
        for text, head_slice in head_slices(8192, 8192, dtype):
            arguments = (logits, weights, rows, head_slice)
            yield Case(
                f"{name}{text}",
                ("fold_slice",),
                lambda a=arguments: token_logps_triton.fold_slice(*a),
            )


def token_logps_fused(capability: tuple[int, int]) -> Iterator[Case]:
    """The three kernels of the fused head, on a slice that is not whole tiles."""
    for name, dtype in DTYPES.items():
        sizes = fused.sizes_for(capability, dtype)
        kernels = (
            f"score_tile {sizes.rows}x{sizes.columns}x{sizes.score_step}, "
            f"{sizes.num_stages} stages",
            "fold_tiles",
            f"add_values {sizes.rows}x{sizes.dims}x{sizes.value_step}, {sizes.num_stages} stages",
        )
        rows = scored_rows(256, 128, dtype)
        workspace = rows.queries.new_zeros(fused.weights_numel(sizes, 256, 1000))
        for text, head_slice in head_slices(1000, 1024, dtype):
            arguments = (rows, head_slice, workspace, sizes)
            yield Case(f"{name}{text}", kernels, lambda a=arguments: fused.fold_slice(*a))


def scored_rows(
    num_rows: int, dim: int, dtype: torch.dtype, *, with_gradient: bool = True
) -> ScoredRows:
    """A block of rows; what it sums are fp32 tensors of their own."""
    queries = torch.zeros(num_rows, dim, dtype=dtype)
    return ScoredRows(
        queries=queries,
        targets=torch.zeros(num_rows, dtype=torch.int64),
        top=torch.zeros(num_rows),
        rest=torch.zeros(num_rows),
        target_logit=torch.zeros(num_rows),
        values=torch.zeros(num_rows, dim) if with_gradient else None,
        target_weights=None,
    )


def head_slices(width: int, padded: int, dtype: torch.dtype) -> list[tuple[str, HeadSlice]]:
    """A slice of a plain head and one of a head with all that it may have, each with its name."""
    keys = torch.zeros(padded, 128, dtype=dtype)
    return [
        ("", HeadSlice(keys, 0, width, None, 1.0, None)),
        (", bias, cap", HeadSlice(keys, 0, width, torch.zeros(width), 1.0, 30.0)),
    ]


def nf4_dequantize(capability: tuple[int, int]) -> Iterator[Case]:
    """One kernel; it is the same on all cards."""
    packed, code, levels = torch.zeros(4096, dtype=torch.uint8), torch.zeros(256), torch.zeros(16)
    double = (torch.zeros(128, dtype=torch.uint8), torch.zeros(1), torch.zeros(()))
    for name, dtype in DTYPES.items():
        out = torch.empty(8192, dtype=dtype)
        for text, scales in (("", double), (", one level", (torch.zeros(128), None, None))):
            arguments = (packed, *scales, code, levels, out)
            yield Case(
                f"{name}{text}", ("nf4_dequantize",), lambda a=arguments: nf4.nf4_dequantize(*a)
            )


def tree_attention(capability: tuple[int, int]) -> Iterator[Case]:
    """The three kernels at every head size of the table, and at one that is padded."""
    both = [(None, None), (1000, None), (None, 50.0), (1000, 50.0)]
    for head_size, dtype, settings in (
        *((size, "bf16", both) for size in (64, 128, 256)),
        *((size, "fp16", both[:1]) for size in (64, 128, 256)),
        (80, "bf16", both[:1]),
    ):
        sizes = tree_attention_triton.tile_sizes_for(capability, head_size)
        kernels = tuple(
            f"{kernel} {size.queries}x{size.keys}, {size.num_stages} stages"
            for kernel, size in sizes._asdict().items()
        )
        for window, softcap in settings:
            label = f"E={head_size}, {dtype}"
            label += f"{', window' if window else ''}{', cap' if softcap else ''}"
            arguments = (HALF_DTYPES[dtype], head_size, sizes, window, softcap)
            yield Case(label, kernels, lambda a=arguments: _attend(*a))


def rms_norm(capability: tuple[int, int]) -> Iterator[Case]:
    """Rows of a hidden state and of a head; the same on all cards."""
    for width in (128, 4096, 8192):
        for name, dtype in HALF_DTYPES.items():
            for family, kind in (("llama", NormKind(1e-6)), ("gemma", NormKind(1e-6, 1.0, False))):
                rows, rstd = torch.zeros(3, width, dtype=dtype), torch.zeros(3)
                yield Case(
                    f"D={width}, {name}, {family}",
                    ("forward", "backward"),
                    lambda x=rows, rstd=rstd, kind=kind: _normalise(x, rstd, kind),
                )


def gate(capability: tuple[int, int]) -> Iterator[Case]:
    """Gate and up apart, and as halves of one product; the same on all cards."""
    for name, dtype in HALF_DTYPES.items():
        in_one = torch.zeros(3, 2 * 14336, dtype=dtype, requires_grad=True).chunk(2, dim=1)
        apart = [part.detach().clone().requires_grad_() for part in in_one]
        for activation in gated_product.ACTIVATIONS:
            for text, parts in (("", apart), (", in one", in_one)):
                yield Case(
                    f"{activation}, {name}{text}",
                    ("forward", "backward"),
                    lambda parts=parts, activation=activation: _gate(*parts, activation),
                )


def rotate(capability: tuple[int, int]) -> Iterator[Case]:
    """Forth and back for the heads of some models; the same on all cards."""
    for heads, head_size in ((32, 128), (8, 128), (16, 256), (14, 64), (9, 96)):
        for name, dtype in HALF_DTYPES.items():
            x = torch.zeros(3, heads, head_size, dtype=dtype, requires_grad=True)
            yield Case(
                f"H={heads}, E={head_size}, {name}",
                ("forward", "backward"),
                lambda x=x: _rotate(x),
            )


def _rotate(x: torch.Tensor) -> None:
    table = torch.zeros_like(x[:, 0])
    out = rotary.rotary(x, table, table)
    torch.autograd.grad(out, x, torch.zeros_like(out))


def _gate(gate: torch.Tensor, up: torch.Tensor, activation: str) -> None:
    out = gated_product.gated_product(gate, up, activation)
    torch.autograd.grad(out, (gate, up), torch.zeros_like(out))


def _normalise(x: torch.Tensor, rstd: torch.Tensor, kind: NormKind) -> None:
    rms_norm_triton.forward(x, x[0], kind, x.clone(), rstd)
    rms_norm_triton.backward(x, x, x[0], kind, rstd, x.clone())


def _attend(
    dtype: torch.dtype,
    head_size: int,
    sizes: tree_attention_triton.TileSizes,
    window: int | None,
    softcap: float | None,
) -> None:
    """Forward and backward over two trees, grouped heads, seen as projections are."""
    plan = TreePlan([(0, 300, 50, 60), (410, 40, 30, 20)], 512)
    query, key, value = (
        torch.zeros(512, heads, head_size, dtype=dtype).transpose(0, 1) for heads in (4, 2, 2)
    )
    settings = (0.1, window, softcap)
    out, lse = tree_attention_triton.forward(query, key, value, plan, sizes.forward, *settings)
    tree_attention_triton.backward(out, query, key, value, out, lse, plan, sizes, *settings)


LAUNCHES = {
    "rms_norm": rms_norm,
    "gated_product": gate,
    "rotary": rotate,
    "token_logps": token_logps,
    "token_logps_fused": token_logps_fused,
    "nf4_dequantize": nf4_dequantize,
    "tree_attention": tree_attention,
}

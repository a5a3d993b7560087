"""Every configuration of every Triton kernel, as launches by its own host code.

A list an operation: tests compile them, `kernel_resources.py` prints what they take. Where a table
decides by card, so does the list.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from lowmem_dpo_kernels import (
    NormRule,
    TreePlan,
    nf4,
    rms_norm_triton,
    token_logps_triton,
    tree_attention_triton,
)
from lowmem_dpo_kernels import token_logps_fused as token_logps_fused_kernels


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


def token_logps(capability: tuple[int, int]) -> Iterator[Case]:
    """The row kernel, on a slice of full width; it is the same on all cards."""
    row, logits = torch.zeros(1), torch.zeros(1, 8192)
    for name, dtype in (HALF_DTYPES | {"fp32": torch.float32}).items():
        weights = logits if dtype == torch.float32 else logits.to(dtype)
        for bias, softcap in ((None, None), (torch.zeros(8192), 30.0)):
            arguments = (logits, torch.tensor([1]), row, row.clone(), row.clone(), weights)
            settings = {
                "with_weights": True,
                "bias": bias,
                "width": 8192,
                "logit_scale": 1.0,
                "logit_softcap": softcap,
                "headroom": 0.0,
            }
            yield Case(
                f"{name}{', bias, cap' if softcap else ''}",
                ("fold_slice",),
                lambda a=arguments, s=settings: token_logps_triton.fold_slice(*a, **s),
            )


def token_logps_fused(capability: tuple[int, int]) -> Iterator[Case]:
    """The three kernels of the fused head, on a slice that is not whole tiles."""
    for name, dtype in (HALF_DTYPES | {"fp32": torch.float32}).items():
        tiles = token_logps_fused_kernels.tiles_for(capability, dtype)
        kernels = (
            f"score_tile {tiles.rows}x{tiles.columns}x{tiles.score_step}, "
            f"{tiles.num_stages} stages",
            "fold_tiles",
            f"add_values {tiles.rows}x{tiles.dims}x{tiles.value_step}, {tiles.num_stages} stages",
        )
        for bias, softcap in ((None, None), (torch.zeros(1000), 30.0)):
            label = f"{name}{', bias, cap' if softcap else ''}"
            yield Case(label, kernels, lambda a=(dtype, tiles, bias, softcap): _fold_fused(*a))


def _fold_fused(
    dtype: torch.dtype,
    tiles: token_logps_fused_kernels.Tiles,
    bias: torch.Tensor | None,
    softcap: float | None,
) -> None:
    """One slice of the head to one block of rows, with gradient."""
    row, queries = torch.zeros(256), torch.zeros(256, 128, dtype=dtype)
    workspace = queries.new_zeros(token_logps_fused_kernels.weights_numel(tiles, 256, 1000))
    token_logps_fused_kernels.fold_slice(
        queries,
        torch.zeros(1024, 128, dtype=dtype),
        torch.zeros(256, dtype=torch.int64),
        row,
        row.clone(),
        row.clone(),
        torch.zeros(256, 128),
        workspace,
        tiles=tiles,
        bias=bias,
        width=1000,
        logit_scale=1.0,
        logit_softcap=softcap,
    )


def nf4_dequantize(capability: tuple[int, int]) -> Iterator[Case]:
    """One kernel; it is the same on all cards."""
    packed, code, levels = torch.zeros(4096, dtype=torch.uint8), torch.zeros(256), torch.zeros(16)
    double = (torch.zeros(128, dtype=torch.uint8), torch.zeros(1), torch.zeros(()))
    for name, dtype in (HALF_DTYPES | {"fp32": torch.float32}).items():
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
        tiles = tree_attention_triton.tiles_for(capability, head_size)
        kernels = tuple(
            f"{kernel} {tile.queries}x{tile.keys}, {tile.num_stages} stages"
            for kernel, tile in tiles._asdict().items()
        )
        for window, softcap in settings:
            label = f"E={head_size}, {dtype}"
            label += f"{', window' if window else ''}{', cap' if softcap else ''}"
            arguments = (HALF_DTYPES[dtype], head_size, tiles, window, softcap)
            yield Case(label, kernels, lambda a=arguments: _attend(*a))


def rms_norm(capability: tuple[int, int]) -> Iterator[Case]:
    """Rows of a hidden state and of a head; the same on all cards."""
    for width in (128, 4096, 8192):
        for name, dtype in HALF_DTYPES.items():
            for family, rule in (("llama", NormRule(1e-6)), ("gemma", NormRule(1e-6, 1.0, False))):
                rows, rstd = torch.zeros(3, width, dtype=dtype), torch.zeros(3)
                yield Case(
                    f"D={width}, {name}, {family}",
                    ("forward", "backward"),
                    lambda x=rows, rstd=rstd, rule=rule: _normalise(x, rstd, rule),
                )


def _normalise(x: torch.Tensor, rstd: torch.Tensor, rule: NormRule) -> None:
    rms_norm_triton.forward(x, x[0], rule, x.clone(), rstd)
    rms_norm_triton.backward(x, x, x[0], rule, rstd, x.clone())


def _attend(
    dtype: torch.dtype,
    head_size: int,
    tiles: tree_attention_triton.Tiles,
    window: int | None,
    softcap: float | None,
) -> None:
    """Forward and backward over two trees, grouped heads, seen as projections are."""
    plan = TreePlan([(0, 300, 50, 60), (410, 40, 30, 20)], 512)
    query, key, value = (
        torch.zeros(512, heads, head_size, dtype=dtype).transpose(0, 1) for heads in (4, 2, 2)
    )
    settings = (0.1, window, softcap)
    out, lse = tree_attention_triton.forward(query, key, value, plan, tiles.forward, *settings)
    tree_attention_triton.backward(out, query, key, value, out, lse, plan, tiles, *settings)


LAUNCHES = {
    "rms_norm": rms_norm,
    "token_logps": token_logps,
    "token_logps_fused": token_logps_fused,
    "nf4_dequantize": nf4_dequantize,
    "tree_attention": tree_attention,
}

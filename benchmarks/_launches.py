"""Every configuration of every Triton kernel, as launches by its own host code.

A list an operation: tests compile them, `kernel_resources.py` prints what they take. Where a table
decides by card, so does the list.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from lowmem_dpo_kernels import TreePlan, token_logps_triton, tree_attention_triton


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


LAUNCHES = {"token_logps": token_logps, "tree_attention": tree_attention}

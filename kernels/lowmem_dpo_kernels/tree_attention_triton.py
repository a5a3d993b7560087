"""The launches of `tree_attention`'s kernels, and the table of their tiles.

The table is static: a card and a head size decide, so nothing is tuned at the start of a run, and
equal runs have equal bits. Its sizes are bounded by registers and shared memory, which
`benchmarks/kernel_resources.py` prints for every entry.

Shapes: N packed tokens, H query heads, K key heads, E head size.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from lowmem_dpo_kernels import tree_attention_kernels
from lowmem_dpo_kernels.tree_attention_plan import TreePlan
from lowmem_dpo_kernels.triton_support import launch

LOG2_E = math.log2(math.e)
INTERPRETED = triton.knobs.runtime.interpret  # kernels run on the CPU, for tests


class TileSize(NamedTuple):
    """How a kernel is cut: rows of a tile, warps of a program, stages of a loop's loads."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


class TileSizes(NamedTuple):
    """Those of the three kernels: part of the numerics, so a matter of card and head size alone."""

    forward: TileSize
    query_gradient: TileSize
    key_gradient: TileSize


AMPERE = {  # compute capability 8.0: 163 KiB of shared memory
    64: TileSizes(TileSize(128, 64, 4, 2), TileSize(64, 64, 4, 3), TileSize(64, 64, 4, 3)),
    128: TileSizes(TileSize(128, 64, 8, 3), TileSize(64, 64, 8, 3), TileSize(64, 64, 8, 3)),
    256: TileSizes(TileSize(64, 64, 8, 2), TileSize(64, 32, 8, 2), TileSize(32, 32, 8, 2)),
}
HOPPER = {  # 9.0 and 10.0: 227 KiB, products of four warps at a time
    64: TileSizes(TileSize(128, 128, 8, 3), TileSize(128, 64, 8, 3), TileSize(64, 128, 8, 3)),
    128: TileSizes(TileSize(128, 64, 8, 3), TileSize(128, 64, 8, 2), TileSize(32, 128, 8, 3)),
    256: TileSizes(TileSize(128, 32, 8, 2), TileSize(64, 32, 8, 2), TileSize(32, 32, 8, 2)),
}
CONSUMER = {  # 8.6, 8.9, 12.0 and others: 99 KiB
    64: TileSizes(TileSize(128, 64, 4, 2), TileSize(64, 64, 4, 3), TileSize(64, 64, 4, 3)),
    128: TileSizes(TileSize(128, 32, 8, 2), TileSize(64, 64, 8, 2), TileSize(64, 64, 8, 2)),
    256: TileSizes(TileSize(64, 32, 8, 2), TileSize(64, 16, 8, 2), TileSize(32, 32, 8, 2)),
}
TABLES = {(8, 0): AMPERE, (9, 0): HOPPER, (10, 0): HOPPER}


def tile_sizes_for(capability: tuple[int, int], head_size: int) -> TileSizes:
    """What the table says of a card's compute capability and a head size up to 256."""
    return TABLES.get(capability, CONSUMER)[_padded(head_size)]


def _padded(head_size: int) -> int:
    """The power of two that a head's columns are padded to, in registers alone."""
    return max(64, triton.next_power_of_2(head_size))


def _settings(
    query: Tensor,
    key: Tensor,
    size: TileSize,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
) -> dict[str, Any]:
    """What all three launches are told besides pointers and strides."""
    # Without a cap a score is outer * product; with one it is outer * tanh, of inner * product / 2.
    outer = LOG2_E * (scale if softcap is None else softcap)
    inner = 0.0 if softcap is None else 2.0 * LOG2_E * scale / softcap
    return {
        "num_tokens": query.shape[1],
        "outer": outer,
        "inner": inner,
        "window": 0 if sliding_window is None else sliding_window,
        "GROUP": query.shape[0] // key.shape[0],
        "HEAD_SIZE": query.shape[2],
        "BLOCK_M": size.queries,
        "BLOCK_N": size.keys,
        "BLOCK_E": _padded(query.shape[2]),
        "HAS_WINDOW": sliding_window is not None,
        "HAS_SOFTCAP": softcap is not None,
        "UPCAST": INTERPRETED and query.dtype == torch.bfloat16,
        "num_warps": size.num_warps,
        "num_stages": size.num_stages,
        "enable_fp_fusion": True,  # Triton's default varies with its version and environment
    }


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: TreePlan,
    size: TileSize,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Attention of every tree of a pack.

    Arguments are those of `tree_attention`, with the size of a tile.

    Returns:
        [N, H, E] in query's dtype, and [H, N] fp32, the logarithm to base 2 of the softmax's sum.
    """
    num_heads, num_tokens, head_size = query.shape
    out = query.new_empty(num_tokens, num_heads, head_size)
    lse = query.new_empty(num_heads, num_tokens, dtype=torch.float32)
    tiles = plan.query_tiles(size.queries, query.device)
    launch(
        tree_attention_kernels.forward_kernel,
        (len(tiles) * num_heads,),
        *(query, key, value, out, lse, tiles),
        *(stride for x in (query, key, value) for stride in x.stride()[:2]),
        NUM_HEADS=num_heads,
        flops=4.0 * head_size * num_heads * plan.num_pairs(sliding_window),
        **_settings(query, key, size, scale, sliding_window, softcap),
    )
    return out, lse


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: TreePlan,
    sizes: TileSizes,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query [H, N, E], key and value [K, N, E], from that of out [N, H, E].

    Arguments are those of `forward`, and its results.
    """
    (num_heads, num_tokens, head_size), num_key_heads = query.shape, len(key)
    grad_query = query.new_empty(num_tokens, num_heads, head_size)
    grad_key, grad_value = query.new_empty(2, num_tokens, num_key_heads, head_size)
    delta = torch.empty_like(lse)
    query_tiles = plan.query_tiles(sizes.query_gradient.queries, query.device)
    key_tiles = plan.key_tiles(sizes.key_gradient.keys, query.device)
    views = (query, key, value, grad_out.transpose(0, 1))
    strides = [stride for x in views for stride in x.stride()[:2]]  # from head to head, row to row
    settings = (scale, sliding_window, softcap)
    num_pairs = plan.num_pairs(sliding_window)
    launch(
        tree_attention_kernels.query_gradient_kernel,
        (len(query_tiles) * num_heads,),
        *(query, key, value, out, grad_out, lse, delta, grad_query, query_tiles),
        *strides,
        scale=scale,
        NUM_HEADS=num_heads,
        flops=6.0 * head_size * num_heads * num_pairs,
        **_settings(query, key, sizes.query_gradient, *settings),
    )
    launch(
        tree_attention_kernels.key_gradient_kernel,
        (len(key_tiles) * num_key_heads,),
        *(query, key, value, grad_out, lse, delta, grad_key, grad_value, key_tiles),
        *strides,
        scale=scale,
        NUM_KEY_HEADS=num_key_heads,
        flops=8.0 * head_size * num_heads * num_pairs,
        **_settings(query, key, sizes.key_gradient, *settings),
    )
    grads = (grad_query, grad_key, grad_value)
    return tuple(grad.transpose(0, 1) for grad in grads)  # type: ignore[return-value]

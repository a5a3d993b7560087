"""Attention over packed token trees: a trunk is computed once and read by both of its branches.

A pack holds trees laid end to end, each `[trunk | chosen | rejected]`. With p the position of a
token in its own sequence (both branches continue at the trunk's length), query i sees key j if

    both are of one tree, j is of the trunk or of i's branch, p_j <= p_i, p_i - p_j < window;

    out_i = sum_j softmax_j(softcap(scale q_i k_j)) v_j

FlashAttention's recomputation (Dao, arXiv:2307.08691) over tiles that never cross a tree. The
rejected branch reads the trunk's keys where they lie, which others copy for every branch; chosen
continues the trunk, so both are one causal run. For the idea of sharing the trunk see
arXiv:2410.20305.

Replaces: two scaled_dot_product_attention calls a tree, with the trunk's keys copied for each, or
    softmax(mask(q @ k.T)) @ v over the pack.
FLOPs: 4 E a pair of query and seen key forward, 14 E backward: scores are recomputed in both of its
    passes, the price of sums in a fixed order.
Bytes: q, k, v, out and one fp32 a query and head are kept for the backward pass; beyond those there
    are one more fp32 a query and head, and a few KiB of tables.

A query's bits depend on its own tree alone, with gradient and without: see `tree_attention_plan`.

Shapes: N packed tokens, H query heads, K key heads, E head size.
"""

import os
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lowmem_dpo_kernels.tree_attention_plan import TreePlan
from lowmem_dpo_kernels.triton_support import capability_of, runs_triton

MAX_HEAD_SIZE = 256
HALF_DTYPES = (torch.float16, torch.bfloat16)


class _TreeAttentionFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: TreePlan, *settings: Any
    ) -> Tensor:
        from lowmem_dpo_kernels import tree_attention_triton as kernels

        sizes = kernels.tile_sizes_for(_capability(query.device), query.shape[2])
        out, lse = kernels.forward(query, key, value, plan, sizes.forward, *settings)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.plan, ctx.sizes, ctx.settings = plan, sizes, settings
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        from lowmem_dpo_kernels import tree_attention_triton as kernels

        if grad_out.stride(2) != 1:
            grad_out = grad_out.contiguous()
        arguments = (*ctx.saved_tensors, ctx.plan, ctx.sizes, *ctx.settings)
        return (*kernels.backward(grad_out, *arguments), None, None, None, None)


def _capability(device: torch.device) -> tuple[int, int]:
    """Compute capability; elsewhere, where Triton only interprets, that of the smaller tiles."""
    return capability_of(device) if device.type == "cuda" else (8, 6)


def tree_attention_path(device: torch.device | str, dtype: torch.dtype, head_size: int) -> str:
    """What computes tree attention best on `device`, and on what its last bits depend.

    Args:
        device: Of query, key and value.
        dtype: Theirs.
        head_size: E.

    Returns:
        "triton" and the sizes of the tiles, or "" where `tree_attention` does not run: elsewhere
        than on CUDA from compute capability 8.0, in fp32, where Triton cannot compile, at E > 256.
    """
    device = torch.device(device)
    fits = dtype in HALF_DTYPES and head_size <= MAX_HEAD_SIZE
    if not fits or not runs_triton(device):
        return ""
    from lowmem_dpo_kernels.tree_attention_triton import tile_sizes_for

    sizes = tile_sizes_for(_capability(device), head_size)
    return f"triton, tiles {', '.join(f'{size.queries}x{size.keys}' for size in sizes)}"


def tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: TreePlan,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention of every tree of one pack, by Triton kernels.

    Differentiable once. Inputs may be strided views, such as projections [N, H * E] seen as
    [H, N, E]: nothing is copied.

    Args:
        query: [H, N, E] float16 or bfloat16, E at most 256.
        key: [K, N, E]; K divides H, and query head h reads key head h // (H / K).
        value: [K, N, E].
        plan: Where the trees of the pack are; make it once for all layers.
        scale: Factor on the scores.
        sliding_window: Positions a query looks back, itself included; None for all.
        softcap: Cap c of c * tanh(scores / c), after the scale; None for none.

    Returns:
        [N, H, E] in query's dtype, contiguous; zero behind the last tree.

    Raises:
        ValueError: If shapes, dtypes, devices or settings do not fit, or the kernels cannot run.
    """
    check_attention_inputs(query, key, value, plan.num_tokens, sliding_window, softcap)
    # Triton's interpreter runs kernels on the CPU, in fp32 too, for tests.
    runs = tree_attention_path(query.device, query.dtype, query.shape[2])
    if not runs and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            "tree_attention needs Triton, CUDA from compute capability 8.0, float16 or bfloat16 "
            f"and E <= {MAX_HEAD_SIZE}, got {query.dtype} on {query.device}, E = {query.shape[2]}; "
            "use scaled_dot_product_attention tree by tree"
        )
    # N, not a tree's length: which code runs must not depend on what is in the pack. Nor may a
    # window be large: kernels add positions to it in 32 bits.
    if sliding_window is not None and sliding_window >= plan.num_tokens:
        sliding_window = None
    return _TreeAttentionFunction.apply(query, key, value, plan, scale, sliding_window, softcap)


def check_attention_inputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_tokens: int,
    sliding_window: int | None,
    softcap: float | None,
) -> None:
    """Refuse heads, lengths, dtypes, devices and settings that do not fit together.

    Arguments are those of `tree_attention`; `num_tokens` is the plan's.

    Raises:
        ValueError: For the first that does not fit.
    """
    fits = query.dim() == 3 and key.dim() == 3 and key.shape == value.shape
    fits = fits and query.shape[1:] == key.shape[1:] and query.shape[1] == num_tokens
    if not fits or not len(key) or len(query) % len(key):
        raise ValueError(
            "query must be [H, N, E], key and value [K, N, E], K a divisor of H and N the plan's, "
            f"got {list(query.shape)}, {list(key.shape)}, {list(value.shape)} and a plan of "
            f"{num_tokens} tokens"
        )
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise ValueError(
                f"{name} must be {query.dtype} on {query.device} as query is, got {tensor.dtype} "
                f"on {tensor.device}; call {name}.to(query)"
            )
        if tensor.stride(2) != 1:
            raise ValueError(
                f"{name} must have unit stride in its last dimension, got {tensor.stride(2)}; "
                f"call {name}.contiguous()"
            )
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(
            f"sliding_window must be at least 1, got {sliding_window}; use None for no window"
        )
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be > 0, got {softcap}; use None for no cap")

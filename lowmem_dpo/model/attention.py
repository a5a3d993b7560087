"""Attention over packed trees: a trunk is computed once and read by both of its branches.

A pack holds trees laid end to end, each `[trunk | chosen | rejected]`. A token attends to its own
tree only: trunk tokens causally to the trunk, a branch to the whole trunk and causally to itself.
So a tree is two dense causal calls, whatever its neighbours are:

    A: queries trunk+chosen, keys trunk+chosen (causal)
    B: queries rejected,     keys trunk+rejected (causal, aligned at the bottom right)

The positions of a branch follow those of the trunk, so within a segment distances are those of the
plain sequence, and a layer's sliding window is counted there: a rejected token sees trunk and
rejected tokens within the window, whatever lies between them in the pack.

On CUDA a Triton kernel does all of it at once and reads the trunk where it lies
(`lowmem_dpo_kernels.tree_attention`); elsewhere PyTorch's attention does it call by call. There
packs of most families pass through `joined_attention`, plain sequences through their own module.

Nothing quadratic in the pack is ever built, and a tree's result has the same bits in any pack. The
function is registered with transformers under `TREE_ATTENTION`; layers pass `tree_layout` on to it.

Shapes: N packed tokens, H query heads, K key heads, E head size.
"""

import functools
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, PretrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import lowmem_dpo_kernels
from lowmem_dpo.linears.lora import project
from lowmem_dpo.machine.rotation import rotation
from lowmem_dpo.machine.trial import check_error, once_a_device, passes_trial, value_and_gradients
from lowmem_dpo.memory.fake_card import fake_attention
from lowmem_dpo.model.language_model import head_sizes
from lowmem_dpo.model.tiled_attention import tiled_attention
from lowmem_dpo_kernels import TreeLayout, TreePlan, tree_attention_path, twins
from lowmem_dpo_kernels.triton_support import capability_of, is_rehearsing

# One family of kernels for both segments of a tree; cuDNN would plan anew for every length.
BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

SEQUENCE_ATTENTION = "lowmem_dpo_sequence"
TREE_ATTENTION = "lowmem_dpo_tree"
TREE_ATTENTION_BY_TORCH = "lowmem_dpo_tree_torch"

# Relative Frobenius error between two correct attentions in bfloat16; wrong ones are far off.
_TRIAL_TOLERANCE = 0.02


class Variant(NamedTuple):
    """What of a layer is compiled into the kernels: another variant is other code."""

    num_heads: int
    num_key_heads: int
    head_size: int
    has_window: bool
    has_softcap: bool


class AttentionKind(NamedTuple):
    """How the scores of one layer are made, and how far back a token sees."""

    scaling: float
    sliding_window: int | None
    softcap: float | None


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    tree_layout: TreeLayout | None = None,
    on_tree_attention: Any = None,
    may_use_kernels: bool = True,
    **ignored: Any,
) -> tuple[Tensor, None]:
    """Attention of every tree of one pack.

    Args:
        module: The calling attention layer.
        query: [1, H, N, E].
        key: [1, K, N, E]; K divides H.
        value: [1, K, N, E].
        attention_mask: None; the layout says everything.
        scaling: Factor on the scores.
        sliding_window: Of this layer: a token sees itself and so many less one before it.
        softcap: Of this layer: c of c * tanh(score / c).
        tree_layout: Where the trees are.
        on_tree_attention: Called with `module`, so that the self-check can count the layers that
            came here.
        may_use_kernels: Whether the Triton kernels may, where they run and passed their trial.
        **ignored: What transformers passes to every attention function (dropout of a model in eval
            mode is 0).

    Returns:
        [1, N, H, E], zero behind the last tree, and None for the weights.

    Raises:
        ValueError: If a caller ran the model without a layout.
    """
    if tree_layout is None:
        raise ValueError(f"the model runs with attention {TREE_ATTENTION!r} but got no tree_layout")
    if on_tree_attention is not None:
        on_tree_attention(module)
    kind = AttentionKind(scaling, sliding_window, softcap)
    (_, heads, _, head_size), key_heads = query.shape, key.shape[1]
    variant = Variant(heads, key_heads, head_size, sliding_window is not None, softcap is not None)
    if may_use_kernels and _kernel_path(query.device, query.dtype, variant):
        return _by_kernel(query, key, value, tree_layout, kind), None
    return segment_attention(query, key, value, tree_layout, kind), None


def attention_path(config: PretrainedConfig, device: torch.device, dtype: torch.dtype) -> str:
    """What tree attention of a model runs by; another path may differ in the last bits.

    Args:
        config: The language model's.
        device: Where it computes.
        dtype: In what it computes.
    """
    has_softcap = getattr(config, "attn_logit_softcapping", None) is not None
    # Some layers of a model may have its window, and a window longer than a pack is none.
    has_window = getattr(config, "sliding_window", None) is not None
    paths = [
        _kernel_path(device, dtype, Variant(*head_sizes(config), window, has_softcap))
        for window in ((False, True) if has_window else (False,))
        if config._attn_implementation != TREE_ATTENTION_BY_TORCH
    ]
    if not any(paths):
        return TREE_ATTENTION
    return ", ".join([TREE_ATTENTION, *(path or "torch" for path in dict.fromkeys(paths))])


def _kernel_path(device: torch.device, dtype: torch.dtype, variant: Variant) -> str:
    """What the kernels run as here; empty where they do not run, or failed their trial."""
    path = tree_attention_path(device, dtype, variant.head_size)
    return path if path and _kernels_agree(device, dtype, variant) else ""


@once_a_device
def _kernels_agree(device: torch.device, dtype: torch.dtype, variant: Variant) -> bool:
    trial = functools.partial(_try_kernels, device, dtype, variant)
    kernels = "the tree attention kernels"
    return passes_trial(trial, "attention", kernels, device, "PyTorch's attention")


def _try_kernels(device: torch.device, dtype: torch.dtype, variant: Variant) -> None:
    """Compare with PyTorch's attention, gradients too: the check at load sees log-probs only.

    Heads are views of projections, as a model's are, so that its own code is what is tried. A
    layer with a window runs without one where packs are shorter, so both are.
    """
    layout, num_tokens = ((0, 70, 90, 40), (200, 5, 0, 33), (238, 1, 30, 0)), 320
    heads, key_heads, head_size = variant[:3]
    generator = torch.Generator().manual_seed(0)
    *inputs, upstream = (
        torch.randn(1, num_tokens, count, head_size, generator=generator)
        .to(device, dtype)
        .transpose(1, 2)
        for count in (heads, key_heads, key_heads, heads)
    )
    upstream = upstream.transpose(1, 2).contiguous()
    for window in (None, 32) if variant.has_window else (None,):
        softcap = 20.0 if variant.has_softcap else None
        kind = AttentionKind(head_size**-0.5, window, softcap)
        results = [
            value_and_gradients(attend, inputs, upstream, layout, kind)
            for attend in (_by_kernel, segment_attention)
        ]
        for ours, expected in zip(*results, strict=True):
            check_error(ours, expected, _TRIAL_TOLERANCE, f"window {window}, soft-cap {softcap}")


def _by_kernel(
    query: Tensor, key: Tensor, value: Tensor, tree_layout: TreeLayout, kind: AttentionKind
) -> Tensor:
    """All trees at once; [1, N, H, E]."""
    out = lowmem_dpo_kernels.tree_attention(
        query.squeeze(0),  # a view; query[0] has zeros and a copy for a gradient
        key.squeeze(0),
        value.squeeze(0),
        _plan(tuple(tree_layout), query.shape[2]),
        scale=kind.scaling,
        sliding_window=kind.sliding_window,
        softcap=kind.softcap,
    )
    return out[None]


@functools.partial(once_a_device, at_most=8)
def _plan(tree_layout: TreeLayout, num_tokens: int) -> TreePlan:
    """The tables of a pack, made for its first layer and read by all others, forth and back."""
    return TreePlan(tree_layout, num_tokens)


def joined_attention(
    module: Any,
    x: Tensor,
    has_softcap: bool,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: None = None,
    **arguments: Any,
) -> Tensor:
    """An attention module on one pack, [1, N, D] to [1, N, D]: linears joined, one kernel rotates.

    The module is transformers', of a family that `is_joined`. cos and sin are [1, N, E]; arguments
    are those of `tree_attention`.
    """
    config, shape = module.config, (x.shape[1], -1, module.head_dim)
    projections = project(x, (module.q_proj, module.k_proj, module.v_proj))
    query, key, value = (y.view(shape) for y in projections)
    if hasattr(module, "q_norm"):
        query, key = module.q_norm(query), module.k_norm(key)
    by_torch = config._attn_implementation == TREE_ATTENTION_BY_TORCH
    rotate = twins.rotary if by_torch else rotation(x.device, x.dtype, module.head_dim)
    cos, sin = (table.squeeze(0) for table in position_embeddings)
    query, key = rotate(query, cos, sin), rotate(key, cos, sin)
    heads = (part.transpose(0, 1).unsqueeze(0) for part in (query, key, value))
    window = getattr(module, "sliding_window", getattr(config, "sliding_window", None))
    arguments |= {"scaling": module.scaling, "sliding_window": window}
    if has_softcap:
        arguments["softcap"] = module.attn_logit_softcapping
    attend = ALL_ATTENTION_FUNCTIONS[config._attn_implementation]
    return module.o_proj(attend(module, *heads, attention_mask, **arguments)[0].flatten(2))


def sequence_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **ignored: Any,
) -> tuple[Tensor, None]:
    """Attention of the last tokens of one plain sequence; those before are in a cache.

    Args:
        module: The calling attention layer.
        query: [1, H, Q, E].
        key: [1, K, S, E], of the last S positions; K divides H.
        value: [1, K, S, E].
        attention_mask: None; there is no padding.
        scaling: As for `tree_attention`.
        sliding_window: As for `tree_attention`.
        softcap: As for `tree_attention`.
        **ignored: As for `tree_attention`.

    Returns:
        [1, Q, H, E], and None for the weights.
    """
    kind = AttentionKind(scaling, sliding_window, softcap)
    return _attend(query, key, value, kind=kind).transpose(1, 2).contiguous(), None


def segment_attention(
    query: Tensor, key: Tensor, value: Tensor, tree_layout: TreeLayout, kind: AttentionKind
) -> Tensor:
    """Attention of every tree by PyTorch, one call a segment.

    Args:
        query: [1, H, N, E].
        key: [1, K, N, E].
        value: [1, K, N, E].
        tree_layout: Where the trees are.
        kind: Of the layer.

    Returns:
        [1, N, H, E].
    """
    sizes = [size for _, *lengths in tree_layout for size in lengths]
    padding = query.shape[2] - sum(sizes)
    # split(), not slices: its backward is one concatenation, a slice's a zero-filled [N] each
    queries = query.split([*sizes, padding], dim=2)
    keys, values = key.split([*sizes, padding], dim=2), value.split([*sizes, padding], dim=2)
    outputs = []
    for i in range(0, len(sizes), 3):
        segments = [([i, i + 1], [i, i + 1])]  # queries of these parts over keys of those
        if sizes[i + 2]:
            segments.append(([i + 2], [i, i + 2]))
        for own, seen in segments:
            parts = (queries, own), (keys, seen), (values, seen)
            joined = (torch.cat([tensors[j] for j in these], dim=2) for tensors, these in parts)
            outputs.append(_attend(*joined, kind=kind))
    outputs.append(queries[-1].new_zeros(queries[-1].shape))
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, *, kind: AttentionKind) -> Tensor:
    """Queries [1, H, Q, E] over keys [1, K, S, E], causal from the bottom right."""
    window = kind.sliding_window
    if kind.softcap is not None or (window is not None and window < k.shape[2]):
        return tiled_attention(q, k, v, scaling=kind.scaling, window=window, softcap=kind.softcap)
    on_card = q.device.type == "cuda"
    if on_card and not _has_flash(q.device, q.dtype):
        # Of torch's kernels without a [q, k] matrix only flash takes grouped heads.
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    if on_card and is_rehearsing():
        return fake_attention(q, k, v, kind.scaling, _has_flash(q.device, q.dtype))
    mask: Tensor | None = None
    square = q.shape[2] == k.shape[2]
    if q.shape[2] == 1:
        square = False  # one query sees all keys
    elif not square and on_card:
        mask = causal_lower_right(q.shape[2], k.shape[2])
    elif not square:  # elsewhere torch would make the same of it
        mask = q.new_ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    with sdpa_kernel(BACKENDS) if on_card else nullcontext():
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=square,
            scale=kind.scaling,
            enable_gqa=q.shape[1] != k.shape[1],
        )


@once_a_device
def _has_flash(device: torch.device, dtype: torch.dtype) -> bool:
    is_half = dtype in (torch.float16, torch.bfloat16)
    return is_half and capability_of(device) >= (8, 0)


# transformers builds no mask for an attention function that has no mask function beside it.
AttentionInterface.register(SEQUENCE_ATTENTION, sequence_attention)
AttentionInterface.register(TREE_ATTENTION, tree_attention)
AttentionInterface.register(
    TREE_ATTENTION_BY_TORCH, functools.partial(tree_attention, may_use_kernels=False)
)

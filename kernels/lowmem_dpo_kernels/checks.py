"""What the kernels ask of their inputs, in one line of plain words each."""

import torch
from torch import Tensor

from lowmem_dpo_kernels.heads import Weight

IGNORED = -100
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_head_inputs(
    hidden: Tensor, rows: Tensor, weight: Weight, targets: Tensor, bias: Tensor | None
) -> None:
    """Refuse shapes, dtypes, devices and indices that do not fit together, and a head that trains.

    Args:
        hidden: [N, D].
        rows: [T] int64 in [0, N).
        weight: [V, D] in hidden's dtype; a tensor, or what hands out its slices.
        targets: [T] int64 in [0, V), or -100.
        bias: [V] in hidden's dtype, or None.

    Raises:
        ValueError: For the first that does not fit. Indices are looked at on the CPU only.
    """
    if hidden.dtype not in DTYPES:
        raise ValueError(
            f"hidden must be floating point, got {hidden.dtype}; cast it, say to float32"
        )
    if hidden.dim() != 2 or len(weight.shape) != 2 or weight.shape[0] < 2:
        raise ValueError(
            f"hidden must be [N, D] and weight [V, D], V at least 2, got {list(hidden.shape)} and "
            f"{list(weight.shape)}; flatten the batch, and pass the head's own weight"
        )
    (num_rows, dim), vocabulary, num_tokens = hidden.shape, weight.shape[0], targets.numel()
    expected: list[tuple[str, Weight | None, tuple[int, ...], torch.dtype]] = [
        ("rows", rows, (num_tokens,), torch.int64),
        ("targets", targets, (num_tokens,), torch.int64),
        ("weight", weight, (vocabulary, dim), hidden.dtype),
        ("bias", bias, (vocabulary,), hidden.dtype),
    ]
    for name, tensor, shape, dtype in expected:
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} must have shape {list(shape)}, got {list(tensor.shape)}; "
                "hidden is [N, D], rows and targets [T], weight [V, D], bias [V]"
            )
        if tensor.dtype != dtype:
            raise ValueError(f"{name} must be {dtype}, got {tensor.dtype}; call {name}.to({dtype})")
        if tensor.device != hidden.device:
            raise ValueError(
                f"{name} must be on hidden's device {hidden.device}, got {tensor.device}; "
                f"call {name}.to(hidden.device)"
            )
        trains = isinstance(tensor, Tensor) and tensor.requires_grad
        if trains and torch.is_grad_enabled():
            raise ValueError(
                f"{name} must be frozen, got requires_grad=True; call {name}.requires_grad_(False)"
            )
    # Looking at values would wait for a CUDA card. There PyTorch's own assertion catches a
    # wrong row, and a wrong target gets a log-prob of NaN.
    if hidden.device.type == "cpu":
        _check_range("rows", rows, num_rows)
        _check_range("targets", targets[targets != IGNORED], vocabulary)


def _check_range(name: str, index: Tensor, end: int) -> None:
    if ((index < 0) | (index >= end)).any():
        raise ValueError(
            f"{name} must be in [0, {end}), got {index.min()} to {index.max()}; "
            f"mark a target that is not scored with {IGNORED}"
        )


def check_attention_inputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_tokens: int,
    sliding_window: int | None,
    softcap: float | None,
) -> None:
    """Refuse heads, lengths, dtypes, devices and settings that do not fit together.

    Args:
        query: [H, N, E], unit stride in E.
        key: [K, N, E] as query; K divides H.
        value: [K, N, E] as query.
        num_tokens: N of the plan.
        sliding_window: At least 1, or None.
        softcap: Above 0, or None.

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

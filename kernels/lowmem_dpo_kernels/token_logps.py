"""Log-probabilities of target tokens and their gradient, in one pass over a frozen output head.

With z = softcap(logit_scale * (W h + b)) for a hidden row h, and d = z_y - log sum_{v != y} e^{z_v}
for a target y:

    logp = log p_y = logsigmoid(d),  1 - p_y = sigmoid(-d)
    g = dlogp/dh = (1 - p_y) * (W_y - sum_{v != y} e^{z_v} W_v / sum_{v != y} e^{z_v})

logp depends on h alone: whatever scalar u the loss sends back, the gradient is u g, and g is known
in the forward pass. z is taken slice by slice of the vocabulary: Z = H Wj^T, E = e^(Z - row
maximum), A += E Wj; attention of queries H to keys and values W, with the running maximum of
Milakov and Gimelshein (arXiv:1805.02867). Keeping the target out of the sums keeps 1 - p_y, and so
the gradient, accurate where p_y rounds to 1. Under a soft-cap c tanh(x / c), e^{z_v} W_v and W_y
carry its slope 1 - tanh^2; logit_scale multiplies g.

Replaces: torch.log_softmax(head(hidden[rows]).float(), -1).gather(-1, targets[:, None])
FLOPs: 4 T D V for values and gradient; recomputing the logits in the backward pass takes 6 T D V.
Bytes saved: the [T, V] logits and their gradient, 8 T V in fp32. Kept for backward: g, 4 T D.

A row's bits depend on its own numbers only: rows run in blocks of a fixed height, zero-padded, and
the sides of every product are multiples of 64, since BLAS libraries sum the edges of other shapes
in another order.

Shapes: N packed tokens, T scored tokens, D hidden, V vocabulary, B rows of a block, S slice width.
"""

import functools
import importlib.util
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lowmem_dpo_kernels import token_logps_torch
from lowmem_dpo_kernels.checks import IGNORED, check_head_inputs
from lowmem_dpo_kernels.triton_support import triton_problem

ALIGNMENT = 64

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _State:
    """Running statistics of T rows, padded to whole blocks.

    The sums leave the target out and are relative to e^top.
    """

    queries: Tensor  # [T, D] operand type
    labels: Tensor  # [T] int64
    top: Tensor  # [T] fp32, maximum so far
    rest: Tensor  # [T] fp32, sum of e^z
    target_logit: Tensor  # [T] fp32, z_y; NaN, and so the log-prob, if no slice holds the target
    values: Tensor | None  # [T, D] fp32, sum of e^z W; None without gradient


def _tile(device: torch.device) -> tuple[int, int]:
    """Rows B of a block and width S of a slice: part of the numerics, so never a matter of T."""
    return (1024, 8192) if device.type == "cuda" else (256, 2048)


def _operand_dtype(hidden: Tensor) -> torch.dtype:
    """The type that both products read. They write fp32 (float64 for float64) in any case.

    Half operands with an fp32 result need a CUDA card of compute capability 7.0 (float16) or 8.0
    (bfloat16); elsewhere the head becomes fp32, slice by slice.
    """
    if hidden.dtype not in (torch.float16, torch.bfloat16):
        return hidden.dtype
    oldest = (7, 0) if hidden.dtype == torch.float16 else (8, 0)
    if hidden.is_cuda and torch.cuda.get_device_capability(hidden.device) >= oldest:
        return hidden.dtype
    return torch.float32


def _pad(length: int, multiple: int = ALIGNMENT) -> int:
    return -(-length // multiple) * multiple


def _start(hidden: Tensor, rows: Tensor, targets: Tensor, with_grads: bool) -> _State:
    """Gather the scored rows; no slice has been seen."""
    num_tokens, dim = len(rows), hidden.shape[1]
    padded_tokens, padded_dim = _pad(num_tokens, _tile(hidden.device)[0]), _pad(dim)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    queries = hidden.new_zeros(padded_tokens, padded_dim, dtype=_operand_dtype(hidden))
    queries[:num_tokens, :dim] = hidden[rows]
    top = hidden.new_full((padded_tokens,), torch.finfo(dtype).min, dtype=dtype)
    return _State(
        queries=queries,
        labels=F.pad(targets, (0, padded_tokens - num_tokens), value=IGNORED),
        top=top,
        rest=torch.zeros_like(top),
        target_logit=torch.full_like(top, torch.nan),
        values=torch.zeros_like(queries, dtype=dtype) if with_grads else None,
    )


def _operand(part: Tensor, workspace: Tensor | None) -> Tensor:
    """A slice [S, D] of the head in the operands' type, zero-padded to multiples of 64."""
    if workspace is None or (part.dtype == workspace.dtype and part.shape == workspace.shape):
        return part
    operand = workspace[: _pad(len(part))]
    operand[: len(part), : part.shape[1]] = part
    operand[len(part) :] = 0
    return operand


def _multiply(left: Tensor, right: Tensor, out: Tensor, *, add: bool = False) -> None:
    """Write `left @ right` to `out`, or add it, unrounded where `out` is fp32 and they are half."""
    kwargs: dict[str, Any] = {} if out.dtype == left.dtype else {"out_dtype": out.dtype}
    if add:
        torch.addmm(out, left, right, out=out, **kwargs)
    else:
        torch.mm(left, right, out=out, **kwargs)


def _fold_vocabulary(
    state: _State,
    weight: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    logit_softcap: float | None,
    fold_slice: Callable[..., Tensor],
) -> None:
    """Bring every slice of the head to every block of rows."""
    (height, width), (vocabulary, dim) = _tile(weight.device), weight.shape
    width, operand_dtype = min(width, _pad(vocabulary)), state.queries.dtype
    logits = state.top.new_empty(height, width)
    weights = logits
    if operand_dtype != logits.dtype:
        weights = torch.empty_like(logits, dtype=operand_dtype)
    fits = weight.dtype == operand_dtype and _pad(dim) == dim and _pad(vocabulary) == vocabulary
    workspace = None if fits else state.queries.new_zeros(width, _pad(dim))
    # float16 needs its upper range too, or it loses the softmax's tail; its maximum is e^11.
    headroom = 10.0 if operand_dtype == torch.float16 else 0.0

    for start in range(0, vocabulary, width):
        part = weight[start : start + width]
        keys = _operand(part, workspace)
        tile, tile_weights = logits[:, : len(keys)], weights[:, : len(keys)]
        for row in range(0, len(state.queries), height):
            block = slice(row, row + height)
            _multiply(state.queries[block], keys.T, out=tile)
            rescale = fold_slice(
                tile,
                state.labels[block] - start,
                state.top[block],
                state.rest[block],
                state.target_logit[block],
                tile_weights,
                with_weights=state.values is not None,
                bias=None if bias is None else bias[start : start + width],
                width=len(part),
                logit_scale=logit_scale,
                logit_softcap=logit_softcap,
                headroom=headroom,
            )
            if state.values is not None:
                values = state.values[block].mul_(rescale[:, None])
                _multiply(tile_weights, keys, out=values, add=True)


def _score(
    with_grads: bool,
    hidden: Tensor,
    rows: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    logit_softcap: float | None,
    path: str,
) -> tuple[Tensor, Tensor | None]:
    """Log-probs [T] and, if wanted, their gradients g [T, D]; fp32, or float64 for float64."""
    state = _start(hidden, rows, targets, with_grads)
    bias = None if bias is None else bias.to(state.top.dtype)
    if len(rows):
        _fold_vocabulary(state, weight, bias, logit_scale, logit_softcap, _fold_function(path))
    log_odds = (state.target_logit - state.top) - state.rest.log()
    ignored = state.labels == IGNORED
    logps = F.logsigmoid(log_odds).masked_fill_(ignored, 0.0)[: len(rows)]
    if state.values is None:
        return logps, None
    factor = logit_scale * torch.sigmoid(-log_odds)
    grads = state.values.div_(state.rest[:, None])[: len(rows), : weight.shape[1]]
    target_rows = weight[targets.clamp(0, len(weight) - 1)].to(grads.dtype)
    if logit_softcap is not None:
        slope = 1.0 - (state.target_logit[: len(rows), None] / logit_softcap).square()
        target_rows.mul_(slope)
    torch.sub(target_rows, grads, out=grads)
    grads.mul_(factor[: len(rows), None]).masked_fill_(ignored[: len(rows), None], 0.0)
    return logps, grads


class _TokenLogpsFunction(torch.autograd.Function):
    """Scores in the forward pass and scatters u g in the backward pass."""

    @staticmethod
    def forward(ctx, hidden, rows, *arguments):
        logps, grads = _score(True, hidden, rows, *arguments)
        ctx.save_for_backward(rows, grads)
        ctx.shape, ctx.dtype = hidden.shape, hidden.dtype
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        rows, grads = ctx.saved_tensors
        scaled = grads * upstream[:, None]
        hidden_grad = grads.new_zeros(ctx.shape)
        # Repeated rows are summed in the order of t: on CUDA by index_put_, which sorts them, where
        # index_add_ uses atomics; on the CPU by index_add_, one by one, where index_put_ may not.
        if hidden_grad.is_cuda:
            hidden_grad.index_put_((rows,), scaled, accumulate=True)
        else:
            hidden_grad.index_add_(0, rows, scaled)
        return hidden_grad.to(ctx.dtype), *[None] * 7


def _choose_path(device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    if device.type != "cuda" or dtype == torch.float64 or triton_problem() is not None:
        return "torch"
    return "triton" if torch.cuda.get_device_capability(device) >= (8, 0) else "torch"


def _fold_function(path: str) -> Callable[..., Tensor]:
    if path == "torch":
        return token_logps_torch.fold_slice
    from lowmem_dpo_kernels import token_logps_triton

    return token_logps_triton.fold_slice


@functools.cache
def _log_path(device_type: str, path: str) -> None:
    logger.info("token_logps on %s takes the %s path", device_type, path)


def token_logps_path(device: torch.device | str) -> str:
    """What `token_logps` runs on `device` by default; another path may differ in the last bits."""
    device = torch.device(device)
    height, width = _tile(device)
    return f"{_choose_path(device)}, blocks of {height} rows, slices of {width} tokens"


def _check_settings(hidden: Tensor, logit_softcap: float | None, implementation: str) -> None:
    if logit_softcap is not None and not logit_softcap > 0:
        raise ValueError(f"logit_softcap must be > 0, got {logit_softcap}; use None for no cap")
    if implementation not in ("auto", "torch", "triton"):
        raise ValueError(f"implementation must be auto, torch or triton, got {implementation!r}")
    if implementation == "triton":
        if not importlib.util.find_spec("triton"):
            raise ValueError(
                "implementation triton needs the package triton; install it or use auto"
            )
        # Triton's interpreter runs kernels on the CPU, for tests.
        if hidden.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(f"implementation triton needs CUDA, got {hidden.device}; use auto")
        if hidden.dtype == torch.float64:
            raise ValueError("implementation triton has no float64, got float64; use auto")


def token_logps(
    hidden: Tensor,
    rows: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    implementation: str = "auto",
) -> Tensor:
    """Log-probability of each target, without materialising the logits.

    The logits are softcap(logit_scale * (hidden[rows] @ weight.T + bias)). Differentiable once, in
    `hidden`. A row's result has the same bits with and without gradient and in any company of rows.

    Args:
        hidden: [N, D] float16, bfloat16, float32 or float64; the last hidden states.
        rows: [T] int64, the row of `hidden` that predicts each target; rows may repeat.
        weight: [V, D] in hidden's dtype, the frozen output head.
        targets: [T] int64; where it is -100, the result is 0 and has no gradient.
        bias: [V] in hidden's dtype, frozen, added to `hidden @ weight.T`.
        logit_scale: Factor of the logits, after the bias.
        logit_softcap: Cap c of c * tanh(logits / c), after the scale; None for none.
        implementation: "torch", "triton" or "auto": triton where it is installed, on CUDA from
            compute capability 8.0, save for float64.

    Returns:
        [T] fp32 (float64 for float64 inputs), in nats.

    Raises:
        ValueError: If shapes, dtypes, devices, indices or settings do not fit, or weight or bias
            requires grad.
    """
    check_head_inputs(hidden, rows, weight, targets, bias)
    _check_settings(hidden, logit_softcap, implementation)
    path = _choose_path(hidden.device, hidden.dtype) if implementation == "auto" else implementation
    _log_path(hidden.device.type, path)
    arguments = (rows, weight, targets, bias, logit_scale, logit_softcap, path)
    if hidden.requires_grad and torch.is_grad_enabled():
        return _TokenLogpsFunction.apply(hidden, *arguments)
    return _score(False, hidden, *arguments)[0]

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

The pass itself is in `token_logps_pass`. Its inner step has three implementations: torch (CPUs and
older cards), triton (cuBLAS products, row statistics in one kernel) and fused (the statistics
inside the product; no logit is written).

Shapes: N packed tokens, T scored tokens, D hidden, V vocabulary.
"""

import functools
import logging
import os

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lowmem_dpo_kernels.heads import IGNORED, FrozenHead, Weight
from lowmem_dpo_kernels.token_logps_pass import pass_numerics, run_pass
from lowmem_dpo_kernels.triton_support import (
    TRITON_CAPABILITY,
    capability_of,
    is_rehearsing,
    runs_triton,
    triton_problem,
)

HEAD_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
logger = logging.getLogger(__name__)


class _TokenLogpsFunction(torch.autograd.Function):
    """Scores in the forward pass and scatters u g in the backward pass."""

    @staticmethod
    def forward(ctx, hidden, rows, *arguments):
        logps, grads = run_pass(hidden, rows, *arguments, grads=True)
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
        if hidden_grad.device.type == "cuda":
            hidden_grad.index_put_((rows,), scaled, accumulate=True)
        else:
            hidden_grad.index_add_(0, rows, scaled)
        return hidden_grad.to(ctx.dtype), *[None] * 4


@functools.cache
def _log_path(device_type: str, path: str) -> None:
    logger.info("token_logps on %s takes the %s path", device_type, path)


def token_logps_path(device: torch.device | str, implementation: str = "auto") -> str:
    """What `token_logps` runs on `device`; another path may differ in the last bits.

    Args:
        device: Where the head is.
        implementation: As for `token_logps`.
    """
    device = torch.device(device)
    height, width, _ = pass_numerics(device, torch.float32)
    path = resolve_implementation("auto", device) if implementation == "auto" else implementation
    return f"{path}, blocks of {height} rows, slices of {width} tokens"


def resolve_implementation(
    implementation: str, device: torch.device, dtype: torch.dtype = torch.float32
) -> str:
    """The path that is taken: torch, triton or fused.

    Args:
        implementation: As for `token_logps`.
        device: Where the head is.
        dtype: Of its hidden states.

    Raises:
        ValueError: If the implementation's name is unknown, or it cannot run on the device, where
            Triton or the right card is missing, or in float64.
    """
    if implementation == "auto":
        # The fused path saves a write and a read of the logits and may win where D is small; no
        # card has measured it yet, so the path whose products are cuBLAS's is taken.
        return "triton" if dtype != torch.float64 and runs_triton(device) else "torch"
    if implementation == "torch":
        return "torch"
    if implementation not in ("triton", "fused"):
        raise ValueError(
            f"implementation must be auto, torch, triton or fused, got {implementation!r}"
        )
    if not is_rehearsing() and (problem := triton_problem()):
        raise ValueError(f"implementation {implementation} cannot run: {problem}; or use auto")
    # Triton's interpreter runs kernels on the CPU, for tests.
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"implementation {implementation} needs CUDA, got {device}; use auto")
    if device.type == "cuda" and capability_of(device) < TRITON_CAPABILITY:
        raise ValueError(
            f"implementation {implementation} needs compute capability 8.0, got "
            f"{capability_of(device)}; use auto"
        )
    if dtype == torch.float64:
        raise ValueError(f"implementation {implementation} has no float64; use auto")
    return implementation


def token_logps(
    hidden: Tensor,
    rows: Tensor,
    weight: Weight,
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
        weight: [V, D] in hidden's dtype, the frozen output head; a tensor, or a `SlicedWeight`.
        targets: [T] int64; where it is -100, the result is 0 and has no gradient.
        bias: [V] in hidden's dtype, frozen, added to `hidden @ weight.T`.
        logit_scale: Factor of the logits, after the bias.
        logit_softcap: Cap c of c * tanh(logits / c), after the scale; None for none.
        implementation: "torch", "triton" (row statistics), "fused" (products too) or "auto":
            triton on CUDA from compute capability 8.0 where it can compile, save for float64.

    Returns:
        [T] fp32 (float64 for float64 inputs), in nats.

    Raises:
        ValueError: If shapes, dtypes, devices or settings do not fit, or weight or bias requires
            grad.
    """
    check_head_inputs(hidden, rows, weight, targets, bias)
    if logit_softcap is not None and not logit_softcap > 0:
        raise ValueError(f"logit_softcap must be > 0, got {logit_softcap}; use None for no cap")
    path = resolve_implementation(implementation, hidden.device, hidden.dtype)
    _log_path(hidden.device.type, path)
    arguments = (rows, targets, FrozenHead(weight, bias, logit_scale, logit_softcap), path)
    if hidden.requires_grad and torch.is_grad_enabled():
        return _TokenLogpsFunction.apply(hidden, *arguments)
    return run_pass(hidden, *arguments, grads=False)[0]


def check_head_inputs(
    hidden: Tensor, rows: Tensor, weight: Weight, targets: Tensor, bias: Tensor | None
) -> None:
    """Refuse shapes, dtypes and devices that do not fit together, and a head that trains.

    Arguments are those of `token_logps`.

    Raises:
        ValueError: For the first that does not fit.
    """
    if hidden.dtype not in HEAD_DTYPES:
        raise ValueError(
            f"hidden must be floating point, got {hidden.dtype}; cast it, say to float32"
        )
    if hidden.dim() != 2 or len(weight.shape) != 2 or weight.shape[0] < 2:
        raise ValueError(
            f"hidden must be [N, D] and weight [V, D], V at least 2, got {list(hidden.shape)} and "
            f"{list(weight.shape)}; flatten the batch, and pass the head's own weight"
        )
    dim, vocabulary, num_tokens = hidden.shape[1], weight.shape[0], targets.numel()
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


def check_indices(rows: Tensor, targets: Tensor, num_rows: int, vocabulary: int) -> None:
    """Refuse indices that `token_logps` would not find.

    It does not look at values itself, since that waits for a card: PyTorch's own assertion catches
    a wrong row, and a wrong target gets a log-prob of NaN. Its caller asks where indices are made.

    Args:
        rows: As for `token_logps`, on the CPU.
        targets: Likewise.
        num_rows: N.
        vocabulary: V.

    Raises:
        ValueError: For the first that does not fit.
    """
    scored = targets[targets != IGNORED]
    for name, index, end in (("rows", rows, num_rows), ("targets", scored, vocabulary)):
        if ((index < 0) | (index >= end)).any():
            raise ValueError(
                f"{name} must be in [0, {end}), got {index.min()} to {index.max()}; "
                f"mark a target that is not scored with {IGNORED}"
            )

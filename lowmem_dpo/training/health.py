"""The checks a run passes on its way: step zero, finite numbers, an adapter that moves.

At the first step the adapter's output is exactly zero (or the starting adapter unchanged), so
policy and reference are the same function: every margin must be 0 and the loss its value there
(sigmoid: ln 2).
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lowmem_dpo.console import name_rows
from lowmem_dpo.stopping import RunStopped

LOSS_TOLERANCE = 0.02
MAX_SKIPPED_IN_A_ROW = 3
STEPS_UNTIL_LORA_B_MOVES = 20


def check_step_zero(
    loss: float,
    expected: float,
    rms_per_token: float,
    tolerance: float,
    same_fingerprint: bool,
) -> tuple[dict[str, float | bool], str | None]:
    """Judge the first step.

    Args:
        loss: Mean loss of the first step, without its likelihood terms.
        expected: What it is at zero margin.
        rms_per_token: Difference between policy and reference log-probs, in nats.
        tolerance: Largest rms difference between two correct computations.
        same_fingerprint: Whether the reference was scored under this run's numerics.

    Returns:
        The figures for run.json, and a warning if the numbers are right but not exact where they
        should be.

    Raises:
        RunStopped: If policy and reference differ by more than rounding.
    """
    allowed = LOSS_TOLERANCE * max(1.0, expected)
    exact = rms_per_token == 0.0
    record = {
        "loss": loss,
        "expected_loss": expected,
        "rms_per_token": rms_per_token,
        "exact": exact,
    }
    if not (rms_per_token <= tolerance and abs(loss - expected) <= allowed):
        raise RunStopped(
            "step zero failed: policy and reference must agree before the first update, but they "
            f"differ by {rms_per_token:.2e} nat rms per token (at most {tolerance:g}) and the loss "
            f"is {loss:.4f} instead of {expected:.4f}; the reference numbers do not belong to this "
            "model: delete the cache folder, or set another cache_dir"
        )
    warning = None
    if not exact and same_fingerprint:
        warning = (
            f"step zero is not exact: {rms_per_token:.2e} nat rms per token under equal numerics; "
            "training is sound, but please report it"
        )
    return record, warning


def describe_non_finite(
    loss: float, grad_norm: float, bad_rows: Sequence[int], rows: Sequence[int]
) -> str:
    """What of a step is not a number, and which pairs to look at.

    Args:
        loss: Of the step.
        grad_norm: Of the step.
        bad_rows: Data rows of the pairs whose own loss or log-prob is not finite.
        rows: All of the step: where every loss is finite, the gradient does not tell whose it is.
    """
    if bad_rows:
        return f"the loss of {name_rows(bad_rows)} is not finite"
    if not math.isfinite(loss):  # finite numbers whose mean is not
        return f"loss {loss}, of {name_rows(rows)}"
    return f"gradient norm {grad_norm}, of {name_rows(rows)}"


def check_skipped(num_in_a_row: int, what: str, step: int) -> str:
    """What to tell of a step whose loss or gradient is not a number; it is skipped.

    Raises:
        RunStopped: If it is the third in a row.
    """
    if num_in_a_row < MAX_SKIPPED_IN_A_ROW:
        return f"step {step} is skipped: {what}; look at it, or lower the learning rate"
    raise RunStopped(
        f"step {step}: {what}; {num_in_a_row} steps in a row had a loss or gradient that is not "
        "finite, the adapter was not changed by them: look at these pairs, or lower the learning "
        "rate"
    )


def check_adapter_moves(parameters: Mapping[str, Tensor], step: int) -> None:
    """Stop a run whose LoRA-B matrices are all still zero: it learns nothing.

    Raises:
        RunStopped: If every one of them is zero.
    """
    if not any(torch.any(p != 0) for name, p in parameters.items() if name.endswith("lora_b")):
        raise RunStopped(
            f"after {step} steps every LoRA-B matrix is still 0: no gradient reaches the adapter; "
            "check that chosen and rejected differ and that the learning rate is not 0"
        )


def check_weights_finite(parameters: Mapping[str, Tensor], step: int) -> None:
    """Stop before an adapter that holds NaN or infinity is written anywhere.

    Raises:
        RunStopped: Naming the first such matrix.
    """
    for name, parameter in parameters.items():
        if not torch.isfinite(parameter).all():
            raise RunStopped(
                f"after step {step} the adapter holds NaN or infinite numbers ({name}); nothing of "
                "it was saved, earlier checkpoints are intact: lower the learning rate"
            )


def check_loss_scale(scale: float, step: int) -> None:
    """Stop a float16 run whose gradients overflow whatever they are scaled by.

    Raises:
        RunStopped: If the scale has fallen below 1.
    """
    if scale < 1:
        raise RunStopped(
            f"step {step}: float16 gradients overflow even at loss scale {scale:g}; "
            "lower the learning rate, or use a card with bfloat16"
        )

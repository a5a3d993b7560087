"""The training loop, top to bottom, and the checks that a run passes on its way.

An optimizer step takes `batch_size` pairs, packed into micro-batches of a fixed number of tokens.
Its loss is the mean over its pairs, whatever the micro-batches were; a short last batch is divided
by its own number of pairs.

At the first step the adapter's output is exactly zero (or the starting adapter unchanged), so
policy and reference are the same function: every margin must be 0 and the loss its value there
(sigmoid: ln 2). Later numbers must be finite and the adapter must move.
"""

import math
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from lowmem_dpo.console import name_rows, say, warn
from lowmem_dpo.linears.lora import casts_kept, lora_parameters
from lowmem_dpo.losses.pairs import join_pairs
from lowmem_dpo.model.scoring import LOGP_TOLERANCE, score
from lowmem_dpo.packs.packing import pack_trees
from lowmem_dpo.records.checkpoints import TrainingState
from lowmem_dpo.steps.gradients import Metrics, PairStats, pair_logps
from lowmem_dpo.steps.recovery import accumulate_in_memory
from lowmem_dpo.steps.update import allocate_moments, clip_gradients
from lowmem_dpo.stopping import RunStopped
from lowmem_dpo.tokens.trees import Tree
from lowmem_dpo.training.run import Run

LOSS_TOLERANCE = 0.02
MAX_SKIPPED_IN_A_ROW = 3
STEPS_UNTIL_LORA_B_MOVES = 20


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step gave.

    Attributes:
        step: Its number, counted from 1.
        metrics: Its numbers, under TRL's names.
        step_zero: Of the first step, what its check found; None where there is no such check.
    """

    step: int
    metrics: Metrics
    step_zero: dict[str, Any] | None = None


def train_steps(run: Run, state: TrainingState, max_grad_norm: float) -> Iterator[StepResult]:
    """Take optimizer steps to the end of the run; the caller logs and saves in between.

    Args:
        run: Policy, pairs and reference.
        state: Optimizer, learning rate and counters; advanced in place.
        max_grad_norm: Gradients are scaled down to this norm; 0 does not clip.

    Yields:
        The result of each step.
    """
    model = run.policy.model
    parameters = lora_parameters(model.network)
    adapter = run.policy.adapter
    assert adapter is not None
    allocate_moments(state.optimizer)
    for batch in run.batches.from_step(state.step):
        begun = time.perf_counter()
        is_first = state.step == 0
        packs = pack_trees([run.pairs.train[i] for i in batch], run.pack_tokens)
        stats = accumulate_in_memory(
            model, run.objective, run.reference, packs, state.scaler, compares=is_first
        )
        metrics, bad_pairs = stats.summary()
        step_zero = None
        if is_first and run.reference is not None and adapter.dropout == 0:
            step_zero = check_step_zero(
                metrics["loss"] - run.objective.nll_weight * metrics.get("nll_loss", 0.0),
                run.objective.zero_margin_loss(),
                stats.worst_rms,
                LOGP_TOLERANCE[model.dtype],
                run.reference.same_fingerprint,
            )
        metrics["learning_rate"] = float(state.lr_scheduler.get_last_lr()[0])
        rows = [tree.row for pack in packs for tree in pack.trees]
        bad_rows = [rows[i] for i in bad_pairs]
        metrics |= _update(state, parameters, max_grad_norm, metrics["loss"], bad_rows, rows)
        tokens = sum(num_sequence_tokens(tree) for pack in packs for tree in pack.trees)
        state.step += 1
        state.num_tokens += tokens
        if state.step == STEPS_UNTIL_LORA_B_MOVES:
            check_adapter_moves(parameters, state.step)

        seconds = time.perf_counter() - begun
        memory = peak_memory(model.device)
        yield StepResult(
            state.step,
            {
                **metrics,
                "epoch": state.step / run.batches.steps_per_epoch,
                "step": state.step,
                "num_pairs": len(batch),
                "num_tokens": state.num_tokens,
                "pairs_per_second": len(batch) / seconds,
                "tokens_per_second": tokens / seconds,
                **memory,
            },
            step_zero,
        )


def _update(
    state: TrainingState,
    parameters: dict[str, nn.Parameter],
    max_grad_norm: float,
    loss: float,
    bad_rows: list[int],
    rows: list[int],
) -> Metrics:
    """Clip the gradients, step the optimizer and the learning rate.

    A step whose loss or gradient is not finite leaves optimizer and adapter as they are; the
    learning rate moves on, so that every later step has the one it was planned with. A float16
    gradient that overflowed is no fault of a pair: the scaler lowers its scale, and nothing is
    said.

    Args:
        state: Optimizer, learning rate, scaler and counters.
        parameters: Of the adapter.
        max_grad_norm: As for `train_steps`.
        loss: Mean loss of the step.
        bad_rows: Data rows of the pairs with a loss or log-prob that is not finite.
        rows: Of all pairs of the step.
    """
    grad_norm = clip_gradients(state, parameters, max_grad_norm).item()
    usable = math.isfinite(loss) and not bad_rows
    overflowed = usable and state.scaler.is_enabled() and not math.isfinite(grad_norm)
    skipped = not overflowed and not (usable and math.isfinite(grad_norm))
    if skipped:
        state.num_skipped_in_a_row += 1
        what = describe_non_finite(loss, grad_norm, bad_rows, rows)
        warn(check_skipped(state.num_skipped_in_a_row, what, state.step + 1))
    else:
        state.num_skipped_in_a_row = 0
        state.scaler.step(state.optimizer)
    state.scaler.update()
    if state.scaler.is_enabled():
        check_loss_scale(state.scaler.get_scale(), state.step + 1)
    _advance(state.lr_scheduler)
    state.optimizer.zero_grad(set_to_none=True)
    if skipped:
        return {"skipped_steps": 1}
    return {} if overflowed else {"grad_norm": grad_norm}


def _advance(lr_scheduler: LRScheduler) -> None:
    """Move the learning rate on; torch takes a first step that was skipped for a mistake."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
        lr_scheduler.step()


@torch.no_grad()
def evaluate(run: Run, trees: Sequence[Tree]) -> Metrics:
    """Loss, rewards and accuracy of the policy as it stands on held-out pairs, named eval_*.

    Args:
        run: Policy and reference.
        trees: The held-out pairs.

    Raises:
        RunStopped: If a pair's numbers are not finite. The weights are no longer to be trusted
            then: `best/` and early stopping would be decided by what is left.
    """
    stats = PairStats(run.objective)
    packs = pack_trees(trees, run.pack_tokens)
    blocks = []
    with casts_kept(run.policy.model.network):
        for pack in packs:
            logps = score(run.policy.model, pack)
            blocks.append(pair_logps(logps, pack, run.objective, run.reference))
    pairs = join_pairs(blocks)
    stats.add(pairs, run.objective.pair_losses(pairs))
    metrics, bad_pairs = stats.summary()
    if bad_pairs:
        in_order = [tree.row for pack in packs for tree in pack.trees]
        rows = name_rows(in_order[i] for i in bad_pairs)
        raise RunStopped(
            f"evaluation: the loss of {rows} (of the pairs held out) is not finite; look at it, or "
            "lower the learning rate; earlier checkpoints are intact"
        )
    return {f"eval_{name}": value for name, value in metrics.items()}


def num_sequence_tokens(tree: Tree) -> int:
    """Tokens of both sequences of a pair, the trunk counted twice."""
    return tree.num_tokens + tree.trunk_len


def peak_memory(device: torch.device) -> dict[str, int]:
    """Peak memory by its metric's name: of tensors on a CUDA device, resident on the CPU.

    On a card also what the allocator held for them, which is what a limit holds: with gaps between
    tensors it is more. Nothing where it is unknown.
    """
    if device.type == "cuda":
        return {
            "peak_memory_bytes": torch.cuda.max_memory_allocated(device),
            "peak_reserved_bytes": torch.cuda.max_memory_reserved(device),
        }
    try:
        import resource
    except ImportError:  # Windows
        return {}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak_memory_bytes": peak if sys.platform == "darwin" else peak * 1024}


def check_step_zero(
    loss: float,
    expected: float,
    rms_per_token: float,
    tolerance: float,
    same_fingerprint: bool,
) -> dict[str, Any]:
    """Hold the first step against zero margin, and say what was found.

    Args:
        loss: Mean loss of the first step, without its likelihood terms.
        expected: What it is at zero margin.
        rms_per_token: Difference between policy and reference log-probs, in nats.
        tolerance: Largest rms difference between two correct computations.
        same_fingerprint: Whether the reference was scored under this run's numerics.

    Returns:
        The figures for run.json.

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
    if exact:
        say(f"step zero: every margin is exactly 0, loss {loss:.6f}")
    elif same_fingerprint:
        warn(
            f"step zero is not exact: {rms_per_token:.2e} nat rms per token under equal numerics; "
            "training is sound, but please report it"
        )
    return record


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

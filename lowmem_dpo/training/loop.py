"""The training loop, top to bottom.

An optimizer step takes `batch_size` pairs, packed into micro-batches of a fixed number of tokens.
Its loss is the mean over its pairs, whatever the micro-batches were; a short last batch is divided
by its own number of pairs.
"""

import itertools
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from lowmem_dpo.console import name_rows, say, warn
from lowmem_dpo.losses.pairs import join_pairs
from lowmem_dpo.model.lora import dropout_live, lora_parameters
from lowmem_dpo.model.scoring import score
from lowmem_dpo.model.selfcheck import logp_tolerance
from lowmem_dpo.packs.packing import Pack, fill, pack_trees
from lowmem_dpo.packs.trees import Tree
from lowmem_dpo.reference.fill import rms_difference
from lowmem_dpo.settings.configs import TrainConfig
from lowmem_dpo.stopping import RunStopped
from lowmem_dpo.training.batches import Schedule
from lowmem_dpo.training.checkpoints import TrainingState
from lowmem_dpo.training.health import (
    STEPS_UNTIL_LORA_B_MOVES,
    check_adapter_moves,
    check_loss_scale,
    check_skipped,
    check_step_zero,
    describe_non_finite,
)
from lowmem_dpo.training.metrics import Metrics, PairStats, peak_memory_bytes
from lowmem_dpo.training.objective import coupled_slopes, pair_logps, share_of_loss
from lowmem_dpo.training.setup import Run

STEPS_TO_PREDICT_FILL = 16


def predicted_fill(run: Run, schedule: Schedule) -> float:
    """Share of the micro-batches' tokens that are no padding, over the first steps of the run."""
    packs: list[Pack] = []
    for batch in itertools.islice(schedule.batches(0), STEPS_TO_PREDICT_FILL):
        packs += pack_trees([run.pairs.train[i] for i in batch], run.pack_tokens)
    return fill(packs)


@dataclass
class StepResult:
    """What one optimizer step gave: its number, counted from 1, and its metrics."""

    step: int
    metrics: Metrics


def train_steps(run: Run, state: TrainingState, schedule: Schedule) -> Iterator[StepResult]:
    """Take optimizer steps to the schedule's end; the caller logs and saves in between.

    Args:
        run: Policy, pairs and reference.
        state: Optimizer, schedule and counters; advanced in place.
        schedule: The pairs of each step.

    Yields:
        The result of each step.
    """
    config, parts = run.config, run.policy.model
    parameters = lora_parameters(run.policy.model.network)
    for batch in schedule.batches(state.step):
        begun = time.perf_counter()
        stats, worst_rms, tokens = PairStats(), 0.0, 0
        trees = [run.pairs.train[i] for i in batch]
        packs = pack_trees(trees, run.pack_tokens)
        slopes = coupled_slopes(run, packs, stats) if run.objective.couples_pairs else None
        for i, pack in enumerate(packs):
            with dropout_live(run.policy.model.network):
                logps = score(parts, pack)
                pairs = pair_logps(run, pack, logps)
                if slopes is None:
                    objective = share_of_loss(pairs, run.objective, len(batch), stats)
                else:
                    objective = slopes[i].dot(pairs)
                state.scaler.scale(objective).backward()
            if state.step == 0 and run.reference:
                rms = rms_difference(logps.detach().cpu(), run.reference.of(pack))
                worst_rms = max(worst_rms, rms)
            tokens += sum(num_sequence_tokens(tree) for tree in pack.trees)
            del logps, pairs, objective  # or their graph would live into the next micro-batch

        metrics = stats.means()
        if state.step == 0:
            _judge_first_step(run, metrics, worst_rms)
        metrics["learning_rate"] = float(state.schedule.get_last_lr()[0])
        rows = [tree.row for pack in packs for tree in pack.trees]
        bad_rows = [rows[i] for i in stats.bad_pairs()]
        metrics |= _update(config, state, parameters, metrics["loss"], bad_rows, rows)
        state.step += 1
        state.num_tokens += tokens
        if state.step == STEPS_UNTIL_LORA_B_MOVES:
            check_adapter_moves(parameters, state.step)

        seconds = time.perf_counter() - begun
        peak = peak_memory_bytes(run.policy.model.device)
        yield StepResult(
            state.step,
            {
                **metrics,
                "epoch": state.step / schedule.steps_per_epoch,
                "step": state.step,
                "num_pairs": len(batch),
                "num_tokens": state.num_tokens,
                "pairs_per_second": len(batch) / seconds,
                "tokens_per_second": tokens / seconds,
                **({} if peak is None else {"peak_memory_bytes": peak}),
            },
        )


def _update(
    config: TrainConfig,
    state: TrainingState,
    parameters: dict[str, nn.Parameter],
    loss: float,
    bad_rows: list[int],
    rows: list[int],
) -> Metrics:
    """Clip the gradients, step the optimizer and the schedule.

    A step whose loss or gradient is not finite leaves optimizer and adapter as they are; the
    schedule moves on, so that every later step has the rate it was planned with. A float16 gradient
    that overflowed is no fault of a pair: the scaler lowers its scale, and nothing is said.

    Args:
        config: The settings.
        state: Optimizer, schedule, scaler and counters.
        parameters: Of the adapter.
        loss: Mean loss of the step.
        bad_rows: Data rows of the pairs with a loss or log-prob that is not finite.
        rows: Of all pairs of the step.
    """
    state.scaler.unscale_(state.optimizer)
    limit = config.max_grad_norm or math.inf
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters.values(), limit).item()
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
    _advance(state.schedule)
    state.optimizer.zero_grad(set_to_none=True)
    if skipped:
        return {"skipped_steps": 1}
    return {} if overflowed else {"grad_norm": grad_norm}


def _advance(schedule: LRScheduler) -> None:
    """Move the schedule on; torch takes a first step that was skipped for a mistake."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
        schedule.step()


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
    stats = PairStats()
    packs = pack_trees(trees, run.pack_tokens)
    pairs = join_pairs([pair_logps(run, pack, score(run.policy.model, pack)) for pack in packs])
    stats.add(pairs, run.objective.pair_losses(pairs), run.objective)
    if bad := set(stats.bad_pairs()):
        in_order = [tree.row for pack in packs for tree in pack.trees]
        rows = name_rows(row for i, row in enumerate(in_order) if i in bad)
        raise RunStopped(
            f"evaluation: the loss of {rows} (of the pairs held out) is not finite; look at it, or "
            "lower the learning rate; earlier checkpoints are intact"
        )
    return {f"eval_{name}": value for name, value in stats.means().items()}


def num_sequence_tokens(tree: Tree) -> int:
    """Tokens of both sequences of a pair, the trunk counted twice."""
    return 2 * len(tree.trunk) + len(tree.chosen) + len(tree.rejected)


def _judge_first_step(run: Run, metrics: Metrics, rms_per_token: float) -> None:
    """Hold the first step, without its likelihood terms, against zero margin."""
    if run.reference is None or run.policy.adapter.dropout > 0:
        return
    loss = metrics["loss"] - run.objective.nll_weight * metrics.get("nll_loss", 0.0)
    tolerance = logp_tolerance(run.policy.model.dtype)
    run.step_zero, warning = check_step_zero(
        loss,
        run.objective.zero_margin_loss(),
        rms_per_token,
        tolerance,
        run.reference.same_fingerprint,
    )
    if warning:
        warn(warning)
    elif run.step_zero["exact"]:
        say(f"step zero: every margin is exactly 0, loss {loss:.6f}")

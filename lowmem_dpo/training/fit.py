"""A training run, top to bottom: `prepare` brings it to its first step, `fit` takes the steps."""

import itertools
import math
import platform
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from lowmem_dpo.console import duration, progress, say, warn
from lowmem_dpo.files import in_use
from lowmem_dpo.linears.lora import lora_layers, lora_parameters
from lowmem_dpo.losses.objective import Objective
from lowmem_dpo.losses.types import unusual_values
from lowmem_dpo.packs.packing import Pack, filled_share, pack_trees
from lowmem_dpo.records.checkpoints import load_checkpoint, read_record
from lowmem_dpo.records.folder import (
    check_resumable,
    hold_folder,
    settings_to_share,
    text_versions,
)
from lowmem_dpo.records.trackers import Trackers, check_installed
from lowmem_dpo.reference.cache import ReferenceCache
from lowmem_dpo.settings.configs import TrainConfig
from lowmem_dpo.settings.fields import to_yaml
from lowmem_dpo.settings.groups import (
    AdapterSettings,
    LossSettings,
    OptimizerSettings,
    RunSettings,
)
from lowmem_dpo.steps.planner import Workload
from lowmem_dpo.steps.rehearsed import StepSettings
from lowmem_dpo.steps.update import new_state
from lowmem_dpo.stopping import catch_signals
from lowmem_dpo.tokens.templates import choose_template
from lowmem_dpo.training.loop import StepResult, check_adapter_moves, train_steps
from lowmem_dpo.training.memory_plan import plan_memory, say_memory
from lowmem_dpo.training.pairs import check_token_ids, load_pairs
from lowmem_dpo.training.policy import Policy, adapter_spec, load_policy, read_source
from lowmem_dpo.training.recorder import Recorder, leave_later_steps, say_fresh_start
from lowmem_dpo.training.run import (
    Batches,
    Run,
    check_cpu_time,
    plan_pack_tokens,
    score_reference,
    self_check,
    warn_of_short_run,
)
from lowmem_dpo.version import __version__
from lowmem_dpo.weights.adapters import load_adapter
from lowmem_dpo.weights.folders import absolute
from lowmem_dpo.weights.size import ModelSize, storage_table

STEPS_TO_PREDICT_FILLED_SHARE = 16
# Of the groups of settings that are about training, what the reference depends on.
READ_BY_PRECOMPUTE = {"loss_type", "reference_free", "seed", "batch_size", "init_adapter"}
READ_BY_PRECOMPUTE |= {"reference"}

StepCallback = Callable[[StepResult], Any]


@dataclass(frozen=True)
class TrainResult:
    """What `fit` returns.

    Attributes:
        final_loss: Loss of the last step that was not skipped.
        metrics: That step's metrics, with the last evaluation's (eval_*).
        num_steps: Optimizer steps of the whole run.
        output_dir: The run's folder.
        policy: The model as it was trained.
    """

    final_loss: float
    metrics: dict[str, float]
    num_steps: int
    output_dir: Path
    policy: Policy


def prepare(config: TrainConfig, checkpoint: Path | None = None, *, trains: bool = True) -> Run:
    """Everything up to the first step: source, pairs, policy, self-check, plan, reference.

    Args:
        config: The settings; `data` is given.
        checkpoint: What the run goes on from, or None.
        trains: Whether it is trained after that.

    Raises:
        ValueError: If a setting, the data or the checkpoint does not fit; nothing was written.
        RunStopped: If a check failed.
    """
    if config.data is None:
        raise ValueError("no data given; set --data to a file of preference pairs")
    seed = config.seed
    random.seed(seed)
    torch.manual_seed(seed)
    objective = Objective.of(config)

    source = read_source(
        config, config, init_adapter=config.init_adapter, max_length=config.max_length
    )
    if config.optim == "paged_adamw_8bit" and source.device.type != "cuda":
        raise ValueError(f"optim {config.optim} cannot page on {source.device}; use adamw_8bit")

    template = choose_template(source.tokenizer, config)
    date = template.date
    if date and checkpoint and config.template_date is None:  # the run's first session had its own
        date = read_record(checkpoint)["facts"].get("template_date") or date
    config, template = replace(config, template_date=date), replace(template, date=date)
    pairs = load_pairs(config, config, template, source.cache_dir, seed=seed)
    check_token_ids(pairs, source.config)
    batches = Batches.of(config, len(pairs.train))
    facts = settings_to_share(asdict(config))
    facts |= {"data_digest": pairs.digest, "template_digest": template.digest}
    if checkpoint is not None:
        check_resumable(checkpoint, facts, asdict(TrainConfig()))
    if trains:
        warn_of_short_run(config, config.max_steps, config.warmup_steps, batches)
    if source.device.type == "cpu" and (size := ModelSize.of(source.config)).is_large_for_a_cpu:
        is_named = config.device != "auto"
        check_cpu_time(source, size, pairs, batches, objective, trains=trains, is_named=is_named)

    dtype = str(source.dtype).removeprefix("torch.")
    say(
        f"model: {source.base}, {source.config.model_type}, computing in {dtype} on {source.device}"
    )
    trees = pairs.train + pairs.evaluation
    adapter = adapter_spec(config, source.init_adapter, warns=False)
    step = StepSettings(config, adapter, config, config, config.head_kernel)
    work = Workload(trees, config.batch_size, seed)
    memory = plan_memory(source, step, work, config, checkpoint, trains=trains)
    policy = load_policy(
        config,
        config,
        config,
        levers=memory.levers,
        source=source,
        seed=seed,
        chat_template=template.to_save,
    )
    say(storage_table(policy.model.storage))
    cache = ReferenceCache(source.cache_dir, policy.identity, absolute(policy.base))
    facts["model_digest"] = cache.digest
    if checkpoint is not None:
        check_resumable(checkpoint, {"model_digest": cache.digest})
    rms = self_check(policy, pairs.train)

    pack_tokens = plan_pack_tokens(
        trees, policy, cache, memory, batch_size=config.batch_size, seed=seed
    )
    facts |= {"planned_pack_tokens": pack_tokens, "text_versions": text_versions()}
    facts["levers"] = asdict(memory.levers)
    _say_plan(config, policy, objective, pack_tokens, trains=trains)

    plan, reference = memory.plan and memory.plan_with(pack_tokens), None
    if objective.needs_reference:
        accept = config.reference == "accept"
        if trains:  # only what its steps take, in that order
            trees = [pairs.train[i] for i in batches.used()] + pairs.evaluation
        with in_use(cache.directory):
            reference = score_reference(trees, policy, cache, pack_tokens, accept=accept, seed=seed)
    return Run(policy, pairs, batches, objective, pack_tokens, rms, reference, facts, plan)


def precompute(config: TrainConfig) -> int:
    """Bring the reference cache up to date: the first half of `fit`.

    Returns:
        How many pairs were scored.

    Raises:
        ValueError: If the losses have no reference.
        OSError: If the cache could not take them all.
    """
    if config.reference_free:
        raise ValueError("precompute has nothing to do with reference_free; leave one out")
    if not Objective.of(config).needs_reference:
        raise ValueError(
            f"precompute has nothing to do: loss_type {config.loss_type} needs no "
            "reference; train without it"
        )
    usual = TrainConfig()
    groups = (LossSettings, OptimizerSettings, AdapterSettings, RunSettings)
    names = dict.fromkeys(f.name for group in groups for f in fields(group))
    unused = [n for n in names if getattr(config, n) != getattr(usual, n)]
    if unused := [name for name in unused if name not in READ_BY_PRECOMPUTE]:
        warn(f"precompute fills the cache only: no effect of {', '.join(unused)}")
    reference = prepare(config, trains=False).reference
    assert reference is not None
    if reference.cache_error is not None:
        raise reference.cache_error
    return reference.num_scored


def fit(config: TrainConfig, callbacks: Sequence[StepCallback] = ()) -> TrainResult:
    """Train from the start, or from a checkpoint, to the end.

    Args:
        config: The settings; `data` is given.
        callbacks: Called after every step with its result.

    Raises:
        ValueError: If a setting or the data is wrong; nothing has been overwritten then.
        RunStopped: If a check failed on the way.
    """
    if config.trackers:
        check_installed(config.trackers)
    with hold_folder(config) as folder:
        checkpoint = folder.checkpoint
        run = prepare(config, checkpoint)
        config = replace(config, template_date=run.pairs.facts["template_date"])
        model, num_steps = run.policy.model, run.batches.num_steps

        parameters = list(lora_parameters(model.network).values())
        is_scaled = model.dtype == torch.float16
        on_host = run.facts["levers"]["optimizer_on_host"]
        state = new_state(config, parameters, num_steps, is_scaled=is_scaled, on_host=on_host)
        if checkpoint is not None:
            load_adapter(model.network, checkpoint)
            load_checkpoint(checkpoint, state)
            leave_later_steps(folder, state, config.keep_checkpoints)
            say(f"resumed from {checkpoint}")
        elif config.resume == "auto":
            say_fresh_start(folder)

        first_step = state.step
        folder.start(to_yaml(replace(config, resume=None)), first_step)
        facts = _facts_at_start(run)
        say(f"steps: {num_steps}, in micro-batches {facts['plan']['fill']:.0%} filled")
        folder.note(**facts)
        begun = time.perf_counter()
        if model.device.type == "cuda":  # from here on, what is measured is of the steps
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(model.device)
        trackers = None
        if config.trackers:
            run_ids = folder.record.get("trackers", {})
            trackers = Trackers(config.trackers, folder.root, asdict(config), first_step, run_ids)
        folder.note(trackers=trackers.run_ids if trackers else {})
        recorder = Recorder(run, state, folder, trackers, config)
        opened_bar = progress("training", num_steps, "steps", done=first_step, lines=False)
        try:
            with catch_signals() as interrupt, opened_bar as bar:
                had_stopped = checkpoint is not None and recorder.stops_early
                steps = train_steps(run, state, config.max_grad_norm)
                for result in steps if not had_stopped else ():
                    is_last = recorder.record(result, bar)
                    if stops_here := interrupt.requested:
                        recorder.save()
                    for callback in callbacks:
                        callback(result)
                    if stops_here:
                        say(f"interrupted after step {result.step}, which is saved")
                        raise KeyboardInterrupt
                    if is_last:
                        break
                check_adapter_moves(recorder.parameters, state.step)
                adapter = recorder.finish()
        finally:
            if trackers is not None:
                trackers.finish()

        seconds = time.perf_counter() - begun
        if run.plan is not None:
            folder.note(memory=say_memory(run.plan.rehearsal, model.device))
        session = {"from_step": first_step, "to_step": state.step, "seconds": seconds}
        folder.note(
            sessions=[*folder.record["sessions"], session],
            stopped_early=recorder.stops_early,
            finished=True,
        )
        steps_taken = state.step - first_step
        say(f"done: {steps_taken} steps in {duration(seconds)}; the adapter is in {adapter}")
        return TrainResult(
            final_loss=state.last_metrics.get("loss", math.nan),
            metrics=state.eval_metrics | state.last_metrics,
            num_steps=state.step,
            output_dir=folder.root,
            policy=run.policy,
        )


def _say_plan(
    config: TrainConfig, policy: Policy, objective: Objective, pack_tokens: int, *, trains: bool
) -> None:
    """Say what will be trained and how, and what is unusual about it."""
    num_trainable = sum(p.numel() for p in lora_parameters(policy.model.network).values())
    ranks = sorted({layer.rank for layer in lora_layers(policy.model.network).values()})
    rank = f"{ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else ranks[0]
    say(f"adapter: rank {rank}, {num_trainable / 1e6:.2f}M trainable parameters")
    say(f"plan: micro-batches of {pack_tokens} tokens, {config.batch_size} pairs a step")
    if not trains:
        return
    for line in unusual_values(config, config.learning_rate):
        warn(line)
    if config.reference_free:
        warn(
            "reference_free: no reference holds the policy near its start; training is less "
            "stable, and there is no check at step zero"
        )
    elif not objective.needs_reference:
        say(f"loss {config.loss_type}: without a reference, so without a check at step zero")
    if objective.couples_pairs:
        say(f"loss {config.loss_type}: compares the pairs of a step, one more forward pass a step")


def _facts_at_start(run: Run) -> dict[str, Any]:
    """What run.json says of a run before its first step."""
    packs: list[Pack] = []
    for batch in itertools.islice(run.batches.from_step(0), STEPS_TO_PREDICT_FILLED_SHARE):
        packs += pack_trees([run.pairs.train[i] for i in batch], run.pack_tokens)
    reference = run.reference and {
        "num_scored": run.reference.num_scored,
        "recheck_rms": run.reference.recheck_rms,
        "same_fingerprint": run.reference.same_fingerprint,
    }
    return {
        "version": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "numerics": run.policy.fingerprint(run.pack_tokens),
        "model": run.policy.identity,
        "data": run.pairs.facts,
        "data_digest": run.pairs.digest,
        "plan": {
            "pack_tokens": run.pack_tokens,
            "fill": filled_share(packs),
            "num_steps": run.batches.num_steps,
            "levers": run.facts["levers"],
        },
        "self_check_rms": run.self_check_rms,
        "reference": reference,
        "finished": False,
    }

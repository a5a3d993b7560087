"""Our training loop for `train_step.py`, as `lowmem-dpo train` runs it, on a random model."""

import argparse
from pathlib import Path
from typing import Any

import torch
from _common import StepClock, peak_mib, reset_peak
from _random_models import random_model

from lowmem_dpo.data.encoding import TokenPair
from lowmem_dpo.demo.byte_tokenizer import byte_tokenizer
from lowmem_dpo.model.lora import LoraLinear, lora_parameters
from lowmem_dpo.model.scoring import score
from lowmem_dpo.packs.packing import pack_trees
from lowmem_dpo.packs.trees import build_tree
from lowmem_dpo.reference.cache import ReferenceCache
from lowmem_dpo.settings.configs import TrainConfig
from lowmem_dpo.training.batches import Schedule
from lowmem_dpo.training.checkpoints import TrainingState
from lowmem_dpo.training.loop import train_steps
from lowmem_dpo.training.optimizers import make_optimizer, make_schedule
from lowmem_dpo.training.policy import Policy, make_policy
from lowmem_dpo.training.setup import Pairs, Run, plan_pack_tokens, score_reference
from lowmem_dpo.weights.adapters import AdapterSpec
from lowmem_dpo.weights.loading import LoadedModel


def run(options: argparse.Namespace, pairs: list[TokenPair], scratch: Path) -> dict[str, Any]:
    """Take the steps.

    Args:
        options: Of `train_step.py`.
        pairs: Those of every step.
        scratch: An empty folder.

    Returns:
        steps_ms of every step, ref_ms, peak_mib, and the first step's metrics as `metrics_0`.
    """
    on_cuda = options.device.type == "cuda"
    config = TrainConfig(
        batch_size=len(pairs),
        max_steps=options.num_steps,
        max_length=options.length,
        learning_rate=options.learning_rate,
        lr_scheduler_type="constant",
        optim="adamw_8bit" if on_cuda else "adamw",
        lora_r=options.rank,
        lora_alpha=options.rank,
        seed=options.seed,
    )
    policy = random_policy(options, config)
    trees = [build_tree(pair) for pair in pairs]
    dpo_run = Run(config, policy, Pairs(trees, [], "", {}), pack_tokens=0, self_check_rms=0.0)
    cache = ReferenceCache(scratch, policy.identity)
    dpo_run.pack_tokens = plan_pack_tokens(config, policy, dpo_run.pairs, cache)
    dpo_run.reference = score_reference(dpo_run, cache)
    schedule = Schedule.of(config, len(pairs))
    optimizer = make_optimizer(config, lora_parameters(policy.model.network).values())
    scaler = torch.amp.GradScaler(options.device.type, enabled=policy.model.dtype == torch.float16)
    rates = make_schedule(config, optimizer, schedule.num_steps)
    state = TrainingState(optimizer, rates, scaler, options.device)

    clock, metrics = StepClock(options.device), []
    reset_peak(options.device)
    clock.start()
    for result in train_steps(dpo_run, state, schedule):
        clock.stop()
        metrics.append(result.metrics)
        clock.start()
    peak = peak_mib(options.device)

    reference_clock = StepClock(options.device)
    reference_clock.start()
    with torch.no_grad():
        for pack in pack_trees(trees, dpo_run.pack_tokens):
            score(policy.model, pack)
    reference_clock.stop()
    return {
        "steps_ms": clock.steps_ms,
        "ref_ms": reference_clock.steps_ms[0],
        "peak_mib": peak,
        "metrics_0": metrics[0],
    }


def random_policy(options: argparse.Namespace, config: TrainConfig) -> Policy:
    """A policy over random weights, its layers and attention as in a real run."""
    model = random_model(
        options.shape,
        LoraLinear,
        quantization=options.quantization,
        dtype=options.dtype,
        device=options.device,
    )
    adapter = AdapterSpec(config.lora_r, config.lora_alpha, 0.0, "all", rank_stabilised=False)
    loaded = LoadedModel(model, storage=[], identity="random")
    return make_policy(
        loaded,
        byte_tokenizer(),
        adapter,
        options.device,
        options.dtype,
        seed=config.seed,
        layer_inputs=config.layer_inputs,
    )

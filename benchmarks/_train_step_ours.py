"""Our training loop for `train_step.py`, as `lowmem-dpo train` runs it, on a random model."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _common import StepClock, peak_mib, reset_peak
from _random_models import random_model
from _runs import run_on

from lowmem_dpo.demo.byte_tokenizer import byte_tokenizer
from lowmem_dpo.linears.lora import AdapterSpec, LoraLinear
from lowmem_dpo.memory.levers import Levers
from lowmem_dpo.model.language_model import LanguageModel
from lowmem_dpo.model.scoring import score
from lowmem_dpo.model.surgery import prepare_model
from lowmem_dpo.packs.packing import pack_trees
from lowmem_dpo.settings.configs import TrainConfig
from lowmem_dpo.tokens.trees import TokenPair, build_tree
from lowmem_dpo.training.loop import train_steps
from lowmem_dpo.training.policy import Policy


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
        keep_activations=options.keep_activations,
    )
    policy = random_policy(options, config)
    trees = [build_tree(pair) for pair in pairs]
    dpo_run, state = run_on(trees, policy, config, config, scratch)

    clock, metrics = StepClock(options.device), []
    reset_peak(options.device)
    clock.start()
    for result in train_steps(dpo_run, state, config.max_grad_norm):
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
    model = prepare_model(
        LanguageModel.of(model, identity="random"),
        adapter,
        replace(Levers.of(config, len(model.model.layers)), num_slots=options.num_slots),
        seed=config.seed,
    )
    return Policy(model, {"base": "random"}, byte_tokenizer(), adapter, "random", None, {})

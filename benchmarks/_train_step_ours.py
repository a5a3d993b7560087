"""Our training loop for `train_step.py`, as `lowmem-dpo train` runs it, on a random model."""

import argparse
from pathlib import Path
from typing import Any

from _common import StepClock, peak_mib, reset_peak
from _random_models import random_model

from lowmem_dpo.demo.byte_tokenizer import byte_tokenizer
from lowmem_dpo.losses.objective import Objective
from lowmem_dpo.model.language_model import LanguageModel
from lowmem_dpo.model.lora import LoraLinear
from lowmem_dpo.model.surgery import prepare_model
from lowmem_dpo.packs.trees import TokenPair, build_tree
from lowmem_dpo.reference.cache import ReferenceCache
from lowmem_dpo.settings.configs import TrainConfig
from lowmem_dpo.training.loop import train_steps
from lowmem_dpo.training.pairs import Pairs
from lowmem_dpo.training.policy import Policy
from lowmem_dpo.training.run import Run, plan_pack_tokens, score_reference
from lowmem_dpo.training.steps import Batches, new_state
from lowmem_dpo.weights.adapters import AdapterSpec


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
    cache = ReferenceCache(scratch, policy.identity)
    sizes = {"batch_size": len(trees), "seed": config.seed}
    pack_tokens = plan_pack_tokens(trees, policy, cache, **sizes)
    reference = score_reference(trees, policy, cache, pack_tokens)
    batches, objective = Batches.of(config, len(trees)), Objective.of(config)
    data = Pairs(trees, [], "", {})
    dpo_run = Run(policy, data, batches, objective, pack_tokens, 0.0, reference)
    state = new_state(config, policy.model, batches.num_steps)

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
    score_reference(trees, policy, ReferenceCache(scratch / "again", {}), pack_tokens)
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
    model = prepare_model(LanguageModel.of(model, identity="random"), adapter, seed=config.seed)
    return Policy(model, byte_tokenizer(), adapter, "random", None, {})

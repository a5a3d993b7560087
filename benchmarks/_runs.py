"""A run on given pairs, ready for its first step, without a file of pairs or an output folder."""

from collections.abc import Sequence
from pathlib import Path

import torch

from lowmem_dpo.linears.lora import lora_parameters
from lowmem_dpo.losses.objective import Objective
from lowmem_dpo.memory.levers import Levers
from lowmem_dpo.records.checkpoints import TrainingState
from lowmem_dpo.reference.cache import ReferenceCache
from lowmem_dpo.settings.groups import LossSettings, OptimizerSettings
from lowmem_dpo.steps.update import new_state
from lowmem_dpo.tokens.trees import Tree
from lowmem_dpo.training.memory_plan import MemoryPlan
from lowmem_dpo.training.pairs import Pairs
from lowmem_dpo.training.policy import Policy
from lowmem_dpo.training.run import Batches, Run, plan_pack_tokens, score_reference


def run_on(
    trees: Sequence[Tree],
    policy: Policy,
    losses: LossSettings,
    optimizer: OptimizerSettings,
    scratch: Path,
    pack_tokens: int | None = None,
) -> tuple[Run, TrainingState]:
    """Plan, score the reference, make an optimizer.

    Args:
        trees: The pairs.
        policy: As it starts.
        losses: What is minimised.
        optimizer: How.
        scratch: Receives the reference cache.
        pack_tokens: Tokens of a micro-batch; by default as a run would choose them.
    """
    cache = ReferenceCache(scratch, policy.identity)
    pack_tokens = plan_pack_tokens(
        trees,
        policy,
        cache,
        MemoryPlan(Levers(), pack_tokens),
        batch_size=optimizer.batch_size,
        seed=optimizer.seed,
    )
    reference = score_reference(trees, policy, cache, pack_tokens)
    batches = Batches.of(optimizer, len(trees))
    pairs = Pairs(list(trees), [], "", {})
    run = Run(policy, pairs, batches, Objective.of(losses), pack_tokens, 0.0, reference, {})
    model = policy.model
    parameters = list(lora_parameters(model.network).values())
    is_scaled = model.dtype == torch.float16
    return run, new_state(optimizer, parameters, batches.num_steps, is_scaled=is_scaled)

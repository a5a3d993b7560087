"""What a run works on, and how it comes about: steps, checks, plan, reference."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lowmem_dpo.console import duration, say, warn
from lowmem_dpo.losses.objective import Objective
from lowmem_dpo.machine.device import matmul_rate
from lowmem_dpo.model.scoring import LOGP_TOLERANCE, check_packing, score
from lowmem_dpo.packs.packing import (
    CARD_TOKEN_MULTIPLE,
    TOKEN_MULTIPLE,
    choose_pack_tokens,
    epoch_order,
    pack_trees,
    round_up_tokens,
)
from lowmem_dpo.reference.cache import ReferenceCache
from lowmem_dpo.reference.fill import Reference, prepare_reference
from lowmem_dpo.settings.groups import (
    OptimizerSettings,
    RunSettings,
)
from lowmem_dpo.steps.planner import PACK_TOKENS_LIMIT, Plan
from lowmem_dpo.stopping import RunStopped
from lowmem_dpo.tokens.trees import Tree
from lowmem_dpo.training.memory_plan import MemoryPlan
from lowmem_dpo.training.pairs import Pairs
from lowmem_dpo.training.policy import Policy, Source
from lowmem_dpo.weights.size import ModelSize

# The pass itself, its recomputation and the gradient of its inputs; the weights are frozen.
FORWARDS_OF_A_STEP = 3
FEW_STEPS = 20


@dataclass(frozen=True)
class Batches:
    """How many steps a run has, and which pairs each takes."""

    num_pairs: int
    batch_size: int
    steps_per_epoch: int
    num_steps: int
    seed: int
    shuffle: bool

    @classmethod
    def of(cls, settings: OptimizerSettings, num_pairs: int) -> "Batches":
        """Those of a run: whole epochs in batches, the last one possibly short."""
        per_epoch = math.ceil(num_pairs / settings.batch_size)
        # Rounded first: 100 * 1.1 is a little more than 110.
        steps = math.ceil(round(per_epoch * settings.num_train_epochs, 6))
        num_steps = settings.max_steps or max(1, steps)
        return cls(
            num_pairs, settings.batch_size, per_epoch, num_steps, settings.seed, settings.shuffle
        )

    def from_step(self, first_step: int) -> Iterator[list[int]]:
        """Indices of the pairs of each step, from `first_step` to the end."""
        order, order_epoch = list(range(self.num_pairs)), -1
        for step in range(first_step, self.num_steps):
            epoch, place = divmod(step, self.steps_per_epoch)
            if self.shuffle and epoch != order_epoch:
                order, order_epoch = epoch_order(self.num_pairs, self.seed, epoch), epoch
            yield order[place * self.batch_size : (place + 1) * self.batch_size]

    def used(self) -> list[int]:
        """Indices of the pairs that some step takes, in the order of their first use."""
        steps = itertools.islice(self.from_step(0), self.steps_per_epoch)
        return [i for step in steps for i in step]


@dataclass(frozen=True)
class Run:
    """Everything the training loop works on.

    Attributes:
        policy: The model.
        pairs: The data.
        batches: Which pairs each step takes.
        objective: What is minimised.
        pack_tokens: Tokens per micro-batch.
        self_check_rms: Packed trees against plain sequences, nat rms per token.
        reference: Log-probs of the policy at the start; None in a reference-free run.
        facts: What a resumed run must share with it, for the checkpoints.
        plan: Of its memory, as rehearsed; None on a CPU.
    """

    policy: Policy
    pairs: Pairs
    batches: Batches
    objective: Objective
    pack_tokens: int
    self_check_rms: float
    reference: Reference | None
    facts: dict[str, Any]
    plan: Plan | None = None


def warn_of_short_run(
    run: RunSettings, max_steps: int | None, warmup_steps: int | None, batches: Batches
) -> None:
    """Say before it starts that a run will hardly move the model, or that settings come too late.

    Those count in more steps than the run has; what happens instead is said too.
    """
    steps = batches.num_steps
    if steps < FEW_STEPS:
        cause = f"{batches.num_pairs} pairs in batches of {batches.batch_size}"
        remedy = "lower batch_size or raise num_train_epochs"
        if max_steps is not None:
            cause, remedy = f"max_steps is {max_steps}", "raise it"
        only = "1 step" if steps == 1 else f"{steps} steps"
        warn(f"only {only}: {cause}; for more, {remedy}")
    settings = {
        "logging_steps": "metrics are written at the last step only",
        "eval_steps": "it is evaluated at the last step only",
        "save_steps": "the only checkpoint is that of the last step",
    }
    for name, instead in settings.items():
        if (getattr(run, name) or 0) > steps:
            warn(f"{name} {getattr(run, name)} is more than the run's {steps} steps: {instead}")
    if (warmup_steps or 0) >= steps:
        warn(
            f"warmup_steps {warmup_steps} leaves nothing of the run's {steps} steps, "
            f"{steps - 1} are used; lower it"
        )
    patience = run.early_stopping_patience
    evaluations = math.ceil(steps / (run.eval_steps or batches.steps_per_epoch))
    # The first evaluation is the best so far, and after the last there is nothing left to stop.
    if patience is not None and patience + 1 >= evaluations:
        warn(
            f"early_stopping_patience {patience} cannot stop a run of {evaluations} evaluations; "
            "lower it or eval_steps"
        )


def check_cpu_time(
    source: Source,
    size: ModelSize,
    pairs: Pairs,
    batches: Batches,
    objective: Objective,
    *,
    trains: bool,
    is_named: bool,
) -> None:
    """Say how long a large model will take on a CPU, and refuse it if the CPU was not named.

    A run on a CPU is for trying things out. Above a billion parameters it takes days, so nobody
    gets it by accident.

    Args:
        source: The model.
        size: Of the model.
        pairs: As for `forward_tokens`.
        batches: As for `forward_tokens`.
        objective: As for `forward_tokens`.
        trains: As for `forward_tokens`.
        is_named: Whether the user named the device.

    Raises:
        ValueError: If the device was left to choose.
    """
    num_tokens = forward_tokens(pairs, batches, objective, trains=trains)
    rate = matmul_rate(source.dtype)
    time_needed = duration(size.forward_flops(num_tokens) / rate)
    forecast = (
        f"{source.base} has {size.total / 1e9:.1f}B parameters and takes at least {time_needed} on "
        f"this CPU ({rate / 1e9:,.0f} GFLOP/s in matrix products, as just measured; "
        f"{num_tokens / 1e6:,.2f}M tokens in forward passes or their like; nothing cached)"
    )
    if not is_named:
        raise ValueError(f"there is no CUDA card, and {forecast}; to go on, name it: --device cpu")
    say(forecast)


def forward_tokens(pairs: Pairs, batches: Batches, objective: Objective, *, trains: bool) -> int:
    """Tokens of a run, each as often as it takes the work of a forward pass.

    Args:
        pairs: To train on and to evaluate on, whose reference is needed too.
        batches: The steps.
        objective: The losses.
        trains: Whether the run goes on after the reference.
    """
    tokens_per_epoch = sum(tree.num_tokens for tree in pairs.train)
    tokens = 0
    if objective.needs_reference:
        used = [pairs.train[i] for i in batches.used()] if trains else pairs.train
        tokens += sum(tree.num_tokens for tree in (*used, *pairs.evaluation))
    if trains:
        epochs = batches.num_steps / batches.steps_per_epoch
        forwards = FORWARDS_OF_A_STEP + objective.couples_pairs  # which score a step's pairs twice
        tokens += math.ceil(forwards * epochs * tokens_per_epoch)
    return tokens


def self_check(policy: Policy, trees: Sequence[Tree]) -> float:
    """Compare two packed real trees with four plain sequences; see `model.scoring`.

    Returns:
        The difference, nat rms per token.

    Raises:
        RunStopped: If the model is not computed rightly.
    """
    branching = [t for t in trees if t.trunk_len and t.chosen_len and t.rejected_len]
    branching = branching or list(trees)
    by_length = sorted(branching, key=lambda tree: tree.num_tokens)
    two = [by_length[0], by_length[-1]]  # faults that grow with position show in the longest
    pack = pack_trees(two, round_up_tokens(sum(tree.num_tokens for tree in two)))[0]
    sequences = [ids for t in pack.trees for ids in (t.chosen_ids, t.rejected_ids)]
    try:
        difference = check_packing(policy.model, pack, sequences)
    except ValueError as error:
        raise RunStopped(str(error)) from None
    say(f"self-check: packed trees equal plain sequences within {difference:.1e} nat per token")
    return difference


def plan_pack_tokens(
    trees: Sequence[Tree],
    policy: Policy,
    cache: ReferenceCache,
    memory: MemoryPlan,
    *,
    batch_size: int,
    seed: int,
) -> int:
    """Tokens per micro-batch: as wanted, as the cached reference has them, as planned, by lengths.

    Args:
        trees: All pairs.
        policy: The model.
        cache: Its reference.
        memory: What is wanted, or planned.
        batch_size: Pairs of a step.
        seed: Of their order.
    """
    if memory.pack_tokens is not None:
        return memory.pack_tokens
    longest = max(tree.num_tokens for tree in trees)
    cached = cache.pack_tokens([tree.digest for tree in trees], policy.fingerprint(0))
    if cached is not None and cached >= longest and memory.holds(cached):
        return cached
    if memory.plan is not None:
        return memory.plan.pack_tokens
    multiple = CARD_TOKEN_MULTIPLE if policy.model.device.type == "cuda" else TOKEN_MULTIPLE
    limit = max(PACK_TOKENS_LIMIT, round_up_tokens(longest, multiple))
    return choose_pack_tokens(trees, batch_size, limit=limit, seed=seed, multiple=multiple)


@torch.no_grad()
def score_reference(
    trees: Sequence[Tree],
    policy: Policy,
    cache: ReferenceCache,
    pack_tokens: int,
    *,
    accept: bool = False,
    seed: int = 0,
) -> Reference:
    """The log-probs of the policy as it stands, from the cache or scored now."""
    return prepare_reference(
        trees,
        lambda pack: score(policy.model, pack),
        cache,
        policy.fingerprint(pack_tokens),
        pack_tokens=pack_tokens,
        tolerance=LOGP_TOLERANCE[policy.model.dtype],
        accept_other=accept,
        seed=seed,
    )

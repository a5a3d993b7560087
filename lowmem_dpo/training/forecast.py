"""How long a large model will take on a CPU: said before it is read, and asked about.

A run on a CPU is for trying things out. Above a billion parameters it takes days, so nobody gets it
by accident: the CPU must be named.
"""

import math
from collections.abc import Sequence

from lowmem_dpo.console import duration, say
from lowmem_dpo.losses.types import couples_pairs, needs_reference
from lowmem_dpo.machine.rate import matmul_rate
from lowmem_dpo.packs.trees import Tree
from lowmem_dpo.settings.configs import TrainConfig
from lowmem_dpo.training.batches import Schedule
from lowmem_dpo.training.policy import Source
from lowmem_dpo.weights.size import ModelSize

# The pass itself, its recomputation and the gradient of its inputs; the weights are frozen.
FORWARDS_OF_A_STEP = 3


def check_cpu_time(
    config: TrainConfig,
    source: Source,
    train: Sequence[Tree],
    evaluation: Sequence[Tree],
    *,
    only_reference: bool,
) -> None:
    """Say how long a large model will take on a CPU, and refuse it if the CPU was not named.

    Args:
        config: The settings.
        source: Model and device.
        train: The pairs to train on.
        evaluation: Those to evaluate on, whose reference is needed too.
        only_reference: Whether the run ends with the reference.

    Raises:
        ValueError: If `device` was left to choose.
    """
    size = ModelSize.of(source.model_config)
    if source.device.type != "cpu" or not size.is_large_for_a_cpu:
        return
    rate = matmul_rate(source.dtype)
    tokens = forward_tokens(config, train, evaluation, only_reference=only_reference)
    time_needed = duration(size.forward_flops(tokens) / rate)
    forecast = (
        f"{source.base} has {size.total / 1e9:.1f}B parameters and takes at least {time_needed} on "
        f"this CPU ({rate / 1e9:,.0f} GFLOP/s in matrix products, as just measured; "
        f"{tokens / 1e6:,.2f}M tokens in forward passes or their like; nothing cached)"
    )
    if config.device == "auto":
        raise ValueError(f"there is no CUDA card, and {forecast}; to go on, name it: --device cpu")
    say(forecast)


def forward_tokens(
    config: TrainConfig, train: Sequence[Tree], evaluation: Sequence[Tree], *, only_reference: bool
) -> int:
    """Tokens of a run, each as often as it takes the work of a forward pass."""
    tokens_per_epoch = sum(tree.num_tokens for tree in train)
    tokens = 0
    if needs_reference(config):
        tokens += tokens_per_epoch + sum(tree.num_tokens for tree in evaluation)
    if not only_reference:
        schedule = Schedule.of(config, len(train))
        epochs = schedule.num_steps / schedule.steps_per_epoch
        forwards = FORWARDS_OF_A_STEP + couples_pairs(config)  # which score a step's pairs twice
        tokens += math.ceil(forwards * epochs * tokens_per_epoch)
    return tokens

"""How long a large model will take on a CPU: said before it is read, and asked about.

A run on a CPU is for trying things out. Above a billion parameters it takes days, so nobody gets it
by accident: the CPU must be named.
"""

import math
import time

import torch

from lowmem_dpo.console import duration, say
from lowmem_dpo.losses.objective import Objective
from lowmem_dpo.training.batches import Batches
from lowmem_dpo.training.pairs import Pairs
from lowmem_dpo.training.policy import Source
from lowmem_dpo.weights.size import ModelSize

# The pass itself, its recomputation and the gradient of its inputs; the weights are frozen.
FORWARDS_OF_A_STEP = 3
PROBE_SECONDS = 0.3


def check_cpu_time(source: Source, num_tokens: int, *, is_named: bool) -> None:
    """Say how long a large model will take on a CPU, and refuse it if the CPU was not named.

    Args:
        source: Model and device.
        num_tokens: Of the run, as `forward_tokens` counts them.
        is_named: Whether the user named the device.

    Raises:
        ValueError: If the device was left to choose.
    """
    if source.device.type != "cpu":
        return
    size = ModelSize.of(source.config)
    if not size.is_large_for_a_cpu:
        return
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
        tokens += sum(tree.num_tokens for tree in pairs.all)
    if trains:
        epochs = batches.num_steps / batches.steps_per_epoch
        forwards = FORWARDS_OF_A_STEP + objective.couples_pairs  # which score a step's pairs twice
        tokens += math.ceil(forwards * epochs * tokens_per_epoch)
    return tokens


def matmul_rate(dtype: torch.dtype) -> float:
    """Floating-point operations per second of a matrix product on this CPU, measured now."""
    left, right = torch.ones(256, 2048, dtype=dtype), torch.ones(2048, 2048, dtype=dtype)
    torch.mm(left, right)  # the first one starts threads
    count, begun = 0, time.perf_counter()
    while time.perf_counter() - begun < PROBE_SECONDS or not count:
        torch.mm(left, right)
        count += 1
    return 2 * left.numel() * right.shape[1] * count / (time.perf_counter() - begun)

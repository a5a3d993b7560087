"""How fast this machine's CPU computes."""

import time

import torch

PROBE_SECONDS = 0.3


def matmul_rate(dtype: torch.dtype) -> float:
    """Floating-point operations per second of a matrix product on this CPU, measured now."""
    left, right = torch.ones(256, 2048, dtype=dtype), torch.ones(2048, 2048, dtype=dtype)
    torch.mm(left, right)  # the first one starts threads
    count, begun = 0, time.perf_counter()
    while time.perf_counter() - begun < PROBE_SECONDS or not count:
        torch.mm(left, right)
        count += 1
    return 2 * left.numel() * right.shape[1] * count / (time.perf_counter() - begun)

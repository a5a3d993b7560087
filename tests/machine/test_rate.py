import time

import torch

from lowmem_dpo.machine.rate import matmul_rate


def test_matmul_rate_counts_the_products_of_the_time_measured(monkeypatch):
    clock = iter([0.0, 0.1, 0.2, 0.4, 0.4])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    assert matmul_rate(torch.float32) == 2 * (2 * 256 * 2048 * 2048) / 0.4

from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}


class Launch(NamedTuple):
    """What a launch would have run, and on what."""

    code: Any
    arguments: dict[str, Any]

    def scalars(self) -> dict[str, Any]:
        import torch

        return {k: v for k, v in self.arguments.items() if not torch.is_tensor(v)}


@pytest.fixture
def launches(monkeypatch, compute_capability) -> list[Launch]:
    """Launches on a card that need not be there: all is as it would be, but nothing runs."""
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    launch, caught = JITFunction.run, []

    def run(kernel, *arguments, grid, warmup, **options):
        code = launch(kernel, *arguments, grid=grid, warmup=True, **options)
        caught.append(Launch(code, dict(zip(kernel.arg_names, arguments, strict=False))))

    # Compiled kernels are kept by device: every capability is one of its own.
    driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", compute_capability, 32),
        get_current_device=lambda: 2000 + compute_capability,
        get_current_stream=lambda device: 0,
    )
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    monkeypatch.setattr(JITFunction, "run", run)
    return caught

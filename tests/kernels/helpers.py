"""What several tests of the kernels share: cases of an output head, and code compiled for cards."""

import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from lowmem_dpo_kernels import twins

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
CAPABILITIES = [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]
HEAD_VARIANTS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"logit_scale": 0.0625},
    "softcap": {"logit_softcap": 4.0},
    "all": {"bias": True, "logit_scale": 1.7, "logit_softcap": 6.0},
}


def make_head_case(dtype, *, num_rows, dim, vocabulary, num_tokens, bias=False, **settings):
    """Random inputs of `token_logps`, its settings, and a gradient from above.

    Rows repeat, every seventh target is not scored, and one is the vocabulary's last.
    """
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_rows, dim, generator=generator).to(dtype)
    weight = (0.3 * torch.randn(vocabulary, dim, generator=generator)).to(dtype)
    rows = torch.randint(num_rows, (num_tokens,), generator=generator)
    targets = torch.randint(vocabulary, (num_tokens,), generator=generator)
    targets[::7], targets[4] = -100, vocabulary - 1
    if bias:
        settings["bias"] = torch.randn(vocabulary, generator=generator).to(dtype)
    upstream = torch.randn(num_tokens, generator=generator)
    return (hidden, rows, weight, targets), settings, upstream


def logps_and_grad(function, inputs, settings, upstream=None):
    """Log-probs, and the gradient of hidden; the gradient from above is ones if none is given."""
    hidden = inputs[0].detach().requires_grad_()
    logps = function(hidden, *inputs[1:], **settings)
    upstream = torch.ones_like(logps) if upstream is None else upstream.to(logps.dtype)
    (grad,) = torch.autograd.grad(logps, hidden, upstream)
    return logps.detach(), grad


def exact_logps_and_grad(inputs, settings, upstream=None):
    """The twin in float64 on the same, already rounded numbers."""
    inputs = [t.double() if t.is_floating_point() else t for t in inputs]
    settings = {k: v.double() if torch.is_tensor(v) else v for k, v in settings.items()}
    return logps_and_grad(twins.token_logps, inputs, settings, upstream)


def relative_error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


def all_equal(results, others):
    """Whether tensors have the same bits, pair by pair."""
    return all(torch.equal(one, other) for one, other in zip(results, others, strict=True))


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, what `torch.empty` and its like return is full of NaN: what is not written shows."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).new_empty(5).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


class SlicedHead:
    """The least that a head must be: its slices lie in one buffer."""

    def __init__(self, weight):
        self.weight = weight
        self.shape, self.dtype, self.device = weight.shape, weight.dtype, weight.device

    def split(self, width):
        buffer = torch.empty_like(self.weight[:width])
        for part in self.weight.split(width):
            yield buffer[: len(part)].copy_(part)


def import_benchmark(name: str) -> ModuleType:
    """A module of the benchmarks' folder, which is no package: its files import each other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
        return importlib.import_module(name)


def compile_launches(op: str, capability: tuple[int, int], label: str):
    """Kernels as one configuration of an operation would launch them on a card."""
    kernel_resources = import_benchmark("kernel_resources")
    (case,) = (case for case in kernel_resources.LAUNCHES[op](capability) if case.label == label)
    with kernel_resources.compiling_for(capability) as launches:
        case.launch()
    assert len(launches) == len(case.kernels)
    return launches

import pytest
import torch

from lowmem_dpo.machine import rotation
from lowmem_dpo_kernels import twins


def test_rotation_on_a_cpu_is_that_of_torch():
    assert rotation.rotation(torch.device("cpu"), torch.float32, 8) is twins.rotary


def test_rotation_that_fails_its_trial_is_that_of_torch(monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setattr(rotation, "runs_triton", lambda device: True)
    for passed in (True, False):
        rotation.rotation.cache_clear()
        monkeypatch.setattr(rotation, "passes_trial", lambda *_: passed)  # noqa: B023
        found = rotation.rotation(torch.device("cpu"), torch.float32, 8)
        assert (found is twins.rotary) != passed
    rotation.rotation.cache_clear()


def less_exact(x, cos, sin):
    return twins.rotary(x.double(), cos.double(), sin.double()).to(x.dtype)


def other_gradient(x, cos, sin):
    return twins.rotary(x, cos, sin).detach() + 0 * x


@pytest.mark.parametrize("wrong", [less_exact, other_gradient])
def test_trial_of_rotation_refuses_other_bits(wrong, monkeypatch):
    kernels = pytest.importorskip("lowmem_dpo_kernels.rotary", reason="Triton is not installed")
    monkeypatch.setattr(kernels, "rotary", twins.rotary)
    rotation._try_rotation(torch.device("cpu"), torch.float32, 8)
    monkeypatch.setattr(kernels, "rotary", wrong)
    with pytest.raises(ValueError, match="head size 8"):
        rotation._try_rotation(torch.device("cpu"), torch.float32, 8)

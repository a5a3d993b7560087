"""Tests of the norms' kernels on the CPU. They need TRITON_INTERPRET=1 before triton is imported.

`test_rms_norm.py` starts it, in the process that all such files share.
"""

import pytest
import torch

from lowmem_dpo_kernels import rms_norm, rms_norm_triton
from tests.kernels.test_rms_norm import KINDS, exact, make_inputs


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("shape", [(1, 5), (37, 48), (3, 1500), (130, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kernels_are_the_twin_in_float64(kind, shape, dtype):
    x, weight, grad = make_inputs(shape, dtype)
    out, grad_x = torch.full_like(x, torch.nan), torch.full_like(x, torch.nan)
    rstd = torch.full((len(x),), torch.nan)
    rms_norm_triton.forward(x, weight, kind, out, rstd)
    rms_norm_triton.backward(grad, x, weight, kind, rstd, grad_x)
    bound = 1e-6 if dtype == torch.float32 else 1e-3
    for got, want in zip((out, grad_x), exact(x, weight, grad, kind), strict=True):
        assert (got.double() - want).norm() <= bound * want.norm().clamp(min=1e-2)


def test_kernels_write_nothing_beside_their_rows():
    x, weight, grad = make_inputs((3, 24), torch.float32)
    out = torch.full((5, 24), 7.0)
    rstd = torch.full((5,), 7.0)
    rms_norm_triton.forward(x, weight, KINDS["llama"], out[:3], rstd[:3])
    rms_norm_triton.backward(grad, x, weight, KINDS["llama"], rstd[:3], out[:3])
    assert (out[3:] == 7.0).all() and (rstd[3:] == 7.0).all()


def test_rows_that_do_not_follow_each_other_are_read_as_they_lie():
    """Parts of a wider tensor, whose rows the kernels would read from their neighbours' memory."""
    x, weight, grad = make_inputs((5, 24), torch.float32)
    wide, wide_grad = torch.full((2, 5, 40), 7.0)
    wide[:, 8:32], wide_grad[:, 8:32] = x, grad
    part = wide[:, 8:32].requires_grad_()
    out = rms_norm(part, weight, KINDS["llama"], implementation="triton")
    (grad_x,) = torch.autograd.grad(out, part, wide_grad[:, 8:32])
    for got, want in zip((out, grad_x), exact(x, weight, grad, KINDS["llama"]), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)

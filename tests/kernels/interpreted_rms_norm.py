"""Tests of the norms' kernels on the CPU. They need TRITON_INTERPRET=1 before triton is imported.

`test_rms_norm.py` starts it, in the process that all such files share.
"""

import pytest
import torch

from lowmem_dpo_kernels import rms_norm_triton
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

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from lowmem_dpo_kernels import token_logps, token_logps_pass, token_logps_triton
from tests.interpreter import assert_passes_in_the_interpreter
from tests.kernels.conftest import SHARED_KIB

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
HEIGHT, WIDTH = 64, 8192  # the width of a slice is that of CUDA; fewer rows, which are the grid


@pytest.fixture
def score(monkeypatch):
    """`token_logps` up to its launches, as on a card: T = 100 in two blocks, two slices.

    The products are left out: a CPU has none of half operands with an fp32 result.
    """
    module = sys.modules["lowmem_dpo_kernels.token_logps"]
    monkeypatch.setattr(module, "_choose_path", lambda *_: "triton")
    monkeypatch.setattr(token_logps_pass, "tile", lambda device: (HEIGHT, WIDTH))
    monkeypatch.setattr(token_logps_pass, "_operand_dtype", lambda hidden: hidden.dtype)
    monkeypatch.setattr(token_logps_pass, "_multiply", lambda *_, **__: None)

    def score(dtype, *, with_gradient):
        hidden = torch.zeros(100, 64, dtype=dtype, requires_grad=with_gradient)
        weight = torch.zeros(WIDTH + 70, 64, dtype=dtype)
        logps = token_logps(hidden, torch.arange(100), weight, torch.arange(100))
        assert logps.requires_grad == with_gradient

    return score


def fold_one_slice(weights_dtype, **settings):
    row, logits = torch.zeros(1), torch.zeros(1, WIDTH)
    token_logps_triton.fold_slice(
        logits,
        torch.tensor([1]),
        row,
        row.clone(),
        row.clone(),
        logits if weights_dtype == torch.float32 else logits.to(weights_dtype),
        **{
            "with_weights": True,
            "bias": None,
            "width": WIDTH,
            "logit_scale": 1.0,
            "logit_softcap": None,
            "headroom": 0.0,
        }
        | settings,
    )


@pytest.mark.parametrize("weights_dtype", DTYPES)
@pytest.mark.parametrize("compute_capability", SHARED_KIB)
def test_fold_slice_kernel_compiles_and_fits(launches, compute_capability, weights_dtype):
    fold_one_slice(weights_dtype)
    fold_one_slice(weights_dtype, bias=torch.zeros(WIDTH), logit_softcap=30.0)
    assert len(launches) == 2
    for code, _ in launches:
        assert code.asm["cubin"]
        assert code.metadata.shared <= SHARED_KIB[compute_capability] * 1024
        assert "atom" not in code.asm["ptx"]
        assert "st.global.v4" in code.asm["ptx"]  # 16 bytes of weights at a time


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("compute_capability", [80, 89, 90, 120])
def test_token_logps_runs_the_same_code_with_and_without_gradient(launches, score, dtype):
    """Other code may sum a row in another order; only `with_weights` may tell the runs apart."""
    score(dtype, with_gradient=True)
    with_gradient = list(launches)
    launches.clear()
    score(dtype, with_gradient=False)
    assert len(with_gradient) == len(launches) == 4
    assert len({id(launch.code) for launch in with_gradient}) == 2  # one for the narrower slice
    for one, other in zip(with_gradient, launches, strict=True):
        assert one.code is other.code
        assert one.scalars().pop("with_weights") == 1
        assert other.scalars() == one.scalars() | {"with_weights": 0}


@pytest.mark.parametrize("with_gradient", [True, False])
@pytest.mark.parametrize("compute_capability", [80])
def test_token_logps_keeps_one_tile_of_weights(launches, score, with_gradient):
    score(torch.bfloat16, with_gradient=with_gradient)
    memory = [launch.arguments["weights_ptr"].untyped_storage() for launch in launches]
    assert len({storage.data_ptr() for storage in memory}) == 1
    assert memory[0].nbytes() == HEIGHT * WIDTH * torch.bfloat16.itemsize


@pytest.mark.parametrize("default", ["0", "1"])
@pytest.mark.parametrize("compute_capability", [80])
def test_fold_slice_fuses_multiply_and_add_whatever_tritons_default(
    launches, monkeypatch, compute_capability, default
):
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", default)
    fold_one_slice(torch.bfloat16)
    assert launches[0].code.metadata.enable_fp_fusion


def test_triton_path_is_right_in_the_interpreter():
    assert_passes_in_the_interpreter(Path(__file__).with_name("interpreted_token_logps.py"))

import re

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from lowmem_dpo_kernels import nf4, token_logps_fused
from lowmem_dpo_kernels.token_logps_fused import TABLE, Tiles, tiles_for
from tests.kernels.conftest import SHARED_KIB


def fold_one_slice(
    tiles: Tiles, dtype, *, width=1000, num_rows=256, with_gradient=True, fullest=True
):
    """A slice that is not whole tiles, to one block of rows."""
    row, queries = torch.zeros(num_rows), torch.zeros(num_rows, 128, dtype=dtype)
    values = workspace = None
    if with_gradient:
        values = torch.zeros(num_rows, 128)
        workspace = queries.new_zeros(token_logps_fused.weights_numel(tiles, num_rows, width))
    token_logps_fused.fold_slice(
        queries,
        torch.zeros(width, 128, dtype=dtype),
        torch.zeros(num_rows, dtype=torch.int64),
        row,
        row.clone(),
        row.clone(),
        values,
        workspace,
        tiles=tiles,
        bias=torch.zeros(width) if fullest else None,
        width=width,
        logit_scale=1.0,
        logit_softcap=30.0 if fullest else None,
    )


@pytest.mark.parametrize("compute_capability", SHARED_KIB)
def test_fused_kernels_compile_and_fit(launches, compute_capability):
    capability = divmod(compute_capability, 10)
    assert capability in TABLE
    fold_one_slice(tiles_for(capability, torch.bfloat16), torch.bfloat16)
    assert len(launches) == 3
    for code, _ in launches:
        assert code.metadata.shared <= SHARED_KIB[compute_capability] * 1024
        assert not re.search(r"\b(atom|red)\.", code.asm["ptx"])
    for code in (launches[0].code, launches[2].code):
        assert "mma" in code.asm["ptx"]  # tensor cores


@pytest.mark.parametrize("compute_capability", [86])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_fused_kernels_compile_for_other_types(launches, dtype):
    fold_one_slice(tiles_for((8, 6), dtype), dtype, fullest=False)
    assert len(launches) == 3
    assert all(code.metadata.shared <= 99 * 1024 for code, _ in launches)
    if dtype == torch.float32:  # tensor cores would round its operands
        assert "mma" not in launches[0].code.asm["ptx"]


@pytest.mark.parametrize("compute_capability", [89])
def test_fused_logits_are_the_same_code_with_and_without_gradient(launches):
    """For any number of rows and any width too: it is compiled once."""
    tiles = tiles_for((8, 9), torch.bfloat16)
    fold_one_slice(tiles, torch.bfloat16, fullest=False)
    fold_one_slice(tiles, torch.bfloat16, fullest=False, with_gradient=False)
    fold_one_slice(
        tiles, torch.bfloat16, fullest=False, with_gradient=False, width=4243, num_rows=77
    )
    scores = [launch for launch in launches if "queries_ptr" in launch.arguments]
    assert len(scores) == 3
    assert len({id(launch.code) for launch in scores}) == 1
    assert [launch.scalars()["with_weights"] for launch in scores] == [1, 0, 0]


def test_tiles_for_an_unknown_card_are_those_of_the_one_before():
    assert tiles_for((8, 7), torch.float16) == TABLE[8, 6]
    assert tiles_for((12, 1), torch.bfloat16) == TABLE[12, 0]


@pytest.mark.parametrize("tiles", [*TABLE.values(), token_logps_fused.FP32_TILES])
def test_tiles_divide_what_they_must(tiles):
    """D is a multiple of 64; a step of the second product stays in one tile of logits."""
    assert 64 % tiles.score_step == 0
    assert tiles.columns % tiles.value_step == 0


@pytest.mark.parametrize("compute_capability", SHARED_KIB)
def test_nf4_kernel_compiles_writes_wide_and_fuses_nothing(launches, compute_capability):
    packed, code, levels = torch.zeros(4096, dtype=torch.uint8), torch.zeros(256), torch.zeros(16)
    scales = torch.zeros(128, dtype=torch.uint8), torch.zeros(1), torch.zeros(())
    out = torch.empty(8192, dtype=torch.bfloat16)
    nf4.nf4_dequantize(packed, *scales, code, levels, out)
    (launch,) = launches
    ptx = launch.code.asm["ptx"]
    assert "st.global.v4" in ptx  # 16 bytes at a time
    assert "fma.rn" not in ptx  # or bits would differ from bitsandbytes'

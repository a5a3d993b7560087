import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from lowmem_dpo_kernels import token_logps_fused
from lowmem_dpo_kernels.token_logps_fused import FP32_SIZES, HALF_SIZES, sizes_for
from tests.kernels.helpers import CAPABILITIES, import_benchmark


def test_fused_logits_are_the_same_code_with_and_without_gradient():
    """For any number of rows and any width too: it is compiled once."""
    launch_cases = import_benchmark("_launches")
    sizes = sizes_for((8, 9), torch.bfloat16)
    with import_benchmark("_ahead_of_time").compiling_for((8, 9)) as launches:
        for with_gradient, width, num_rows in (
            (True, 1000, 256),
            (False, 1000, 256),
            (False, 4243, 77),
        ):
            rows = launch_cases.scored_rows(
                num_rows, 128, torch.bfloat16, with_gradient=with_gradient
            )
            (_, head_slice), _ = launch_cases.head_slices(width, width, torch.bfloat16)
            workspace = None
            if with_gradient:
                numel = token_logps_fused.weights_numel(sizes, num_rows, width)
                workspace = rows.queries.new_zeros(numel)
            token_logps_fused.fold_slice(rows, head_slice, workspace, sizes)
    scores = [launch for launch in launches if "queries_ptr" in launch.arguments]
    assert len(scores) == 3
    assert len({id(launch.code) for launch in scores}) == 1
    assert [launch.arguments["with_weights"] for launch in scores] == [1, 0, 0]


def test_sizes_for_half_operands_have_a_stage_more_where_shared_memory_is_large():
    """An unknown card gets what fits all."""
    stages = {card: sizes_for(card, torch.float16).num_stages for card in CAPABILITIES}
    assert stages == {(8, 0): 4, (8, 6): 3, (8, 9): 3, (9, 0): 4, (10, 0): 4, (12, 0): 3}
    assert sizes_for((12, 1), torch.bfloat16) == HALF_SIZES


@pytest.mark.parametrize("sizes", [HALF_SIZES, FP32_SIZES])
def test_sizes_divide_what_they_must(sizes):
    """D is a multiple of 64; a step of the second product stays in one tile of logits."""
    assert 64 % sizes.score_step == 0
    assert sizes.columns % sizes.value_step == 0

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from lowmem_dpo_kernels import token_logps, token_logps_pass
from tests.interpreter import assert_passes_in_the_interpreter
from tests.kernels.helpers import import_benchmark

HEIGHT, WIDTH = 64, 8192  # the width of a slice is that of CUDA; fewer rows, which are the grid


@pytest.fixture
def launches_of(monkeypatch):
    """Launches of `token_logps` as on a card: T = 100 in two blocks, two slices of the head.

    The products are left out: a CPU has none of half operands with an fp32 result.
    """
    module = sys.modules["lowmem_dpo_kernels.token_logps"]
    monkeypatch.setattr(module, "resolve_implementation", lambda *_: "triton")
    monkeypatch.setattr(
        token_logps_pass, "pass_numerics", lambda device, dtype: (HEIGHT, WIDTH, dtype)
    )
    for product in ("mm", "addmm"):
        monkeypatch.setattr(torch, product, lambda *_, **__: None)

    def launch(capability, dtype, *, with_gradient):
        hidden = torch.zeros(100, 64, dtype=dtype, requires_grad=with_gradient)
        weight = torch.zeros(WIDTH + 70, 64, dtype=dtype)
        with import_benchmark("_ahead_of_time").compiling_for(capability) as launches:
            logps = token_logps(hidden, torch.arange(100), weight, torch.arange(100))
        assert logps.requires_grad == with_gradient
        return launches

    return launch


def scalars(launch):
    return {k: v for k, v in launch.arguments.items() if not torch.is_tensor(v)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("capability", [(8, 0), (12, 0)], ids=str)
def test_token_logps_runs_the_same_code_with_and_without_gradient(launches_of, capability, dtype):
    """Other code may sum a row in another order; only `with_weights` may tell the runs apart."""
    with_gradient = launches_of(capability, dtype, with_gradient=True)
    without = launches_of(capability, dtype, with_gradient=False)
    assert len(with_gradient) == len(without) == 4
    assert len({id(launch.code) for launch in without}) == 2  # one for the narrower slice
    for one, other in zip(with_gradient, without, strict=True):
        assert one.code is other.code
        assert scalars(one) == scalars(other) | {"with_weights": 1}
        assert scalars(other)["with_weights"] == 0


@pytest.mark.parametrize("with_gradient", [True, False])
def test_token_logps_keeps_one_tile_of_weights(launches_of, with_gradient):
    launches = launches_of((8, 0), torch.bfloat16, with_gradient=with_gradient)
    memory = [launch.arguments["weights_ptr"].untyped_storage() for launch in launches]
    assert len({storage.data_ptr() for storage in memory}) == 1
    assert memory[0].nbytes() == HEIGHT * WIDTH * torch.bfloat16.itemsize


CASES = Path(__file__).with_name("interpreted_token_logps.py")


@pytest.mark.parametrize("path", ["triton", "fused"])
def test_triton_paths_match_float64_in_the_interpreter(path):
    """A head with all that it may have, in fp32; the other cases are slow."""
    name = f"test_triton_paths_match_float64[dtype0-all-{path}]"
    assert_passes_in_the_interpreter(Path(f"{CASES}::{name}"))


@pytest.mark.slow
def test_triton_paths_are_right_in_the_interpreter():
    assert_passes_in_the_interpreter(CASES)

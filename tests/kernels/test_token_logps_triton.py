import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from lowmem_dpo_kernels import token_logps_triton  # noqa: E402

SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
POINTERS = {
    "logits_ptr": "*fp32",
    "bias_ptr": "*fp32",
    "columns_ptr": "*i64",
    "top_ptr": "*fp32",
    "rest_ptr": "*fp32",
    "target_logit_ptr": "*fp32",
    "rescale_ptr": "*fp32",
}
SCALARS = {
    "logits_stride": "i32",
    "weights_stride": "i32",
    "width": "i32",
    "padded_width": "i32",
    "logit_scale": "fp32",
    "logit_softcap": "fp32",
    "headroom": "fp32",
}
CONSTANTS = {"HAS_BIAS": True, "HAS_SOFTCAP": True, "WITH_WEIGHTS": True, "BLOCK": 8192}


@pytest.mark.parametrize("weights_dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("compute_capability", SHARED_KIB)
def test_fold_slice_kernel_compiles_and_fits(compute_capability, weights_dtype):
    source = ASTSource(
        token_logps_triton._fold_slice_kernel,
        POINTERS
        | {"weights_ptr": f"*{weights_dtype}"}
        | SCALARS
        | dict.fromkeys(CONSTANTS, "constexpr"),
        constexprs=CONSTANTS,
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", compute_capability, 32),
        options={"num_warps": token_logps_triton.NUM_WARPS},
    )
    assert compiled.asm["cubin"]
    assert compiled.metadata.shared <= SHARED_KIB[compute_capability] * 1024
    assert "atom" not in compiled.asm["ptx"]


def test_triton_path_is_right_in_the_interpreter(request):
    cases = Path(__file__).with_name("interpreted_token_logps.py")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)],
        cwd=request.config.rootpath,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert run.returncode == 0, run.stdout[-4000:]
    assert " passed" in run.stdout
    assert "skipped" not in run.stdout

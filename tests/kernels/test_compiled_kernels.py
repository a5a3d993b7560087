"""Every kernel compiled for cards that need not be there."""

import ast
import json
import re

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton

from tests.kernels.helpers import BENCHMARKS, CAPABILITIES, compile_launches, import_benchmark

kernel_resources = import_benchmark("kernel_resources")
RECORD = json.loads(
    (BENCHMARKS / "results" / "kernel_resources-tree_attention.json").read_text(encoding="utf-8")
)

# The first of every operation, the fullest variant everywhere, others here and there. All of
# attention's are on record.
COMPILED = [
    *((op, (8, 6), next(cases((8, 6))).label) for op, cases in kernel_resources.LAUNCHES.items()),
    *(
        (op, capability, label)
        for capability in CAPABILITIES
        for op, label in (
            ("token_logps", "bf16, bias, cap"),
            ("token_logps_fused", "bf16, bias, cap"),
            ("tree_attention", "E=256, bf16, window, cap"),
        )
    ),
    ("token_logps", (8, 0), "bf16"),
    ("token_logps", (12, 0), "fp16"),
    ("token_logps", (9, 0), "fp32, bias, cap"),
    ("token_logps_fused", (8, 6), "fp16"),
    ("token_logps_fused", (8, 6), "fp32"),
    ("nf4_dequantize", (12, 0), "fp16, one level"),
    ("gated_product", (8, 0), "gelu_tanh, fp16"),
    *(("gated_product", capability, "silu, bf16, in one") for capability in CAPABILITIES),
    ("rms_norm", (8, 6), "D=128, fp16, gemma"),
    ("rms_norm", (8, 6), "D=8192, bf16, llama"),
    ("rms_norm", (12, 0), "D=8192, bf16, llama"),
    *(("tree_attention", capability, "E=128, bf16") for capability in [(8, 6), (9, 0), (12, 0)]),
    ("tree_attention", (8, 0), "E=80, bf16"),
    ("tree_attention", (8, 9), "E=64, fp16"),
]


@pytest.mark.parametrize("op, capability, label", COMPILED, ids=str)
def test_kernels_compile_fit_and_have_no_atomics(op, capability, label):
    for launch in compile_launches(op, capability, label):
        assert kernel_resources.fits(kernel_resources.resources(launch, capability))
        assert not re.search(r"\b(atom|red)\.", launch.ptx)


@pytest.mark.parametrize(
    "op, capability, label", [c for c in COMPILED if c[0] == "tree_attention"], ids=str
)
def test_tree_attention_takes_the_registers_on_record(op, capability, label):
    if RECORD["versions"]["triton"] != triton.__version__:
        pytest.skip("the record was made by another Triton, and so another ptxas")
    name = ".".join(map(str, capability))
    recorded = [
        (row["registers"], row["spilled_bytes"])
        for row in RECORD["results"]
        if (row["capability"], row["case"]) == (name, label)
    ]
    found = [
        kernel_resources.resources(launch, capability)
        for launch in compile_launches(op, capability, label)
    ]
    assert [(row.registers, row.spilled_bytes) for row in found] == recorded


def test_record_of_resources_has_every_case_of_the_table():
    """`kernel_resources.py --ops tree_attention --output` of that file writes it anew."""
    recorded = {(r["capability"], r["case"], r["kernel"]) for r in RECORD["results"]}
    for major, minor in CAPABILITIES:
        for case in kernel_resources.LAUNCHES["tree_attention"]((major, minor)):
            assert recorded >= {(f"{major}.{minor}", case.label, name) for name in case.kernels}
    assert all(r["programs"] > 0 for r in RECORD["results"])
    spilled = max(r["spilled_bytes"] for r in RECORD["results"])
    assert spilled <= kernel_resources.MAX_SPILLED_BYTES


@pytest.mark.parametrize(
    "op, capability, label",
    [c for c in COMPILED if c[0] in ("tree_attention", "token_logps_fused")],
    ids=str,
)
def test_products_use_tensor_cores_save_those_of_fp32(op, capability, label):
    """Tensor cores would round the operands of fp32."""
    launches = compile_launches(op, capability, label)
    products = [launch for launch in launches if "fold_tiles" not in launch.code.metadata.name]
    assert all(("mma" in launch.ptx) == ("fp32" not in label) for launch in products)
    if op == "tree_attention":
        assert all("cp.async" in launch.ptx for launch in products)  # loads run ahead


@pytest.mark.parametrize("capability", CAPABILITIES, ids=str)
def test_rows_come_in_and_leave_16_bytes_at_a_time(capability):
    for label in ("bf16", "fp32, bias, cap"):
        (launch,) = compile_launches("token_logps", capability, label)
        assert "st.global.v4" in launch.ptx
        assert "ld.global.v4" in launch.ptx
        num_scalar = len(re.findall(r"ld\.global\.b32", launch.ptx))
        assert num_scalar <= 4 or "bias" in label  # of a row's statistics; a bias ends at width
    for launch in compile_launches("gated_product", capability, "silu, bf16, in one"):
        assert "st.global.v4" in launch.ptx and "ld.global.v4" in launch.ptx
    forth, back = compile_launches("rotary", capability, "H=32, E=128, bf16")
    assert "st.global.v4" in forth.ptx and "ld.global.v4" in forth.ptx
    assert forth.code is back.code
    # Or its bits would differ from PyTorch's. Before 9.0 an fma in bf16 is a product, or a sum.
    assert "fma.rn.f32" not in forth.ptx
    (launch,) = compile_launches("nf4_dequantize", capability, "bf16")
    assert "st.global.v4" in launch.ptx
    assert "fma.rn" not in launch.ptx  # or NF4's bits would differ from bitsandbytes'


def launched_kernels() -> set[str]:
    """The names behind `@triton.jit` that some line of the kernels launches."""
    compiled, launched = set(), set()
    for path in (BENCHMARKS.parent / "kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                marks = map(ast.unparse, node.decorator_list)
                compiled |= {node.name for mark in marks if mark.startswith("triton.jit")}
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                launched.add(ast.unparse(node.func.value).split(".")[-1])
            elif isinstance(node, ast.Call):  # to a function that launches what it is given
                names = (each for each in node.args if isinstance(each, ast.Name | ast.Attribute))
                launched |= {ast.unparse(each).split(".")[-1] for each in names}
    return compiled & launched


def test_every_kernel_that_is_launched_is_among_the_launches():
    found = set()
    for cases in kernel_resources.LAUNCHES.values():
        with kernel_resources.compiling_for((8, 6)) as launches:
            next(cases((8, 6))).launch()
        found |= {launch.code.metadata.name for launch in launches}
    assert len(found) >= 10 and found == launched_kernels()


def test_every_launch_says_whether_multiply_and_add_are_fused():
    """Triton's default varies with its version and environment; bits would with it."""
    for op, cases in kernel_resources.LAUNCHES.items():
        with kernel_resources.compiling_for((8, 6)) as launches:
            next(cases((8, 6))).launch()
        for launch in launches:
            assert launch.arguments["enable_fp_fusion"] == (op not in ("nf4_dequantize", "rotary"))


def test_tree_attention_is_not_compiled_again_for_another_pack():
    """Lengths, window and factors are not part of what is compiled."""
    from lowmem_dpo_kernels import TreePlan, tree_attention_triton

    sizes = tree_attention_triton.tile_sizes_for((8, 6), 64)
    with kernel_resources.compiling_for((8, 6)) as launches:
        for num_tokens, window, scale in ((64, 8, 0.1), (1, 1, 1.0), (208, 1000, 2.0)):
            x = torch.zeros(num_tokens, 2, 64, dtype=torch.bfloat16).transpose(0, 1)
            settings = (scale, window, None)
            plan = TreePlan([(0, num_tokens, 0, 0)], num_tokens)
            out, lse = tree_attention_triton.forward(x, x, x, plan, sizes.forward, *settings)
            tree_attention_triton.backward(out, x, x, x, out, lse, plan, sizes, *settings)
    assert len(launches) == 9
    assert len({id(launch.code) for launch in launches}) == 3


def test_kernel_resources_prints_a_table_and_refuses_what_does_not_fit(monkeypatch, capsys):
    arguments = ["--ops", "token_logps", "--capabilities", "8.6"]
    assert kernel_resources.main(arguments) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split()[:4] == ["op", "case", "kernel", "cc"]
    assert lines and all("fold_slice" in line and line.endswith("%") for line in lines)
    monkeypatch.setattr(kernel_resources, "MAX_SPILLED_BYTES", -1)
    assert kernel_resources.main(arguments) == 1
    assert "DOES NOT FIT" in capsys.readouterr().out

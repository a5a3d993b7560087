import importlib
import json
import re
import sys
from pathlib import Path

import pytest

from tests.interpreter import assert_passes_in_the_interpreter

pytest.importorskip("triton", reason="Triton is not installed")

ROOT = Path(__file__).resolve().parents[2]
CAPABILITIES = [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]
# The fullest variant of the largest heads everywhere; the rest is on record, see below.
COMPILED = [
    *((capability, "E=256, bf16, window, cap") for capability in CAPABILITIES),
    *((capability, "E=128, bf16") for capability in [(8, 6), (9, 0), (12, 0)]),
    ((8, 0), "E=80, bf16"),
    ((8, 9), "E=64, fp16"),
]


@pytest.fixture(scope="module")
def kernel_resources():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
        yield importlib.import_module("kernel_resources")


def resources_on_record():
    """By capability, case and kernel; empty if another Triton, and so another ptxas, made it."""
    path = ROOT / "benchmarks" / "results" / "kernel_resources-tree_attention.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    if record["versions"]["triton"] != importlib.import_module("triton").__version__:
        return {}
    return {(r["capability"], r["case"], r["kernel"]): r for r in record["results"]}


@pytest.mark.parametrize("capability, label", COMPILED)
def test_tree_attention_compiles_and_fits(kernel_resources, capability, label):
    (case,) = (
        case for case in kernel_resources.LAUNCHES["tree_attention"](capability) if case[0] == label
    )
    with kernel_resources.compiling_for(capability) as launches:
        case.launch()
    assert len(launches) == 3
    recorded = resources_on_record()
    for launch, name in zip(launches, case.kernels, strict=True):
        found = kernel_resources.resources(launch, capability)
        assert kernel_resources.fits(found)
        if recorded:
            row = recorded[".".join(map(str, capability)), label, name]
            assert (found.registers, found.spilled_bytes) == (
                row["registers"],
                row["spilled_bytes"],
            )
        assert not re.search(r"\b(atom|red)\.", launch.ptx)
        assert "mma" in launch.ptx  # tensor cores
        assert "cp.async" in launch.ptx  # loads run ahead


def test_tree_attention_is_not_compiled_again_for_another_pack(kernel_resources):
    """Lengths, window and factors are not part of what is compiled."""
    import torch

    from lowmem_dpo_kernels import TreePlan, tree_attention_triton

    tiles = tree_attention_triton.tiles_for((8, 6), 64)
    with kernel_resources.compiling_for((8, 6)) as launches:
        for num_tokens, window, scale in ((64, 8, 0.1), (1, 1, 1.0), (208, 1000, 2.0)):
            x = torch.zeros(num_tokens, 2, 64, dtype=torch.bfloat16).transpose(0, 1)
            settings = (scale, window, None)
            plan = TreePlan([(0, num_tokens, 0, 0)], num_tokens)
            out, lse = tree_attention_triton.forward(x, x, x, plan, tiles.forward, *settings)
            tree_attention_triton.backward(out, x, x, x, out, lse, plan, tiles, *settings)
    assert len(launches) == 9
    assert len({id(launch.code) for launch in launches}) == 3


def test_record_of_resources_has_every_case_of_the_table(kernel_resources):
    """`kernel_resources.py --ops tree_attention --output` of that file writes it anew."""
    path = ROOT / "benchmarks" / "results" / "kernel_resources-tree_attention.json"
    results = json.loads(path.read_text(encoding="utf-8"))["results"]
    recorded = {(r["capability"], r["case"], r["kernel"]) for r in results}
    for major, minor in CAPABILITIES:
        for case in kernel_resources.LAUNCHES["tree_attention"]((major, minor)):
            assert recorded >= {(f"{major}.{minor}", case.label, name) for name in case.kernels}
    assert all(r["programs"] > 0 for r in results)
    assert max(r["spilled_bytes"] for r in results) <= kernel_resources.MAX_SPILLED_BYTES


def test_kernel_resources_prints_a_table_and_refuses_what_does_not_fit(
    kernel_resources, monkeypatch, capsys
):
    arguments = ["--ops", "token_logps", "--capabilities", "8.6"]
    assert kernel_resources.main(arguments) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split()[:4] == ["op", "case", "kernel", "cc"]
    assert lines and all("fold_slice" in line and line.endswith("%") for line in lines)
    monkeypatch.setattr(kernel_resources, "MAX_SPILLED_BYTES", -1)
    assert kernel_resources.main(arguments) == 1
    assert "DOES NOT FIT" in capsys.readouterr().out


def test_tree_attention_is_right_in_the_interpreter():
    assert_passes_in_the_interpreter(Path(__file__).with_name("interpreted_tree_attention.py"))

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
        yield importlib.import_module("benchmark_tree_attention")


def test_main_quick_prints_a_table_and_writes_json(benchmark, tmp_path, capsys):
    path = tmp_path / "quick.json"
    assert benchmark.main(["--quick", "--device", "cpu", "--output", str(path)]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    names = ["op", "impl", "shape", "dtype", "ms", "tflops", "peak_mib", "device", "commit"]
    assert header.split() == names
    results = json.loads(path.read_text(encoding="utf-8"))["results"]
    assert len(lines) == len(results)
    assert {r["impl"] for r in results} >= {"ours (sdpa)", "flash, plain", "twin"}
    assert all(set(names) <= set(r) and r["ms"] > 0 and r["tflops"] > 0 for r in results)


def test_main_prints_no_speed_of_a_wrong_result(benchmark, monkeypatch, capsys):
    def wrong(case):
        return 1.01 * benchmark.twin(case)

    found = lambda trees, plain: {"wrong": (wrong, trees)}  # noqa: E731
    monkeypatch.setattr(benchmark, "implementations", found)
    benchmark.main(["--quick", "--device", "cpu"])
    _, row, refusal = capsys.readouterr().out.splitlines()
    assert row.split()[4:7] == ["wrong", "-", "-"]
    assert refusal == "  refused: off by 1.0e-02 of its size"


def test_main_refuses_a_shape_it_cannot_read(benchmark, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--shapes", "8x512", "--device", "cpu"])
    assert "must be like 8x512+256+256x32/8x128, got 8x512" in capsys.readouterr().err


def test_flash_of_plain_sequences_equals_the_twin_with_branches_of_unequal_length(benchmark):
    _, plain = benchmark.make_cases("3x4+2+5x4/2x8", torch.float32, torch.device("cpu"))
    for one, other in zip(
        benchmark.step(benchmark.flash, plain), benchmark.step(benchmark.twin, plain), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_needed_flops_counts_a_trunks_pairs_once(benchmark):
    trees, plain = benchmark.make_cases("2x3+1+2x4/2x8", torch.float32, torch.device("cpu"))
    # Keys that each query sees: 1 to 4 along trunk and chosen, 4 and 5 along rejected.
    assert benchmark.needed_flops(trees) == 14 * 8 * 4 * 2 * (1 + 2 + 3 + 4 + 4 + 5)
    assert benchmark.needed_flops(plain) == 14 * 8 * 4 * 2 * (1 + 2 + 3 + 4 + 1 + 2 + 3 + 4 + 5)

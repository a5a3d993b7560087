import json

import pytest
import torch

from tests.kernels.helpers import import_benchmark


@pytest.fixture(scope="module")
def benchmark():
    return import_benchmark("benchmark_tree_attention")


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
    assert benchmark.main(["--quick", "--device", "cpu"]) == 1
    _, row, refusal = capsys.readouterr().out.splitlines()
    assert row.split()[4:7] == ["wrong", "-", "-"]
    assert refusal == "  refused: error 1.0e-02"


def test_main_goes_on_after_a_row_that_fails(benchmark, monkeypatch, tmp_path, capsys):
    runs = []

    def greedy(case):
        runs.append(1)
        if len(runs) == 3:  # the check passed; memory runs out where time is taken
            raise torch.OutOfMemoryError("full")
        return benchmark.twin(case)

    def broken(case):
        raise TypeError("no such\nargument")

    found = lambda trees, plain: {"greedy": (greedy, trees), "broken": (broken, trees)}  # noqa: E731
    monkeypatch.setattr(benchmark, "implementations", found)
    path = tmp_path / "out.json"
    assert benchmark.main(["--quick", "--device", "cpu", "--output", str(path)]) == 1
    _, first, second, reason = capsys.readouterr().out.splitlines()
    assert first.split()[4:7] == ["memory", "-", "-"]
    assert second.split()[4:7] == ["failed", "-", "-"]
    assert reason == "  failed: TypeError: no such argument"
    results = json.loads(path.read_text(encoding="utf-8"))["results"]
    assert [r["failure"] for r in results] == ["memory", reason.strip()]


def test_largest_error_sees_the_last_tree(benchmark):
    trees, _ = benchmark.make_cases("3x4+2+5x4/2x8w6c2", torch.float64, torch.device("cpu"))
    out, *grads = benchmark.step(benchmark.twin, trees)
    assert benchmark.largest_error(trees, (out, *grads)) < 1e-12
    for tensor in grads:
        kept = tensor.clone()
        tensor[-1, -3:] *= 1.5
        assert benchmark.largest_error(trees, (out, *grads)) > 0.01
        tensor.copy_(kept)
    out[-1] *= 1.5
    assert benchmark.largest_error(trees, (out, *grads)) > 0.01


def test_a_shape_carries_window_and_cap(benchmark):
    shape, device = "2x4+2+5x4/2x8w3c0.5", torch.device("cpu")
    trees, plain = benchmark.make_cases(shape, torch.float64, device)
    assert (trees.sliding_window, plain.softcap) == (3, 0.5)
    assert "flash, plain" not in benchmark.implementations(trees, plain)
    for one, other in zip(
        benchmark.step(benchmark.ours_sdpa, trees),
        benchmark.step(benchmark.twin, trees),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
    # Of a window of 3: 1, 2 and then 3 keys a query, the trunk's once.
    assert benchmark.needed_flops(trees) == 14 * 8 * 4 * 2 * (1 + 2 + 3 * 9)


def test_the_twin_is_left_out_where_its_scores_would_fill_a_card(benchmark, monkeypatch):
    cases = benchmark.make_cases("2x4+2+5x4/2x8", torch.float32, torch.device("cpu"))
    assert "twin" in benchmark.implementations(*cases)
    monkeypatch.setattr(benchmark, "TWIN_SCORES", 4 * 22**2 - 1)
    assert "twin" not in benchmark.implementations(*cases)


def test_main_refuses_a_shape_it_cannot_read(benchmark, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--shapes", "8x512", "--device", "cpu"])
    assert "x32/8x128, got 8x512" in capsys.readouterr().err


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

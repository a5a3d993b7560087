import json

import pytest
import torch

from tests.kernels.helpers import import_benchmark


@pytest.fixture(scope="module")
def benchmark():
    return import_benchmark("benchmark_token_logps")


def without_trl(monkeypatch, benchmark):
    """Importing TRL takes many seconds."""
    real = benchmark.implementations
    monkeypatch.setattr(
        benchmark,
        "implementations",
        lambda device: {name: f for name, f in real(device).items() if name != "trl"},
    )


def test_main_quick_prints_a_table_and_writes_json(benchmark, monkeypatch, tmp_path, capsys):
    without_trl(monkeypatch, benchmark)
    path = tmp_path / "results" / "quick.json"
    assert benchmark.main(["--quick", "--device", "cpu", "--output", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    header = ["op", "impl", "shape", "dtype", "ms", "peak_mib", "device", "commit"]
    assert lines[0].split() == header
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record["schema_version"] == 1
    results = record["results"]
    assert len(lines) == 1 + len(results)
    assert {(r["impl"], r["dtype"]) for r in results} >= {
        (impl, dtype) for impl in ("ours", "twin", "plain") for dtype in ("float32", "bfloat16")
    }
    assert all(set(header) <= set(r) and r["ms"] > 0 for r in results)


@pytest.mark.parametrize("defect", ["value", "gradient"])
def test_main_prints_no_speed_of_a_wrong_result(benchmark, monkeypatch, capsys, defect):
    def wrong(case):
        logps = benchmark.ours(case)
        return logps + 0.01 if defect == "value" else logps + 0.01 * (logps - logps.detach())

    monkeypatch.setattr(benchmark, "implementations", lambda device: {"wrong": wrong})
    assert benchmark.main(["--quick", "--device", "cpu", "--dtypes", "float32"]) == 1
    _, row, refusal = capsys.readouterr().out.splitlines()
    assert row.split()[4:6] == ["wrong", "-"]
    assert refusal.startswith("  refused: logps_error ")


def test_main_goes_on_where_memory_runs_out(benchmark, monkeypatch, capsys):
    def greedy(case):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(
        benchmark, "implementations", lambda device: {"greedy": greedy, "ours": benchmark.ours}
    )
    assert benchmark.main(["--quick", "--device", "cpu", "--dtypes", "float32"]) == 0
    _, failed, ours = capsys.readouterr().out.splitlines()
    assert failed.split()[1:6] == ["greedy", "64x32x1000", "float32", "memory", "-"]
    assert float(ours.split()[4]) > 0


def test_main_goes_on_after_a_peer_that_fails(benchmark, monkeypatch, capsys):
    def broken(case):
        raise TypeError("no such argument")

    monkeypatch.setattr(
        benchmark, "implementations", lambda device: {"broken": broken, "ours": benchmark.ours}
    )
    assert benchmark.main(["--quick", "--device", "cpu", "--dtypes", "float32"]) == 1
    _, failed, reason, ours = capsys.readouterr().out.splitlines()
    assert failed.split()[4:6] == ["failed", "-"]
    assert reason == "  failed: TypeError: no such argument"
    assert float(ours.split()[4]) > 0


def test_memory_limit_needs_a_card(benchmark, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--quick", "--device", "cpu", "--memory_limit", "8GB"])
    assert "memory_limit has no effect on cpu" in capsys.readouterr().err


def test_errors_see_the_last_of_many_rows(benchmark):
    case = benchmark.make_case("1000x8x100", torch.float32, torch.device("cpu"))
    logps, grad = benchmark.step(benchmark.ours, case)
    assert max(benchmark.errors(case, logps, grad)) < 1e-4
    logps[-1] += 0.5
    assert benchmark.errors(case, logps, grad)[0] == pytest.approx(0.5, abs=1e-3)
    grad[case.rows[-1]] *= 2
    assert benchmark.errors(case, logps, grad)[1] > 0.01


def test_main_refuses_a_shape_it_cannot_read(benchmark, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--shapes", "512x512", "--device", "cpu"])
    assert "a shape must be NxDxV, such as 512x512x128256 (" in capsys.readouterr().err


def test_trl_scores_as_we_do(benchmark):
    pytest.importorskip("trl", reason="TRL is not installed")
    case = benchmark.make_case("16x8x100", torch.float32, torch.device("cpu"))
    for ours, theirs in zip(
        benchmark.step(benchmark.ours, case), benchmark.step(benchmark.trl, case), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)

import json

import pytest
import torch

from tests.kernels.helpers import import_benchmark


@pytest.fixture(scope="module")
def benchmark():
    return import_benchmark("benchmark_nf4")


def test_main_quick_prints_a_table_and_writes_json(benchmark, tmp_path, capsys):
    path = tmp_path / "quick.json"
    assert benchmark.main(["--quick", "--device", "cpu", "--output", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["impl", "ours", "bitsandbytes", "copy"]
    results = json.loads(path.read_text(encoding="utf-8"))["results"]
    assert all(result["ms"] > 0 and result["gb_per_s"] > 0 for result in results)


def test_main_prints_no_speed_of_other_bits(benchmark, monkeypatch, capsys):
    right = benchmark.ours
    monkeypatch.setattr(benchmark, "ours", lambda weight, out: right(weight, out) + torch.ones(()))
    assert benchmark.main(["--quick", "--device", "cpu"]) == 1
    _, ours, theirs, _ = capsys.readouterr().out.splitlines()
    assert ours.split()[4:6] == ["wrong", "-"]
    assert float(theirs.split()[4]) > 0

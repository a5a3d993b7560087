"""The benchmarks run, and refuse to print the speed of a wrong result."""

import importlib.util
import json
import math
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
HAS_TRL = bool(importlib.util.find_spec("trl") and importlib.util.find_spec("peft"))


def run_tiny(tmp_path: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], Path]:
    output = tmp_path / "results" / "tiny.json"
    command = [sys.executable, str(BENCHMARKS / "train_step.py"), "--shape", "tiny"]
    command += ["--device", "cpu", "--steps", "2", "--output", str(output), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240), output


@pytest.fixture
def train_step(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "path", list(sys.path))  # the benchmark adds to it
    import train_step

    return train_step


@pytest.mark.slow
def test_train_step_agrees_with_trl_and_records_what_it_prints(tmp_path):
    impls = ["ours", "trl-precompute"] if HAS_TRL else ["ours"]
    run, output = run_tiny(tmp_path, "--pairs", "2x16", "--impl", ",".join(impls))
    assert run.returncode == 0, run.stdout + run.stderr
    header, *lines = run.stdout.splitlines()
    columns = ["op", "impl", "shape", "dtype", "ms", "peak_mib", "device", "commit"]
    assert header.split()[: len(columns)] == columns
    assert [line.split()[:2] for line in lines] == [["train_step", impl] for impl in impls]
    record = json.loads(output.read_text(encoding="utf-8"))
    assert record["schema_version"] == 1
    assert record["versions"]["torch"] == torch.__version__
    ours = record["results"][0]
    assert ours["margin_0"] == 0.0
    assert ours["loss_0"] == pytest.approx(math.log(2), abs=1e-6)
    assert ours["ratio"] == 1.0
    for result in record["results"]:
        assert len(result["steps_ms"]) == 2
        assert result["ms"] > 0
        assert result["logps_chosen_0"] == pytest.approx(ours["logps_chosen_0"], abs=1e-3)
        assert result["ref_ms"] > 0
        assert result["grad_norm_0"] == pytest.approx(ours["grad_norm_0"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TRL, reason="needs trl and peft")
def test_train_step_gives_trl_the_same_nf4_weights(train_step):
    arguments = ["--shape", "tiny", "--device", "cpu", "--pairs", "1x16", "--steps", "1"]
    arguments += ["--quantization", "nf4"]
    ours = train_step.work(train_step.parse([*arguments, "--worker", "ours"]))
    trl = train_step.measure("trl", arguments)
    assert trl["logps_chosen_0"] == pytest.approx(ours["logps_chosen_0"], abs=1e-3)
    assert trl["logps_rejected_0"] == pytest.approx(ours["logps_rejected_0"], abs=1e-3)
    assert trl["grad_norm_0"] == pytest.approx(ours["grad_norm_0"], rel=0.01)


def test_layer_memory_sees_what_halves_and_norms_save(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "path", list(sys.path))
    import layer_memory

    options = layer_memory.parse(["--scale", "32", "--tokens", "128"])
    layer_memory.check(options)
    monkeypatch.setattr(sys.modules[layer_memory.rms_norm.__module__], "_BLOCK_NUMBERS", 1)
    options.tile_rows = 16
    peaks = []
    for variant in layer_memory.VARIANTS:
        peak, *causes = layer_memory.kilobytes_per_token(options, variant).values()
        assert causes
        peaks.append(peak)
    assert peaks[1] < 0.6 * peaks[0]
    assert peaks[2] < 0.7 * peaks[1]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_plan_accuracy_rehearses_what_torch_gives_out(tmp_path):
    output = tmp_path / "record.json"
    words = ["--models", "llama", "--lengths", "64", "--plans", "mixed", "--dtypes", "float32"]
    command = [
        sys.executable,
        str(BENCHMARKS / "plan_accuracy.py"),
        *words,
        "--output",
        str(output),
    ]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    assert run.returncode == 0, run.stdout
    (found,) = json.loads(output.read_text())["results"]
    assert found["rehearsed"] == found["followed"] > 2**20
    assert found["torch"] == pytest.approx(found["rehearsed"], rel=0.01)
    assert found["mapped"] > found["torch"] - 2**20 and found["resident"] > 0


def test_plan_accuracy_fails_where_bytes_differ(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "path", list(sys.path))
    import plan_accuracy

    found = {"rehearsed": 2**20, "followed": 2**21, "error": "rehearsed and followed differ"}
    monkeypatch.setattr(plan_accuracy, "_in_a_process", lambda *_, **__: found)
    words = ["--models", "llama", "--lengths", "64", "--plans", "all", "--dtypes", "float32"]
    assert plan_accuracy.main(words) == 1
    assert "1.00 MiB" in capsys.readouterr().out


def result(impl: str, **changes: float) -> dict[str, object]:
    right = {"loss_0": math.log(2), "logps_chosen_0": -80.0, "logps_rejected_0": -90.0}
    return {"impl": impl, "ms": 1.0, "steps_ms": [1.0], "grad_norm_0": 2.0, **right, **changes}


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({}, []),
        ({"loss_0": 0.72}, ["trl"]),
        ({"loss_0": math.nan}, ["trl"]),
        ({"logps_chosen_0": -80.1}, ["ours", "trl"]),
        ({"logps_rejected_0": -90.1}, ["ours", "trl"]),
        ({"grad_norm_0": 2.01}, ["ours", "trl"]),
    ],
)
def test_judge_takes_the_speed_from_wrong_results(train_step, changes, refused):
    options = Namespace(length=16, num_prompt_tokens=8, dtype=torch.float32, quantization="none")
    results = [result("ours"), result("trl", **changes)]
    train_step.judge(results, options)
    assert [r["impl"] for r in results if "error" in r] == refused
    assert [r["impl"] for r in results if "ms" not in r] == refused


@pytest.mark.parametrize(
    "arguments",
    [
        ["--pairs", "2"],
        ["--pairs", "0x64"],
        ["--prompt_share", "1.0"],
        ["--steps", "0"],
        ["--impl", "ours,unsloth"],
        ["--trl_micro_batch", "3"],
        ["--memory_limit", "8GB"],
    ],
)
def test_parse_refuses_what_cannot_be_run(train_step, capsys, arguments):
    with pytest.raises(SystemExit) as stopped:
        train_step.parse(["--shape", "tiny", "--device", "cpu", *arguments])
    assert stopped.value.code == 2
    assert arguments[1] in capsys.readouterr().err or "memory_limit" in arguments[0]


def test_random_model_draws_the_same_weights_for_both_wrappers(train_step):
    import _random_models as models

    from lowmem_dpo.linears.lora import LoraLinear

    settings = {"dtype": torch.float32, "device": torch.device("cpu")}
    ours = models.random_model("tiny", LoraLinear, quantization="nf4", **settings)
    weights = {}

    def keep(path, weight, bias):
        weights[path] = weight
        return torch.nn.Identity()

    models.random_model("tiny", keep, quantization="nf4", **settings)
    assert len(weights) == 14
    for path, weight in weights.items():
        dense = ours.get_submodule(path).weight.dequantize(torch.float32)
        assert torch.equal(dense, weight.dequantize(torch.float32))
        assert dense.std().item() == pytest.approx(weight.shape[1] ** -0.5, rel=0.2)


def test_write_record_knows_no_nan(train_step, tmp_path):
    import _common

    results = [{"ms": math.nan, "steps_ms": [1.0, math.inf]}]
    _common.write_record(tmp_path / "x.json", "op", torch.device("cpu"), {}, results)
    record = json.loads((tmp_path / "x.json").read_text(), parse_constant=pytest.fail)
    assert record["results"] == [{"ms": None, "steps_ms": [1.0, None]}]


@pytest.mark.slow
def test_a_run_enters_few_files_and_functions_before_its_first_update():
    command = [sys.executable, str(BENCHMARKS / "functions_entered.py")]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    files, functions = map(
        int, re.findall(r"(\d+) (?:files|functions)", run.stdout.splitlines()[-1])
    )
    assert files <= 63 and functions <= 330  # raised with what a run does, never for how


@pytest.mark.slow
def test_real_model_measures_a_whole_run_on_the_pairs_that_fit(llama_dir, pairs_file, tmp_path):
    output = tmp_path / "record.json"
    words = ["--model", llama_dir, "--data", pairs_file(8), "--pairs", 4, "--steps", 2]
    command = [sys.executable, BENCHMARKS / "real_model.py", *words, "--impl", "ours-nf4"]
    command += ["--length", 128, "--output", output]
    run = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True, check=True)
    (result,) = json.loads(output.read_text())["results"]
    assert result["loss_0"] == pytest.approx(math.log(2), abs=1e-6)
    assert result["cpu_seconds"] > 0 and result["peak_mib"] > 100 and "ours-nf4" in run.stdout


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_layers_on_the_disk_take_the_host_memory_that_is_planned(tmp_path):
    output = tmp_path / "host_memory.json"
    command = [sys.executable, str(BENCHMARKS / "host_memory.py"), "--shape", "200mb"]
    command += ["--steps", "1", "--output", str(output)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
    device, disk = json.loads(output.read_text(encoding="utf-8"))["results"]
    assert device["losses"] == disk["losses"]
    assert abs(device["over"]) < 0.05 and abs(disk["over"]) < 0.05
    planned = device["planned_mib"] - disk["planned_mib"]
    assert planned > 150
    assert device["peak_mib"] - disk["peak_mib"] == pytest.approx(planned, rel=0.1)

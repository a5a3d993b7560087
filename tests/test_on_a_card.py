"""The one command for a card: nothing that went well is lost to what did not."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.kernels.helpers import import_benchmark

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def on_a_card():
    return import_benchmark("on_a_card")


def toy_step(on_a_card, name, code, **changes):
    return on_a_card.Step(name, "", 1, [], ["-c", code], **{"records": False} | changes)


def test_a_step_that_fails_or_hangs_costs_its_own_numbers_only(on_a_card, tmp_path):
    output = tmp_path / "card.json"
    record = "import sys; open(sys.argv[2], 'w').write('{\"results\": [1]}')"
    look = f"import json; print(len(json.load(open({str(output)!r}))['results']), 'before')"
    steps = [
        toy_step(on_a_card, "fails", "print('half'); raise SystemExit(3)"),
        toy_step(on_a_card, "hangs", "import time; print('begun'); time.sleep(600)"),
        toy_step(on_a_card, "absent", "", needs=("no_such_module",), mend="pip install it"),
        toy_step(on_a_card, "works", record, records=True),
        toy_step(on_a_card, "looks", look),
    ]
    begun = time.monotonic()
    words = ["--toy", "--minutes", "0.2", "--output", str(output)]
    assert on_a_card.main(words, steps) == 1
    assert time.monotonic() - begun < 60
    found = {outcome["name"]: outcome for outcome in json.loads(output.read_text())["results"]}
    assert found["fails"]["status"] == "failed: exit code 3" and found["fails"]["output"] == [
        "half"
    ]
    assert found["hangs"]["status"].startswith("out of time")
    assert found["absent"]["status"] == "skipped: no_such_module not installed (pip install it)"
    assert found["works"]["status"] == "done" and found["works"]["record"] == {"results": [1]}
    assert found["looks"]["output"] == ["4 before"]  # written as it goes
    page = output.with_suffix(".txt").read_text()
    assert all(outcome["status"] in page for outcome in found.values())
    assert (tmp_path / "card-logs" / "hangs.log").read_text() == "begun\n"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_step_out_of_time_leaves_no_process_of_its_own(on_a_card, tmp_path):
    child = "import subprocess, sys, time; p = subprocess.Popen(['sleep', '600']); "
    step = toy_step(on_a_card, "parent", f"{child}print(p.pid, flush=True); p.wait()")
    outcome = on_a_card.run_step(step, step.toy, 3.0, tmp_path)
    state = Path(f"/proc/{outcome.output[0]}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_steps_name_files_that_are_there(on_a_card):
    for step in on_a_card.STEPS:
        for words in (step.command, step.toy):
            paths = [word for word in words if word.endswith(".py") or word.startswith("tests/")]
            assert paths and all((ROOT / path).exists() for path in paths)


def test_a_cpu_is_refused_unless_toys_are_asked_for(on_a_card, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        on_a_card.main([])
    assert "--toy runs it on the CPU" in capsys.readouterr().err


def test_row_invariance_counts_rows_that_change():
    benchmark = import_benchmark("row_invariance")
    x, weight = torch.randn(64, 64), torch.randn(128, 64)

    def by_place(x, weight):
        out = x @ weight.T
        out[5] += 1.0
        return out

    def by_neighbours(x, weight):
        return x @ weight.T + x[1].sum()

    assert benchmark.changed_rows(torch.nn.functional.linear, x, weight) == {
        "moved": 0,
        "beside": 0,
    }
    assert benchmark.changed_rows(by_place, x, weight)["moved"] >= 1
    assert benchmark.changed_rows(by_neighbours, x, weight)["beside"] == 32


@pytest.mark.slow
def test_toy_steps_run_on_a_cpu_and_are_on_the_page(tmp_path):
    output = tmp_path / "toy.json"
    names = ["kernel-tests", "row-invariance", "nf4"]
    command = [sys.executable, str(ROOT / "benchmarks" / "on_a_card.py"), "--toy", "--steps"]
    run = subprocess.run([*command, *names, "--output", str(output)], capture_output=True)
    assert run.returncode == 0, run.stdout
    results = json.loads(output.read_text())["results"]
    assert [(r["name"], r["status"]) for r in results] == [(name, "done") for name in names]
    assert results[1]["record"]["results"][0]["moved"] == 0
    assert results[2]["record"]["results"][0]["ms"] > 0
    assert "skipped" in results[0]["output"][-1]  # without a card

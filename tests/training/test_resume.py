import json
import math
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lowmem_dpo.files import NoLocksError
from lowmem_dpo.records.checkpoints import find_damage, list_checkpoints
from lowmem_dpo.records.folder import RunFolder, hold_folder
from lowmem_dpo.settings.configs import TrainConfig
from lowmem_dpo.trainer import Trainer
from tests.training.conftest import environment

EXACT = ("loss", "grad_norm", "learning_rate", "rewards/margins", "logps/chosen", "num_tokens")

pytestmark = pytest.mark.usefixtures("without_plots")


@pytest.fixture
def config(llama_dir, pairs_file, tmp_path) -> TrainConfig:
    return TrainConfig(
        model=str(llama_dir),
        data=str(pairs_file(14)),
        output_dir=str(tmp_path / "whole"),
        batch_size=4,
        num_train_epochs=2.5,
        learning_rate=1e-3,
        lora_r=4,
        save_strategy="steps",
        save_steps=2,
        keep_checkpoints=9,
    )


def rows(directory: str | Path) -> list[tuple]:
    lines = (Path(directory) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [row for row in map(json.loads, lines) if "loss" in row]
    return [tuple(row[name] for name in ("step", *EXACT)) for row in steps]


def adapter(directory: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(directory) / "adapter" / "adapter_model.safetensors")


def assert_same_run(a: str | Path, b: str | Path) -> None:
    assert rows(a) == rows(b)
    first, second = adapter(a), adapter(b)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_goes_on_under_another_plan_to_the_same_numbers(config, tmp_path):
    config = replace(config, lora_dropout=0.2)
    Trainer(config).fit()
    checkpoint = tmp_path / "whole" / "checkpoints" / "step-000006"
    for keeps in ("attention", "all"):
        other = replace(config, output_dir=str(tmp_path / keeps), keep_activations=keeps)
        Trainer(replace(other, resume=str(checkpoint))).fit()
        assert rows(other.output_dir) == [row for row in rows(config.output_dir) if row[0] > 6]
        ours, theirs = adapter(other.output_dir), adapter(config.output_dir)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optim": "adamw_8bit"},
        {"lora_dropout": 0.2},
        {"optim": "sgd", "learning_rate": 0.1},
        {"logging_steps": 5},
    ],
    ids=["adamw", "adamw_8bit", "dropout", "sgd", "logging"],
)
def test_resume_equals_the_uninterrupted_run_exactly(config, tmp_path, changes):
    config = replace(config, **changes)
    whole = Trainer(config).fit()
    assert whole.num_steps == 10
    for step in (2, 6):  # within an epoch and across one
        other = replace(config, output_dir=str(tmp_path / f"from-{step}"))
        checkpoint = tmp_path / "whole" / "checkpoints" / f"step-{step:06d}"
        result = Trainer(replace(other, resume=str(checkpoint))).fit()
        assert result.final_loss == whole.final_loss
        later = [row for row in rows(config.output_dir) if row[0] > step]
        assert rows(other.output_dir) == later and later
        for name, value in adapter(other.output_dir).items():
            assert torch.equal(value, adapter(config.output_dir)[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("keeps", ["nothing", "attention", "all"])
def test_resume_auto_after_kill_9_continues_to_the_same_losses(config, tmp_path, keeps):
    """Under every plan that a CPU can run, with the bits of a run that keeps nothing."""
    usual = replace(config, lora_dropout=0.2, output_dir=str(tmp_path / "usual"))
    config = replace(config, lora_dropout=0.2, keep_activations=keeps)
    for each in (replace(usual, keep_activations="nothing"), config):
        Trainer(each).fit()
    assert_same_run(config.output_dir, usual.output_dir)
    first = dict(zip(("step", *EXACT), rows(config.output_dir)[0], strict=True))
    assert first["rewards/margins"] == 0.0 and first["loss"] == pytest.approx(math.log(2), abs=1e-7)
    killed = tmp_path / "killed"
    words = [
        sys.executable,
        "-c",
        SLOW_RUN,
        "train",
        "--config",
        str(tmp_path / "whole" / "config.yaml"),
    ]
    process = subprocess.Popen(
        [*words, "--output_dir", str(killed)], env=environment(), stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while len(list(killed.glob("checkpoints/step-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 4 <= len(rows(killed)) < 10
    with pytest.raises(ValueError, match="holds a run already"):
        Trainer(replace(config, output_dir=str(killed))).fit()
    Trainer(replace(config, output_dir=str(killed), resume="auto")).fit()
    assert_same_run(killed, config.output_dir)


SLOW_RUN = """
import sys, time
from lowmem_dpo.records import folder
from lowmem_dpo.cli import main
log = folder.RunFolder.log
def slow_log(self, metrics):
    log(self, metrics)
    time.sleep(0.3)
folder.RunFolder.log = slow_log
sys.exit(main(sys.argv[1:]))
"""


def test_resume_auto_without_a_checkpoint_starts_afresh(config, tmp_path, capsys):
    Trainer(config).fit()
    fresh = replace(config, output_dir=str(tmp_path / "fresh"), resume="auto")
    Trainer(fresh).fit()
    assert "starting afresh" in capsys.readouterr().out
    assert_same_run(fresh.output_dir, config.output_dir)


def test_run_killed_between_its_first_best_and_its_first_checkpoint_starts_afresh(
    config, tmp_path, capsys, monkeypatch
):
    config = replace(config, eval_fraction=0.3, eval_steps=1, save_steps=3)
    Trainer(config).fit()
    killed = replace(config, output_dir=str(tmp_path / "killed"), resume="auto")
    output, weights = tmp_path / "killed", "adapter_model.safetensors"
    save_best, best = RunFolder.save_best, []

    def kill(folder, save_adapter):
        save_best(folder, save_adapter)
        best.append((folder.best / weights).read_bytes())
        raise SystemExit

    for rate in (1e-3, 1e-2):  # the second time, of another run than the first
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr(RunFolder, "save_best", kill)
            Trainer(replace(killed, learning_rate=rate)).fit()
    assert [path.name for path in output.glob("best*")] != ["best"]
    Trainer(killed).fit()
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "best.killed-2 now" in line]
    assert "no checkpoint in" in line and "starting afresh" in line
    assert_same_run(output, config.output_dir)
    for whole, kept in zip(best, ("best.killed-1", "best.killed-2"), strict=True):
        assert (output / kept / weights).read_bytes() == whole
    assert (output / "best" / weights).read_bytes() == (
        Path(config.output_dir) / "best" / weights
    ).read_bytes()


@pytest.mark.parametrize("left", ["adapter", "run.json"])
def test_refused_fresh_start_moves_nothing(config, left):
    output = Path(config.output_dir)
    (output / "best").mkdir(parents=True)
    if left == "adapter":
        (output / left).mkdir()
    else:
        (output / left).write_text('{"finished": true}', encoding="utf-8")
    before = set(output.iterdir())
    with pytest.raises(ValueError, match="and best/ but no checkpoint to go on from"):
        Trainer(replace(config, resume="auto")).fit()
    assert set(output.iterdir()) == before


def test_killed_runs_best_stays_where_the_next_start_is_refused(config):
    best = Path(config.output_dir) / "best"
    best.mkdir(parents=True)
    with pytest.raises(ValueError, match="no such file"):
        Trainer(replace(config, resume="auto", data="nowhere.jsonl")).fit()
    assert best.exists()


def test_resume_auto_without_a_checkpoint_overwrites_nothing(config, tmp_path):
    config = replace(config, save_strategy="no", save_steps=None, keep_checkpoints=2, resume="auto")
    output = Path(config.output_dir)
    Trainer(config).fit()
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    for gone, left in (
        (None, r"adapter/ and the record of a finished run and best/"),
        ("adapter", r"the record of a finished run and best/"),
        ("best", "holds the record of a finished run but no checkpoint .* another --output_dir"),
    ):
        if gone:
            (output / gone).rename(tmp_path / gone)
        with pytest.raises(ValueError, match=left):
            Trainer(config).fit()
    after = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    assert after == {p: data for p, data in before.items() if p.parent == output}
    (output / "run.json").write_text(json.dumps({"finished": False}))
    assert Trainer(replace(config, max_steps=1)).fit().num_steps == 1


def test_save_strategy_steps_keeps_the_last_step_too(config):
    Trainer(replace(config, save_steps=4)).fit()
    names = [path.name for path in list_checkpoints(Path(config.output_dir) / "checkpoints")]
    assert names == ["step-000004", "step-000008", "step-000010"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"beta": 0.2}, "beta 0.1 -> 0.2"),
        ({"learning_rate": 1e-4}, "learning_rate 0.001 -> 0.0001"),
        ({"max_length": 20}, "max_length 1024 -> 20"),
        ({"optim": "sgd"}, "optim adamw -> sgd"),
    ],
)
def test_resume_refuses_a_changed_setting_and_names_it(config, change, named):
    Trainer(config).fit()
    before = rows(config.output_dir)
    with pytest.raises(ValueError, match="cannot resume") as error:
        Trainer(replace(config, resume="auto", **change)).fit()
    assert named in str(error.value)
    assert rows(config.output_dir) == before


def test_resume_refuses_changed_data(config, pairs_file):
    Trainer(config).fit()
    other = str(pairs_file(14, seed=5, name="other.jsonl"))
    with pytest.raises(ValueError, match="the pairs changed"):
        Trainer(replace(config, resume="auto", data=other)).fit()


@pytest.mark.slow
def test_sigterm_saves_after_the_step_and_exits_130(config, tmp_path):
    words = [
        sys.executable,
        "-c",
        SLOW_RUN,
        "train",
        "--model",
        str(config.model),
        "--data",
        str(config.data),
    ]
    output = tmp_path / "stopped"
    process = subprocess.Popen(
        [*words, "--output_dir", str(output), "--batch_size", "1"],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not (output / "metrics.jsonl").exists() or not rows(output):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    (checkpoint,) = (output / "checkpoints").glob("step-*")
    assert int(checkpoint.name[5:]) == len(rows(output)) < 14
    assert "--resume auto" in printed


def test_keep_checkpoints_keeps_the_newest(config, tmp_path):
    Trainer(replace(config, keep_checkpoints=2)).fit()
    names = sorted(path.name for path in (tmp_path / "whole" / "checkpoints").iterdir())
    assert names == ["step-000008", "step-000010"]


def test_resume_deletes_what_a_killed_run_had_no_time_to(config, tmp_path):
    Trainer(config).fit()
    Trainer(replace(config, resume="auto", keep_checkpoints=1)).fit()  # no step is left to take
    (last,) = (tmp_path / "whole" / "checkpoints").iterdir()
    assert last.name == "step-000010"


def test_resume_of_a_finished_run_into_another_folder_is_whole(config, tmp_path):
    whole = Trainer(replace(config, eval_fraction=0.3, save_steps=1)).fit()
    last = max((tmp_path / "whole" / "checkpoints").iterdir())
    other = replace(config, eval_fraction=0.3, save_steps=1, output_dir=str(tmp_path / "other"))
    result = Trainer(replace(other, resume=str(last))).fit()
    assert result.num_steps == whole.num_steps and result.final_loss == whole.final_loss
    assert result.metrics == whole.metrics and "eval_loss" in result.metrics
    assert (tmp_path / "other" / "best" / "adapter_model.safetensors").exists()


def test_resume_from_an_older_checkpoint_forgets_the_newer_ones(config, tmp_path, capsys):
    Trainer(replace(config, keep_checkpoints=3)).fit()
    checkpoints = tmp_path / "whole" / "checkpoints"
    assert sorted(p.name for p in checkpoints.iterdir())[0] == "step-000006"
    before = rows(config.output_dir)
    again = replace(config, keep_checkpoints=3, resume=str(checkpoints / "step-000006"))
    Trainer(again).fit()
    printed = capsys.readouterr().out
    assert "going back to step 6" in printed and "step-000010.ahead-of-000006" in printed
    assert rows(config.output_dir) == before
    names = sorted(p.name for p in checkpoints.iterdir())
    assert names == ["step-000006", "step-000008", "step-000010"]
    record = json.loads((tmp_path / "whole" / "run.json").read_text())
    assert record["step_zero"]["exact"]
    spans = [(session["from_step"], session["to_step"]) for session in record["sessions"]]
    assert spans == [(0, 10), (6, 10)]


def test_later_checkpoints_and_best_outlive_a_resume_that_fails_at_once(
    config, tmp_path, monkeypatch
):
    config = replace(config, eval_fraction=0.3, eval_steps=2, keep_checkpoints=3)
    Trainer(config).fit()
    whole = tmp_path / "whole"
    before = rows(whole)
    # The last evaluation is the best one of such a run; a checkpoint's state says which it knew.
    evaluated = [json.loads(line) for line in (whole / "metrics.jsonl").open()]
    losses = [row["eval_loss"] for row in evaluated if "eval_loss" in row]
    assert min(losses) == losses[-1]
    best = (whole / "best" / "adapter_model.safetensors").read_bytes()
    back = replace(config, resume=str(whole / "checkpoints" / "step-000006"))

    def fail(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("lowmem_dpo.training.fit.train_steps", fail)
        with pytest.raises(KeyboardInterrupt):
            Trainer(back).fit()
    names = sorted(path.name for path in (whole / "checkpoints").iterdir())
    assert names == ["step-000004", "step-000006", "step-000008.ahead-of-000006"]
    assert find_damage(whole / "checkpoints" / names[-1]) is None
    assert not (whole / "best").exists()  # it was not of this future
    set_aside = whole / "best.ahead-of-000006" / "adapter_model.safetensors"
    assert set_aside.read_bytes() == best
    Trainer(replace(config, resume="auto")).fit()
    assert rows(whole) == before
    assert (whole / "best" / "adapter_model.safetensors").read_bytes() == best
    assert not list(whole.rglob("*.ahead-of-*"))


@pytest.mark.parametrize("content", ['{"sessions": [', "[]", '{"sessions": 3}', "\udcff"])
def test_a_damaged_record_is_begun_anew(config, tmp_path, content):
    Trainer(config).fit()
    record = tmp_path / "whole" / "run.json"
    record.write_bytes(content.encode(errors="surrogateescape"))
    Trainer(replace(config, resume="auto")).fit()
    assert [s["from_step"] for s in json.loads(record.read_text())["sessions"]] == [10]


def test_a_run_on_a_file_system_without_locks_says_so_and_goes_on(config, monkeypatch, capsys):
    def no_locks(path):
        raise NoLocksError(37, "its file system gives no locks (No locks available)", str(path))

    monkeypatch.setattr("lowmem_dpo.records.folder.lock_file", no_locks)
    Trainer(replace(config, max_steps=1, save_steps=1)).fit()
    assert "let no other run write to it" in capsys.readouterr().out


def test_resume_keeps_the_micro_batch_size_whatever_the_cache_holds_now(config, tmp_path):
    config = replace(config, pack_tokens=None)
    whole = Trainer(config).fit()
    Trainer(replace(config, pack_tokens=448)).precompute()
    Trainer(replace(config, pack_tokens=448, seed=1)).precompute()
    middle = tmp_path / "whole" / "checkpoints" / "step-000004"
    other = replace(config, output_dir=str(tmp_path / "other"), resume=str(middle))
    assert Trainer(other).fit().final_loss == whole.final_loss


@pytest.mark.parametrize(
    "name", ["trainer_state.safetensors", "trainer_state.json", "adapter_model.safetensors"]
)
def test_a_damaged_checkpoint_is_refused_by_name_and_passed_over_by_auto(
    config, tmp_path, name, capsys
):
    Trainer(config).fit()
    before = rows(config.output_dir)
    folder = tmp_path / "whole" / "checkpoints" / "step-000010"
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} is damaged.*resume from .*step-000008"):
        Trainer(replace(config, resume=str(folder))).fit()
    Trainer(replace(config, resume="auto")).fit()
    printed = capsys.readouterr().out
    assert "step-000010 is passed over" in printed and "resumed from" in printed
    assert rows(config.output_dir) == before and find_damage(folder) is None


def test_resume_auto_refuses_to_start_afresh_over_damaged_checkpoints(config, tmp_path):
    Trainer(replace(config, save_steps=5)).fit()
    for folder in (tmp_path / "whole" / "checkpoints").iterdir():
        (folder / "SHA256SUMS").unlink()
    with pytest.raises(ValueError, match=r"every checkpoint in .* is damaged"):
        Trainer(replace(config, save_steps=5, resume="auto")).fit()


def test_a_line_cut_short_by_a_full_disk_is_forgotten_on_resume(config, tmp_path):
    Trainer(config).fit()
    before = rows(config.output_dir)
    path = tmp_path / "whole" / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"schema_version": 1, "step": 10, "lo')
    Trainer(replace(config, resume="auto")).fit()
    assert rows(config.output_dir) == before


def test_a_folder_with_somebodys_adapter_is_not_written_to(config, tmp_path):
    first = Trainer(config).fit()
    start = tmp_path / "sft" / "adapter"
    start.parent.mkdir()
    (first.output_dir / "adapter").rename(start)
    clash = replace(config, init_adapter=str(start), output_dir=str(start.parent))
    with pytest.raises(ValueError, match="holds a run already"):
        Trainer(clash).fit()
    assert (start / "adapter_model.safetensors").exists()


def test_another_runs_checkpoint_is_not_mixed_into_a_run(config, tmp_path):
    Trainer(config).fit()
    other = replace(config, output_dir=str(tmp_path / "other"))
    Trainer(other).fit()
    foreign = str(tmp_path / "whole" / "checkpoints" / "step-000002")
    with pytest.raises(ValueError, match="is not its checkpoint"):
        Trainer(replace(other, resume=foreign)).fit()


def test_two_runs_at_once_in_one_folder_are_refused(config):
    with hold_folder(config), pytest.raises(ValueError, match="another run is writing"):
        Trainer(config).fit()
    Trainer(config).fit()

import errno
import json
import math
import os
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lowmem_dpo.cli import main
from lowmem_dpo.records.checkpoints import list_checkpoints, load_checkpoint
from lowmem_dpo.records.folder import RunFolder
from lowmem_dpo.settings.configs import TrainConfig
from lowmem_dpo.steps import gradients
from lowmem_dpo.steps.update import HostAdamW
from lowmem_dpo.stopping import RunStopped
from lowmem_dpo.trainer import Trainer
from lowmem_dpo.training import fit, loop, recorder
from tests.training.conftest import read_metrics, read_record

pytestmark = pytest.mark.usefixtures("without_plots")


@pytest.fixture
def config(llama_dir, pairs_file, tmp_path) -> TrainConfig:
    return TrainConfig(
        model=str(llama_dir),
        data=str(pairs_file(12)),
        output_dir=str(tmp_path / "out"),
        batch_size=2,
        lora_r=4,
        learning_rate=1e-2,
        save_strategy="steps",
        save_steps=1,
        keep_checkpoints=99,
        shuffle=False,
    )


def poison(monkeypatch, *rows: int) -> None:
    """Let the policy's log-probs of some pairs be NaN in training."""
    pair_logps = gradients.pair_logps

    def poisoned(logps, pack, *arguments):
        pairs = pair_logps(logps, pack, *arguments)
        factor = torch.tensor([math.nan if tree.row in rows else 1.0 for tree in pack.trees])
        return replace(pairs, policy_chosen=pairs.policy_chosen * factor)

    for module in (gradients, loop):
        monkeypatch.setattr(module, "pair_logps", poisoned)


def weights(output: Path, step: int) -> bytes:
    folder = output / "checkpoints" / f"step-{step:06d}"
    return (folder / "adapter_model.safetensors").read_bytes()


def moments(output: Path, step: int) -> list[torch.Tensor]:
    parameter = [torch.nn.Parameter(torch.zeros(1)) for _ in range(28)]
    state = types.SimpleNamespace(
        optimizer=torch.optim.AdamW(parameter),
        lr_scheduler=types.SimpleNamespace(load_state_dict=lambda state: None),
        scaler=types.SimpleNamespace(load_state_dict=lambda state: None),
        device=torch.device("cpu"),
    )
    load_checkpoint(output / "checkpoints" / f"step-{step:06d}", state)  # type: ignore[arg-type]
    values = state.optimizer.state.values()
    return [item[name] for item in values for name in ("step", "exp_avg", "exp_avg_sq")]


@pytest.mark.parametrize("row", [5, 6])  # one is first in its step; NaN is sorted last
def test_a_loss_that_couples_pairs_names_the_right_one(config, monkeypatch, capsys, row):
    poison(monkeypatch, row)
    Trainer(replace(config, loss_type="aot_unpaired", max_steps=3)).fit()
    assert f"step 3 is skipped: the loss of data row {row} is not" in capsys.readouterr().out


def test_a_non_finite_loss_names_its_pair_and_skips_the_step_once(config, monkeypatch, capsys):
    poison(monkeypatch, 6)  # in the third step
    result = Trainer(config).fit()
    printed = capsys.readouterr().out
    assert "step 3 is skipped: the loss of data row 6 is not finite" in printed
    assert printed.count("is skipped") == 1
    output = result.output_dir
    assert weights(output, 2) == weights(output, 3) != weights(output, 4)
    before, after = moments(output, 2), moments(output, 3)
    assert len(before) == 28 * 3
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    lines = read_metrics(output)
    assert [line.get("skipped_steps") for line in lines] == [None, None, 1, None, None, None]
    assert "loss" not in lines[2] and "grad_norm" not in lines[2]
    assert "NaN" not in (output / "metrics.jsonl").read_text()


def test_an_optimizer_on_the_host_trains_the_same_adapter_on_a_cpu(config, monkeypatch, tmp_path):
    config, plan_memory = replace(config, max_steps=3), fit.plan_memory
    usual = Trainer(replace(config, output_dir=str(tmp_path / "usual"))).fit().output_dir

    def on_host(*arguments, **options):
        memory = plan_memory(*arguments, **options)
        return replace(memory, levers=replace(memory.levers, optimizer_on_host=True))

    update, updates = HostAdamW._update, []
    monkeypatch.setattr(HostAdamW, "_update", lambda *each: updates.append(update(*each)))
    monkeypatch.setattr(fit, "plan_memory", on_host)
    result = Trainer(config).fit()
    assert weights(result.output_dir, 3) == weights(usual, 3) and len(updates) == 3
    assert read_record(result.output_dir)["plan"]["levers"]["optimizer_on_host"]
    half = {"output_dir": str(tmp_path / "half"), "resume": str(usual / "checkpoints/step-000001")}
    assert weights(Trainer(replace(config, **half)).fit().output_dir, 3) == weights(usual, 3)


def test_the_learning_rate_of_later_steps_is_as_planned(config, monkeypatch, tmp_path):
    def rates(name):
        output = Trainer(replace(config, output_dir=str(tmp_path / name))).fit().output_dir
        return [line["learning_rate"] for line in read_metrics(output)]

    usual = rates("usual")
    poison(monkeypatch, 6)
    assert rates("poisoned") == usual


def test_metrics_of_skipped_steps_are_left_out_of_means(config, monkeypatch, tmp_path):
    usual = Trainer(replace(config, output_dir=str(tmp_path / "usual"))).fit().output_dir
    poison(monkeypatch, 3, 5)  # the second step and the third
    config = replace(config, logging_steps=3)
    first, _ = read_metrics(Trainer(config).fit().output_dir)
    assert first["skipped_steps"] == 2 and first["loss"] == read_metrics(usual)[0]["loss"]


def test_a_callback_sees_what_a_skipped_step_measured(config, monkeypatch):
    poison(monkeypatch, 6)
    trainer, losses = Trainer(config), []
    trainer.add_step_callback(lambda result: losses.append(result.metrics["loss"]))
    result = trainer.fit()
    assert [math.isnan(loss) for loss in losses] == [False, False, True, False, False, False]
    assert result.final_loss == losses[-1]


def test_a_non_finite_gradient_names_the_step_and_leaves_the_adapter(config, monkeypatch, capsys):
    clip = torch.nn.utils.clip_grad_norm_
    calls = []

    def poisoned(parameters, limit, **options):
        parameters = list(parameters)
        calls.append(1)
        if len(calls) == 2:
            parameters[0].grad[0] = math.inf
        return clip(parameters, limit, **options)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", poisoned)
    output = Trainer(config).fit().output_dir
    said = "step 2 is skipped: gradient norm inf, of data rows 3, 4"
    assert said in capsys.readouterr().out
    assert weights(output, 1) == weights(output, 2) != weights(output, 3)


def test_an_adapter_that_is_not_finite_is_never_saved(config, monkeypatch):
    update = loop._update

    def then_poisoned(state, parameters, *arguments):
        result = update(state, parameters, *arguments)
        if state.step == 1:  # of the second step
            next(iter(parameters.values())).data[0, 0] = math.nan
        return result

    monkeypatch.setattr(loop, "_update", then_poisoned)
    with pytest.raises(RunStopped, match="after step 2 the adapter holds NaN"):
        Trainer(config).fit()
    output = Path(config.output_dir)
    assert [path.name for path in list_checkpoints(output / "checkpoints")] == ["step-000001"]
    assert not (output / "adapter").exists() and not (output / "best").exists()


def test_a_first_step_that_is_skipped_warns_of_nothing_else(config, monkeypatch, recwarn):
    poison(monkeypatch, 1)
    # Without a reference: with one, a first step that is not finite stops the run.
    Trainer(replace(config, loss_type="simpo", beta=2.0, max_steps=3)).fit()
    assert not [w for w in recwarn if "lr_scheduler" in str(w.message)]


def test_three_skipped_steps_in_a_row_stop_the_run_even_across_a_resume(
    config, monkeypatch, tmp_path
):
    poison(monkeypatch, 3, 5, 9)  # two in a row, then another
    Trainer(config).fit()
    poison(monkeypatch, 3, 5, 8)
    config = replace(config, output_dir=str(tmp_path / "stopped"))
    with pytest.raises(RunStopped, match=r"step 4: the loss of data row 8.*3 steps in a row"):
        Trainer(config).fit()
    checkpoints = list_checkpoints(tmp_path / "stopped" / "checkpoints")
    assert [path.name for path in checkpoints][-1] == "step-000003"
    with pytest.raises(RunStopped, match=r"step 4: .*3 steps in a row"):
        Trainer(replace(config, resume="auto")).fit()


def test_a_non_finite_evaluation_stops_and_names_its_rows(config, monkeypatch):
    config = replace(config, eval_fraction=0.3, eval_steps=1)
    poison(monkeypatch, *range(1, 13))
    monkeypatch.setattr(fit, "train_steps", lambda *arguments: iter([loop.StepResult(1, LINE)]))
    with pytest.raises(RunStopped, match=r"evaluation: the loss of data rows .* is not finite"):
        Trainer(config).fit()


LINE = dict.fromkeys(("rewards/chosen", "rewards/rejected", "rewards/accuracies"), 0.0)
LINE |= {"loss": 0.7, "num_pairs": 2, "rewards/margins": 0.0, "pairs_per_second": 1.0, "step": 1}


def evaluations(monkeypatch, *losses: float) -> None:
    left = iter(losses)
    names = ("eval_rewards/margins", "eval_rewards/accuracies")

    def evaluate(run, trees):
        return {"eval_loss": next(left), **dict.fromkeys(names, 0.5)}

    monkeypatch.setattr(recorder, "evaluate", evaluate)


def early(config: TrainConfig, **settings) -> TrainConfig:
    return replace(config, eval_fraction=0.1, eval_steps=1, max_steps=6, **settings)


def test_early_stopping_stops_after_patience_and_keeps_the_best(config, monkeypatch):
    config = early(config, early_stopping_patience=2, logging_steps=5)
    evaluations(monkeypatch, 0.6, 0.5, 0.55, 0.51)
    result = Trainer(config).fit()
    assert result.num_steps == 4
    record = read_record(result.output_dir)
    assert record["finished"] and record["stopped_early"]
    best = (result.output_dir / "best" / "adapter_model.safetensors").read_bytes()
    assert best == weights(result.output_dir, 2) != weights(result.output_dir, 4)
    assert [line["step"] for line in read_metrics(result.output_dir) if "loss" in line] == [4]


def test_early_stopping_wants_more_than_its_threshold(config, monkeypatch, capsys):
    config = early(config, early_stopping_patience=2, early_stopping_threshold=0.1)
    evaluations(monkeypatch, 0.6, 0.55, 0.45, 0.4, 0.38)
    assert Trainer(config).fit().num_steps == 5
    said = "2 evaluations did not lower eval_loss 0.4500 by more than early_stopping_threshold 0.1"
    assert said in " ".join(capsys.readouterr().out.split())


def test_early_stopping_counts_small_steps_down_together(config, monkeypatch):
    config = early(config, early_stopping_patience=2, early_stopping_threshold=0.1)
    evaluations(monkeypatch, 0.6, 0.54, 0.48, 0.42, 0.36, 0.3)
    result = Trainer(config).fit()
    assert result.num_steps == 6
    best = (result.output_dir / "best" / "adapter_model.safetensors").read_bytes()
    assert best == weights(result.output_dir, 6)


def test_early_stopping_is_remembered_across_a_resume(config, monkeypatch, tmp_path):
    config = early(config, early_stopping_patience=2)
    evaluations(monkeypatch, 0.5, 0.6, 0.6)
    output = Trainer(config).fit().output_dir
    checkpoint = str(output / "checkpoints" / "step-000002")
    evaluations(monkeypatch, 0.6)
    again = Trainer(replace(config, resume=checkpoint)).fit()
    assert again.num_steps == 3
    assert Trainer(replace(config, resume="auto")).fit().num_steps == 3  # no further step
    evaluations(monkeypatch, 0.6, 0.4, 0.3)
    longer = replace(config, resume="auto", early_stopping_patience=3)
    assert Trainer(longer).fit().num_steps == 4


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"early_stopping_patience": 2}, "needs something to evaluate on"),
        ({"early_stopping_patience": 0, "eval_fraction": 0.1}, "must be at least 1"),
        ({"early_stopping_threshold": 0.1, "eval_fraction": 0.1}, "has no effect"),
    ],
)
def test_early_stopping_settings_without_effect_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        TrainConfig(**settings)


def words(config: TrainConfig) -> list[str]:
    text = f"""train --model {config.model} --data {config.data} --output_dir {config.output_dir}
        --batch_size 2 --save_strategy steps --save_steps 1"""
    return text.split()


def test_a_full_disk_is_one_line_and_the_earlier_checkpoint_serves(
    config, monkeypatch, capsys, tmp_path
):
    save_checkpoint = recorder.save_checkpoint

    def filling(directory, state, save_adapter, facts):
        def then_full(folder):
            save_adapter(folder)
            if state.step == 3:
                raise OSError(errno.ENOSPC, "No space left on device", str(folder / "x"))

        save_checkpoint(directory, state, then_full, facts)

    monkeypatch.setattr(recorder, "save_checkpoint", filling)
    assert main(words(config)) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "error" in x]
    assert "No space left on device; free some space and run again with --resume auto" in line
    output = Path(config.output_dir)
    names = sorted(path.name for path in (output / "checkpoints").iterdir())
    assert names == ["step-000001", "step-000002"]
    monkeypatch.setattr(recorder, "save_checkpoint", save_checkpoint)
    assert main([*words(config), "--resume", "auto"]) == 0
    fresh = replace(config, output_dir=str(tmp_path / "fresh"))
    assert main(words(fresh)) == 0
    losses = [[line["loss"] for line in read_metrics(o)] for o in (output, tmp_path / "fresh")]
    assert losses[0] == losses[1]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_metrics_on_a_full_disk_are_one_line_that_names_the_file(config, monkeypatch, capsys):
    start = RunFolder.start

    def full(self, settings, step):
        start(self, settings, step)
        self.metrics.unlink()
        self.metrics.symlink_to("/dev/full")

    monkeypatch.setattr(RunFolder, "start", full)
    assert main(words(config)) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "error" in x]
    assert "metrics.jsonl: No space left on device" in line


def test_plots_that_cannot_be_drawn_do_not_cost_the_run(config, monkeypatch, capsys):
    def full(*paths):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(recorder, "draw_plots", full)
    result = Trainer(replace(config, max_steps=1)).fit()
    assert "plots could not be drawn" in capsys.readouterr().out
    assert read_record(result.output_dir)["finished"]


def test_every_line_of_metrics_names_its_schema(config):
    output = Trainer(replace(config, eval_fraction=0.2, max_steps=2)).fit().output_dir
    assert {line["schema_version"] for line in read_metrics(output)} == {1}
    assert read_record(output)["schema_version"] == 1


class FakeTracker(types.ModuleType):
    """wandb and trackio as the run calls them."""

    def __init__(self) -> None:
        super().__init__("fake")
        self.calls: list[tuple] = []
        self.id = "abc123"
        self.fails_at: int | None = None

    def init(self, **settings):
        self.calls.append(("init", settings))
        return self

    def log(self, metrics, step):
        json.dumps(metrics, allow_nan=False)
        if step == self.fails_at:
            raise ConnectionError("no network")
        self.calls.append(("log", step, sorted(metrics)))

    def finish(self):
        self.calls.append(("finish",))


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_gets_every_line_and_a_resumed_run_goes_on_with_its_curve(
    config, monkeypatch, name
):
    tracker = FakeTracker()
    monkeypatch.setitem(sys.modules, name, tracker)
    config = replace(config, report_to=name, eval_fraction=0.2, max_steps=2)
    output = Trainer(config).fit().output_dir
    (_, settings), *logs, end = tracker.calls
    assert settings["project"] == "lowmem_dpo" and settings["name"] == "out"
    assert settings["config"]["beta"] == 0.1 and end == ("finish",)
    lines = [
        (line.pop("step"), sorted(line.keys() - {"schema_version"}))
        for line in read_metrics(output)
    ]
    assert [(step, names) for _, step, names in logs] == lines
    tracker.calls.clear()
    Trainer(replace(config, resume=str(output / "checkpoints" / "step-000001"))).fit()
    again = tracker.calls[0][1]
    assert again["resume"] == "allow"
    assert (again["id"] if name == "wandb" else again["name"]) == (
        "abc123" if name == "wandb" else "out"
    )


def test_a_tracker_that_fails_is_said_once_and_the_run_goes_on(config, monkeypatch, capsys):
    tracker = FakeTracker()
    tracker.fails_at = 2
    monkeypatch.setitem(sys.modules, "wandb", tracker)
    result = Trainer(replace(config, report_to="wandb")).fit()
    assert result.num_steps == 6 and len(read_metrics(result.output_dir)) == 6
    assert [call[1] for call in tracker.calls if call[0] == "log"] == [1]
    assert capsys.readouterr().out.count("wandb failed and is left out") == 1


def test_a_missing_tracker_is_refused_before_anything_is_read(config, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert main([*words(replace(config, model="no/such")), "--report_to", "wandb"]) == 2
    assert "pip install wandb, or leave report_to out" in capsys.readouterr().err
    assert not os.path.exists(config.output_dir)


def test_paging_is_refused_where_there_is_nothing_to_page_from(config):
    with pytest.raises(ValueError, match="cannot page on cpu; use adamw_8bit"):
        Trainer(replace(config, optim="paged_adamw_8bit", device="cpu")).fit()


@pytest.mark.parametrize("given", ["mlflow", ["tensorboard", "comet"]])
def test_unknown_trackers_are_refused(given):
    with pytest.raises(ValueError, match="report_to must be none or of tensorboard, wandb"):
        TrainConfig(report_to=given)


def test_report_to_takes_a_list_in_words_or_yaml():
    assert TrainConfig().trackers == []
    assert TrainConfig(report_to="none").trackers == []
    both = ["tensorboard", "wandb"]
    assert TrainConfig(report_to="tensorboard, wandb").trackers == both
    assert TrainConfig(report_to=both).trackers == both


def test_tensorboard_receives_curves_that_a_resumed_run_continues(config):
    accumulators = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard"
    )
    config = replace(config, report_to="tensorboard", max_steps=4)
    output = Trainer(config).fit().output_dir
    Trainer(replace(config, resume=str(output / "checkpoints" / "step-000002"))).fit()
    events = accumulators.EventAccumulator(str(output / "tensorboard"), purge_orphaned_data=True)
    events.Reload()
    points = [(event.step, event.value) for event in events.Scalars("loss")]
    lines = read_metrics(output)
    assert [step for step, _ in points] == [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [value for _, value in points] == pytest.approx([line["loss"] for line in lines])


def test_the_reference_is_scored_for_the_pairs_that_steps_take_and_precompute_scores_all(config):
    Trainer(replace(config, max_steps=2)).fit()
    assert read_record(Path(config.output_dir))["reference"]["num_scored"] == 4
    assert fit.precompute(replace(config, output_dir=TrainConfig().output_dir)) == 8

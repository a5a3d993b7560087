import json
from dataclasses import asdict, fields
from pathlib import Path

import pytest

from lowmem_dpo.records.checkpoints import SCHEMA_VERSION, STATE_FILE
from lowmem_dpo.records.folder import (
    RunFolder,
    check_resumable,
    hold_folder,
    settings_to_share,
)
from lowmem_dpo.settings.configs import TrainConfig
from lowmem_dpo.settings.groups import RunSettings

# What a user may change on the way: where things are and come from, what is written and when, and
# what moves no number. What is read from other places has digests.
FREE = {
    *("output_dir", "cache_dir", "model", "data", "eval_data", "init_adapter", "resume"),
    *("dataset_config", "dataset_train_split", "dataset_test_split", "columns", "on_bad_row"),
    *("logging_steps", "eval_steps", "save_strategy", "save_steps", "keep_checkpoints"),
    *("early_stopping_patience", "early_stopping_threshold", "report_to", "reference"),
    *("device", "quantized_copy", "memory_limit", "layer_inputs", "head_weight", "head_kernel"),
    *("kernels", "layer_weights", "embedding_weight", "keep_activations", "optimizer_state"),
    *("host_memory_limit", "memory_check"),
}
SETTINGS = [field.name for field in fields(TrainConfig)]


def test_what_is_free_to_change_is_a_setting():
    assert set(SETTINGS) >= FREE


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_is_resumed_with_another_value_of_what_is_free_to_change_only(tmp_path, name):
    usual = asdict(TrainConfig())
    record = {"schema_version": SCHEMA_VERSION, "step": 2, "facts": settings_to_share(usual)}
    (tmp_path / STATE_FILE).write_text(json.dumps(record))
    check_resumable(tmp_path, settings_to_share(usual))
    changed = settings_to_share(usual | {name: "another"})
    if name in FREE:
        check_resumable(tmp_path, changed)
    else:
        with pytest.raises(ValueError, match=f"cannot resume .*: {name} .* -> another; set it"):
            check_resumable(tmp_path, changed)


def folder_with_evaluations(root: Path, *losses: float) -> RunFolder:
    """A run's folder with a best/ and an evaluation at every second step."""
    folder = RunFolder(root, root / "checkpoints", root / "metrics.jsonl", root / "best", None)
    folder.best.mkdir()
    for i, loss in enumerate(losses):
        folder.log({"step": 2 * i + 2, "eval_loss": loss})
    return folder


@pytest.mark.parametrize(
    ("known", "goes"), [(None, True), (0.61, True), (0.6, False), (0.5, False)], ids=str
)
def test_best_is_set_aside_where_a_later_evaluation_was_better_than_what_is_known(
    tmp_path, known, goes
):
    folder = folder_with_evaluations(tmp_path, 0.5, 0.6, 0.7)
    target = folder.set_aside_best(2, known)
    assert target == (tmp_path / "best.ahead-of-000002" if goes else None)
    assert folder.best.exists() != goes


def test_best_stays_where_no_evaluation_is_later(tmp_path):
    assert folder_with_evaluations(tmp_path, 0.5, 0.6).set_aside_best(4, None) is None


def settings(folder, resume=None) -> RunSettings:
    return RunSettings(output_dir=str(folder), resume=resume)


@pytest.mark.parametrize("resume", ["true", "latest", "OUTPUT"])
def test_hold_folder_says_what_resume_takes_and_leaves_no_folder(tmp_path, resume):
    with (
        pytest.raises(ValueError, match=f"{resume} is no checkpoint; set --resume auto, which"),
        hold_folder(settings(tmp_path / "a" / "b", resume)),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_hold_folder_removes_only_what_it_made_and_what_is_empty(tmp_path):
    (tmp_path / "mine").mkdir()
    with hold_folder(settings(tmp_path / "mine")):
        pass
    with hold_folder(settings(tmp_path / "run")) as folder:
        folder.log({"step": 1})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "run"]
    assert (tmp_path / "run" / "metrics.jsonl").exists()


def test_hold_folder_tells_a_running_run_from_a_finished_one(tmp_path):
    (tmp_path / "config.yaml").touch()
    with hold_folder(settings(tmp_path, "auto")):
        for resume in (None, "auto"):
            with (
                pytest.raises(ValueError, match="another run is writing"),
                hold_folder(settings(tmp_path, resume)),
            ):
                pass
    with pytest.raises(ValueError, match="holds a run already"), hold_folder(settings(tmp_path)):
        pass

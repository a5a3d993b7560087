import pytest

from lowmem_dpo.records.folder import hold_folder
from lowmem_dpo.settings.groups import RunSettings


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

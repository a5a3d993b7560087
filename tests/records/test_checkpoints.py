from pathlib import Path

import pytest
import torch

from lowmem_dpo.records.checkpoints import (
    TrainingState,
    check_undamaged,
    find_damage,
    list_checkpoints,
    load_checkpoint,
    newest_good_checkpoint,
    prune_checkpoints,
    save_checkpoint,
    set_aside_checkpoints,
)


def new_state(**changes) -> TrainingState:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones(3)
    optimizer.step()
    return TrainingState(
        optimizer=optimizer,
        lr_scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        device=torch.device("cpu"),
        **changes,
    )


def save(directory: Path, *steps: int) -> list[Path]:
    def adapter(folder: Path) -> None:
        (folder / "additional").mkdir()
        (folder / "additional" / "template.jinja").write_text("{{ x }}")
        (folder / "adapter_config.json").write_text("{}")

    for step in steps:
        save_checkpoint(directory, new_state(step=step), adapter, {"beta": 0.1})
    return list_checkpoints(directory)


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_every_flipped_byte_of_a_checkpoint_is_found(tmp_path):
    (folder,) = save(tmp_path, 3)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) == 5 and find_damage(folder) is None
    for path in files:
        size = path.stat().st_size
        for place in range(0, size, max(1, size // 40)):
            flip(path, place)
            assert find_damage(folder) is not None, (path, place)
            flip(path, place)
    assert find_damage(folder) is None
    (folder / "additional" / "template.jinja").unlink()
    assert "template.jinja is missing" in str(find_damage(folder))


def test_newest_good_checkpoint_passes_over_damaged_ones(tmp_path, capsys):
    assert newest_good_checkpoint(tmp_path / "none") is None
    first, second, third = save(tmp_path, 1, 2, 3)
    (third / "trainer_state.json").unlink()
    flip(second / "trainer_state.safetensors", 9)
    assert newest_good_checkpoint(tmp_path) == first
    assert capsys.readouterr().out.count("passed over") == 2
    (first / "SHA256SUMS").unlink()
    with pytest.raises(ValueError, match=r"every checkpoint in .* is damaged"):
        newest_good_checkpoint(tmp_path)


def test_prune_checkpoints_never_deletes_the_only_good_one(tmp_path, capsys):
    save(tmp_path, 1, 2)
    prune_checkpoints(tmp_path, 1)
    (second,) = list_checkpoints(tmp_path)
    assert second.name == "step-000002"
    _, third = save(tmp_path, 3)
    flip(third / "trainer_state.safetensors", 9)
    prune_checkpoints(tmp_path, 1)
    assert list_checkpoints(tmp_path) == [second, third]
    assert "all are kept" in capsys.readouterr().out
    assert newest_good_checkpoint(tmp_path) == second


def test_a_checkpoint_whose_deletion_was_interrupted_is_not_listed(tmp_path, monkeypatch):
    save(tmp_path, 1, 2)
    monkeypatch.setattr("shutil.rmtree", lambda *arguments, **settings: None)
    prune_checkpoints(tmp_path, 1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000002"]


def test_a_checkpoint_holds_the_counters_that_stop_a_run(tmp_path):
    counters = {"num_skipped_in_a_row": 2, "num_evaluations_without_improvement": 1}
    save_checkpoint(tmp_path, new_state(step=4, **counters), lambda folder: None, {})
    state = new_state()
    load_checkpoint(tmp_path / "step-000004", state)
    assert {name: getattr(state, name) for name in counters} == counters


def test_save_checkpoint_refuses_numbers_that_json_lacks(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        save_checkpoint(tmp_path, new_state(best_eval_loss=float("nan")), lambda folder: None, {})
    assert list_checkpoints(tmp_path) == [] and list(tmp_path.iterdir()) == []


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_stray_file_does_not_make_a_checkpoint_damaged(tmp_path):
    (folder,) = save(tmp_path, 3)
    (folder / ".DS_Store").write_text("x")
    assert find_damage(folder) is None


def test_a_list_of_digests_that_was_cut_short_is_damaged(tmp_path):
    (folder,) = save(tmp_path, 3)
    lines = (folder / "SHA256SUMS").read_bytes().splitlines(keepends=True)
    assert len(lines) == 4
    for number in range(len(lines)):
        (folder / "SHA256SUMS").write_bytes(b"".join(lines[:number]))
        assert find_damage(folder) == "SHA256SUMS is damaged"


def test_checkpoints_are_ordered_by_number(tmp_path):
    save(tmp_path, 999_999, 1_000_000, 999_998)
    assert [path.name for path in list_checkpoints(tmp_path)][-1] == "step-1000000"
    prune_checkpoints(tmp_path, 2)
    assert names(tmp_path) == ["step-1000000", "step-999999"]
    set_aside_checkpoints(tmp_path, 999_999)
    assert names(tmp_path) == ["step-1000000.ahead-of-999999", "step-999999"]
    set_aside_checkpoints(tmp_path, 2_000_000)
    assert "step-999999" in names(tmp_path)
    flip(tmp_path / "step-999999" / "trainer_state.safetensors", 9)
    with pytest.raises(ValueError, match="start afresh"):
        check_undamaged(tmp_path / "step-999999")  # the newer one is no older one


def test_folders_of_other_names_are_neither_listed_nor_deleted(tmp_path):
    mine = ["step-000001-good", "step-best", "step-000009.bak", "step-"]
    for name in mine:
        (tmp_path / name).mkdir()
    save(tmp_path, 1, 2)
    assert len(list_checkpoints(tmp_path)) == 2
    prune_checkpoints(tmp_path, 1)
    set_aside_checkpoints(tmp_path, 0)
    assert names(tmp_path) == sorted([*mine, "step-000002.ahead-of-000000"])


def test_what_was_set_aside_goes_once_a_newer_checkpoint_is_good(tmp_path):
    save(tmp_path, 2, 4, 6)
    set_aside_checkpoints(tmp_path, 2)
    aside = ["step-000004.ahead-of-000002", "step-000006.ahead-of-000002"]
    prune_checkpoints(tmp_path, 9)
    assert names(tmp_path) == ["step-000002", *aside]
    *_, newest = save(tmp_path, 3)
    flip(newest / "trainer_state.safetensors", 9)
    prune_checkpoints(tmp_path, 9)
    assert set(aside) < set(names(tmp_path))
    flip(newest / "trainer_state.safetensors", 9)
    prune_checkpoints(tmp_path, 9)
    assert names(tmp_path) == ["step-000002", "step-000003"]
    save(tmp_path, 4)
    set_aside_checkpoints(tmp_path, 3)
    save(tmp_path, 4)
    set_aside_checkpoints(tmp_path, 3)  # again from the same one
    assert names(tmp_path)[-1] == "step-000004.ahead-of-000003"

from pathlib import Path

import pytest
import torch

from lowmem_dpo.training.checkpoints import (
    TrainingState,
    find_damage,
    list_checkpoints,
    load_checkpoint,
    newest_good_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)


def new_state(**changes) -> TrainingState:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones(3)
    optimizer.step()
    return TrainingState(
        optimizer=optimizer,
        schedule=torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0),
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

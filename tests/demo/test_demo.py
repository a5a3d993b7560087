import json
import re

import pytest

from lowmem_dpo.cli import main
from lowmem_dpo.demo.demo import _fresh_folder, _start_accuracy
from lowmem_dpo.demo.task import is_right, is_short, questions


@pytest.mark.slow
def test_demo_learns_offline_and_leaves_a_run(tmp_path, capsys):
    root = tmp_path / "demo"
    assert main(["demo", "--output_dir", str(root)]) == 0
    printed = capsys.readouterr().out
    figures = {}
    for name in ("held-out reward accuracy", "short answers", "right answers"):
        row = re.search(rf"{name} +\S+ +(\d\.\d+) +\S+ +(\d\.\d+)", printed)
        figures[name] = tuple(map(float, row.groups()))
    before, after = figures["held-out reward accuracy"]
    assert before == 0.5 and after > 0.9
    before, after = figures["short answers"]
    assert 0.1 < before < 0.5 and after >= 2 * before
    before, after = figures["right answers"]
    assert before > 0.9 and after > 0.7  # manners were learnt, facts were kept
    assert "step zero: every margin is exactly 0" in printed and "it learned" in printed
    record = json.loads((root / "run" / "run.json").read_text())
    assert record["finished"] and record["numerics"]["dtype"] == "float32"
    # Answers are sampled in it too, so the pairs do not depend on what this CPU is fast in.
    assert printed.count("computing in float32") == printed.count("computing in")
    assert (root / "run" / "plots" / "loss.png").exists()


@pytest.mark.parametrize("name", ["thesis.tex", "model", "preferences.jsonl"])
def test_demo_leaves_other_peoples_folders_alone(tmp_path, capsys, name):
    (tmp_path / name).write_text("mine")
    assert main(["demo", "--output_dir", str(tmp_path)]) == 2
    assert "holds no demo" in capsys.readouterr().err
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [(name, "mine")]


def test_demo_refuses_a_file_as_its_folder(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert main(["demo", "--output_dir", str(tmp_path / "file")]) == 2
    error = capsys.readouterr().err
    assert "is a file" in error and error.count("\n") == 1
    assert (tmp_path / "file").read_text() == "mine"


def test_fresh_folder_deletes_only_what_the_demo_made(tmp_path):
    root = _fresh_folder(tmp_path / "demo")
    assert [path.name for path in root.iterdir()] == [".lowmem_dpo_demo"]
    for name in ("model", "run", "cache", "notes"):
        (root / name).mkdir()
        (root / name / "file").write_text("")
    (root / "preferences.jsonl").write_text("")
    (root / "thesis.tex").write_text("")
    assert _fresh_folder(root) == root
    names = {path.relative_to(root).as_posix() for path in root.rglob("*")}
    assert names == {".lowmem_dpo_demo", "notes", "notes/file", "thesis.tex"}


@pytest.mark.parametrize(
    ("chosen", "margin", "accuracy", "expected"),
    [(0.0, 0.0, 0.0, 0.5), (0.1, 0.0, 0.4, 0.4), (0.1, 0.2, 0.7, 0.7)],
)
def test_start_accuracy_counts_a_tie_as_half(chosen, margin, accuracy, expected):
    metrics = {"rewards/chosen": chosen, "rewards/margins": margin, "rewards/accuracies": accuracy}
    assert _start_accuracy(metrics) == expected


@pytest.mark.parametrize(
    ("answer", "short", "right"),
    [
        ("The fox eats mice.", True, True),
        ("The fox eats mice. I read that in a book.", False, True),
        ("The fox eats grass.", True, False),
        ("The fox eats mice", False, False),
        ("", False, False),
    ],
)
def test_rules_of_the_demo(answer, short, right):
    assert is_short(answer) is short
    assert is_right("What does the fox eat?", answer) is right
    assert len(questions()) == 40

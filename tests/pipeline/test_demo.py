import json
import re

import pytest

from lowmem_dpo.cli import main
from lowmem_dpo.pipeline.demo_task import is_right, is_short, questions


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
    assert json.loads((root / "run" / "run.json").read_text())["finished"]
    assert (root / "run" / "plots" / "loss.png").exists()


def test_demo_leaves_other_peoples_folders_alone(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("")
    assert main(["demo", "--output_dir", str(tmp_path)]) == 2
    assert "holds no demo" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").exists()


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

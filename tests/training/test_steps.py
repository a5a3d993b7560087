import pytest

from lowmem_dpo.settings.configs import TrainConfig
from lowmem_dpo.training import steps
from lowmem_dpo.training.steps import Batches, warn_of_short_run

EVALUATED = {"eval_fraction": 0.1}
PATIENT = {**EVALUATED, "eval_steps": 2, "early_stopping_patience": 4}


@pytest.fixture
def no_run_is_short(monkeypatch) -> None:
    monkeypatch.setattr(steps, "FEW_STEPS", 0)


def said(capsys, **settings) -> str:
    config = TrainConfig(batch_size=1, **settings)
    warn_of_short_run(config, config.warmup_steps, Batches.of(config, 10))
    printed = capsys.readouterr()
    return " ".join((printed.out + printed.err).split())


@pytest.mark.usefixtures("no_run_is_short")
@pytest.mark.parametrize(
    ("settings", "change", "line"),
    [
        ({"logging_steps": 11}, {"logging_steps": 10}, "logging_steps 11 is more than the run's"),
        ({"eval_steps": 11, **EVALUATED}, {"eval_steps": 10}, "evaluated at the last step only"),
        (
            {"save_strategy": "steps", "save_steps": 11},
            {"save_steps": 10},
            "the only checkpoint is that of the last step",
        ),
        ({"warmup_steps": 10}, {"warmup_steps": 9}, "steps, 9 are used; lower it"),
        (PATIENT, {"early_stopping_patience": 3}, "cannot stop a run of 5 evaluations"),
        (PATIENT, {"eval_steps": 1}, "early_stopping_patience 4 cannot"),
    ],
)
def test_warn_of_short_run_names_what_the_run_is_too_short_for(capsys, settings, change, line):
    warning = said(capsys, **settings)
    assert line in warning and warning.count("warning") == 1
    assert said(capsys, **(settings | change)) == ""


@pytest.mark.usefixtures("no_run_is_short")
def test_warn_of_short_run_is_silent_about_the_defaults(capsys):
    assert said(capsys) == ""


def test_warn_of_short_run_counts_the_steps_of_a_run_that_hardly_moves(capsys):
    assert "only 10 steps: 10 pairs in batches of 1; for more, lower batch_size" in said(capsys)
    assert said(capsys, num_train_epochs=2) == ""


@pytest.mark.parametrize(
    ("epochs", "steps"), [(1.1, 110), (1.101, 111), (0.07, 7), (2.0, 200), (0.001, 1)]
)
def test_batches_take_no_step_for_rounding(epochs, steps):
    config = TrainConfig(batch_size=4, num_train_epochs=epochs)
    assert Batches.of(config, 400).num_steps == steps

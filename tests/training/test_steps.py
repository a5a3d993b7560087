import pytest
import torch

from lowmem_dpo.records.checkpoints import (
    TrainingState,
    load_checkpoint,
    page_state,
    save_checkpoint,
)
from lowmem_dpo.settings.configs import TrainConfig
from lowmem_dpo.training import steps
from lowmem_dpo.training.steps import Batches, make_lr_scheduler, make_optimizer, warn_of_short_run

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


def rates(num_steps: int, **settings) -> list[float]:
    """The learning rate of every step, over the peak."""
    config = TrainConfig(learning_rate=1e-3, **settings)
    optimizer = make_optimizer(config, [torch.nn.Parameter(torch.zeros(1))])
    schedule = make_lr_scheduler(config, optimizer, num_steps)
    seen = []
    for _ in range(num_steps):
        seen.append(schedule.get_last_lr()[0] / config.learning_rate)
        optimizer.step()
        schedule.step()
    return seen


def test_make_lr_scheduler_warms_up_over_the_steps_or_the_share_asked_for():
    linear = {"lr_scheduler_type": "constant_with_warmup"}
    assert rates(10, warmup_steps=4, **linear) == pytest.approx([0, 0.25, 0.5, 0.75] + [1] * 6)
    assert rates(10, warmup_ratio=0.2, **linear) == pytest.approx([0, 0.5] + [1] * 8)
    assert rates(10, warmup_steps=0, **linear) == [1] * 10


def test_make_lr_scheduler_leaves_a_last_step_that_trains():
    assert rates(3, warmup_steps=50, lr_scheduler_type="constant_with_warmup")[-1] == 1


def test_warmup_settings_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match=r"warmup_ratio=0\.2 has no effect with warmup_steps=5"):
        TrainConfig(warmup_steps=5, warmup_ratio=0.2)
    with pytest.raises(ValueError, match="warmup_steps=5 has no effect with lr_scheduler_type"):
        TrainConfig(warmup_steps=5, lr_scheduler_type="constant")


def test_page_state_puts_loaded_moments_into_new_paged_buffers(monkeypatch):
    config = TrainConfig(optim="paged_adamw_8bit")
    parameter = torch.nn.Parameter(torch.zeros(128, 64))
    optimizer = make_optimizer(config, [parameter])
    assert optimizer.is_paged
    loaded = {f"state{n}": torch.full((128, 64), n, dtype=torch.uint8) for n in (1, 2)}
    optimizer.state[parameter] = dict(loaded)
    buffers = []

    def paged(parameter, dtype):
        buffers.append(torch.zeros_like(parameter, dtype=dtype, requires_grad=False))
        return buffers[-1]

    monkeypatch.setattr(optimizer, "get_state_buffer", paged)
    page_state(optimizer)
    for name, buffer in zip(loaded, buffers, strict=True):
        assert optimizer.state[parameter][name] is buffer
        assert torch.equal(buffer, loaded[name])


def test_page_state_leaves_other_optimizers_alone():
    optimizer = make_optimizer(TrainConfig(optim="adamw_8bit"), [torch.nn.Parameter(torch.ones(1))])
    page_state(optimizer)
    assert not optimizer.is_paged


@pytest.mark.gpu
def test_paged_moments_go_on_as_before_and_are_paged_again_after_a_checkpoint(tmp_path):
    def start(values: torch.Tensor) -> tuple[torch.nn.Parameter, TrainingState]:
        parameter = torch.nn.Parameter(values.clone())
        optimizer = make_optimizer(TrainConfig(optim="paged_adamw_8bit"), [parameter])
        schedule = make_lr_scheduler(TrainConfig(), optimizer, 10)
        scaler = torch.amp.GradScaler("cuda", enabled=False)
        return parameter, TrainingState(optimizer, schedule, scaler, parameter.device)

    def step(parameter: torch.nn.Parameter, state: TrainingState, seed: int) -> None:
        torch.manual_seed(seed)
        parameter.grad = torch.randn_like(parameter)
        state.optimizer.step()

    first, state = start(torch.ones(512, 512, device="cuda"))
    step(first, state, 1)
    save_checkpoint(tmp_path, state, lambda folder: None, {})
    second, resumed = start(first.detach())
    load_checkpoint(tmp_path / "step-000000", resumed)
    assert resumed.optimizer.state[second]["state1"].is_paged
    step(first, state, 2)
    step(second, resumed, 2)
    assert torch.equal(first, second)

import math

import pytest
import torch

from lowmem_dpo.records.checkpoints import TrainingState
from lowmem_dpo.training.loop import _update

pytestmark = pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")

START_SCALE = 4.0


def update(
    *, grad: float, loss: float, bad_rows: list[int], scaled: bool
) -> tuple[dict[str, float], TrainingState, bool]:
    """One update of one number; returns its metrics, the state and whether the number moved."""
    parameter = torch.nn.Parameter(torch.ones(1))
    parameter.grad = torch.full((1,), grad)
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    state = TrainingState(
        optimizer=optimizer,
        lr_scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0),
        scaler=torch.amp.GradScaler("cpu", init_scale=START_SCALE, enabled=scaled),
        device=torch.device("cpu"),
        num_skipped_in_a_row=1,
    )
    state.scaler.scale(torch.ones(1))  # as of the step's loss
    metrics = _update(state, {"x.lora_b": parameter}, 1.0, loss, bad_rows, [1, 2])
    return metrics, state, parameter.item() != 1.0


@pytest.mark.parametrize("scaled", [False, True])
def test_update_steps_on_finite_numbers_and_forgets_skipped_steps(scaled):
    metrics, state, moved = update(grad=0.5, loss=1.0, bad_rows=[], scaled=scaled)
    assert moved and state.num_skipped_in_a_row == 0
    assert metrics == {"grad_norm": 0.5 / (START_SCALE if scaled else 1.0)}


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("loss", "bad_rows"), [(math.nan, [2]), (math.inf, []), (1.0, [2])])
def test_update_skips_a_loss_that_is_not_finite_whatever_the_gradient(loss, bad_rows, scaled):
    metrics, state, moved = update(grad=0.5, loss=loss, bad_rows=bad_rows, scaled=scaled)
    assert not moved and metrics == {"skipped_steps": 1}
    assert state.num_skipped_in_a_row == 2
    assert state.lr_scheduler.last_epoch == 1  # the learning rate moves on as planned


def test_update_leaves_float16_overflow_to_the_scaler(capsys):
    metrics, state, moved = update(grad=math.inf, loss=1.0, bad_rows=[], scaled=True)
    assert not moved and metrics == {} and state.num_skipped_in_a_row == 0
    assert state.scaler.get_scale() == START_SCALE / 2
    assert capsys.readouterr().out == ""


def test_update_skips_a_gradient_that_is_not_finite_without_a_scaler(capsys):
    metrics, _, moved = update(grad=math.inf, loss=1.0, bad_rows=[], scaled=False)
    assert not moved and metrics == {"skipped_steps": 1}
    assert "gradient norm inf, of data rows 1, 2" in capsys.readouterr().out

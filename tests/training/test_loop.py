import math

import pytest
import torch

from lowmem_dpo.records.checkpoints import TrainingState
from lowmem_dpo.stopping import RunStopped
from lowmem_dpo.training.loop import (
    _update,
    check_adapter_moves,
    check_loss_scale,
    check_skipped,
    check_step_zero,
    check_weights_finite,
    describe_non_finite,
    name_rows,
    peak_memory,
)

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


LN2 = math.log(2)


def test_check_step_zero_does_not_warn_of_exact_agreement(capsys):
    assert check_step_zero(LN2, LN2, 0.0, 1e-4, True)["exact"]
    printed = capsys.readouterr().out
    assert "every margin is exactly 0" in printed and "warning" not in printed


def test_check_step_zero_warns_of_rounding_under_the_same_fingerprint_only(capsys):
    assert not check_step_zero(LN2, LN2, 1e-5, 1e-4, True)["exact"]
    assert "warning: step zero is not exact" in capsys.readouterr().out
    assert not check_step_zero(LN2, LN2, 1e-5, 1e-4, False)["exact"]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("loss", "rms"), [(LN2, 2e-4), (LN2 + 0.03, 0.0), (math.nan, 0.0)])
def test_check_step_zero_stops_beyond_the_tolerances(loss, rms):
    with pytest.raises(RunStopped, match="step zero failed"):
        check_step_zero(loss, LN2, rms, 1e-4, True)


@pytest.mark.parametrize(
    ("loss", "norm", "bad", "said"),
    [
        (math.nan, math.nan, [17, 3], "the loss of data rows 3, 17 is not finite"),
        (1.0, math.inf, [], "gradient norm inf, of data rows 1, 3, 17"),
        (math.inf, 1.0, [], "loss inf, of data rows 1, 3, 17"),
    ],
)
def test_describe_non_finite_names_the_rows_it_can_blame(loss, norm, bad, said):
    assert describe_non_finite(loss, norm, bad, [17, 3, 1]) == said


def test_check_skipped_stops_at_the_third_in_a_row():
    assert "step 5 is skipped: why" in check_skipped(2, "why", 5)
    with pytest.raises(RunStopped, match="step 5: why; 3 steps in a row"):
        check_skipped(3, "why", 5)


def test_name_rows_is_short():
    assert name_rows([4]) == "data row 4"
    assert name_rows(range(99)).endswith("30, 31 and more")


def test_check_adapter_moves_stops_if_every_lora_b_is_zero():
    parameters = {"x.lora_a": torch.ones(2), "x.lora_b": torch.zeros(2)}
    with pytest.raises(RunStopped, match="LoRA-B"):
        check_adapter_moves(parameters, 20)
    parameters["y.lora_b"] = torch.tensor([0.0, 1e-9])
    check_adapter_moves(parameters, 20)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_check_weights_finite_names_the_matrix(bad):
    check_weights_finite({"x.lora_a": torch.ones(2)}, 3)
    with pytest.raises(RunStopped, match=r"x\.lora_b"):
        check_weights_finite({"x.lora_a": torch.ones(2), "x.lora_b": torch.tensor([1, bad])}, 3)


def test_check_loss_scale_stops_below_one():
    check_loss_scale(1.0, 7)
    with pytest.raises(RunStopped, match="float16 gradients overflow"):
        check_loss_scale(0.5, 7)


def test_peak_memory_of_a_card_is_what_tensors_take_and_what_is_held_for_them(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 5)
    found = peak_memory(torch.device("cuda"))
    assert found == {"peak_memory_bytes": 3, "peak_reserved_bytes": 5}
    assert peak_memory(torch.device("cpu")).keys() <= {"peak_memory_bytes"}

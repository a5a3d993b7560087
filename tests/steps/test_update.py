import pytest
import torch

from lowmem_dpo.records.checkpoints import (
    TrainingState,
    load_checkpoint,
    page_state,
    save_checkpoint,
)
from lowmem_dpo.settings.configs import TrainConfig
from lowmem_dpo.steps.update import allocate_moments, new_state


def rates(num_steps: int, **settings) -> list[float]:
    """The learning rate of every step, over the peak."""
    config = TrainConfig(learning_rate=1e-3, **settings)
    state = new_state(config, [torch.nn.Parameter(torch.zeros(1))], num_steps)
    optimizer, schedule = state.optimizer, state.lr_scheduler
    seen = []
    for _ in range(num_steps):
        seen.append(schedule.get_last_lr()[0] / config.learning_rate)
        optimizer.step()
        schedule.step()
    return seen


def test_new_state_warms_up_over_the_steps_or_the_share_asked_for():
    linear = {"lr_scheduler_type": "constant_with_warmup"}
    assert rates(10, warmup_steps=4, **linear) == pytest.approx([0, 0.25, 0.5, 0.75] + [1] * 6)
    assert rates(10, warmup_ratio=0.2, **linear) == pytest.approx([0, 0.5] + [1] * 8)
    assert rates(10, warmup_steps=0, **linear) == [1] * 10


def test_new_state_leaves_a_last_step_that_trains():
    assert rates(3, warmup_steps=50, lr_scheduler_type="constant_with_warmup")[-1] == 1


@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit", "sgd"])
def test_moments_are_there_before_the_first_step_and_change_no_bit(optim):
    config, found = TrainConfig(optim=optim), []
    for allocates in (False, True):
        parameters = [torch.nn.Parameter(torch.ones(size)) for size in ((128, 64), (3,))]
        optimizer = new_state(config, parameters, 10).optimizer
        optimizer.param_groups[0]["lr"] = 0.1
        if allocates:
            allocate_moments(optimizer)
            before = moments(optimizer)
        for step in range(2):
            torch.manual_seed(step)
            for parameter in parameters:
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
        found.append(parameters)
        if allocates:
            after = moments(optimizer)
            assert before.keys() == after.keys() and bool(after) == (optim != "sgd")
            assert all(after[name].data_ptr() == x.data_ptr() for name, x in before.items())
            allocate_moments(optimizer)  # as in a resumed run
            assert all(moments(optimizer)[name] is x for name, x in after.items())
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def moments(optimizer):
    return {
        (id(parameter), name): value
        for parameter, state in optimizer.state.items()
        for name, value in state.items()
        if torch.is_tensor(value) and value.shape == parameter.shape
    }


def test_page_state_puts_loaded_moments_into_new_paged_buffers(monkeypatch):
    config = TrainConfig(optim="paged_adamw_8bit")
    parameter = torch.nn.Parameter(torch.zeros(128, 64))
    optimizer = new_state(config, [parameter], 10).optimizer
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
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = new_state(TrainConfig(optim="adamw_8bit"), [parameter], 10).optimizer
    page_state(optimizer)
    assert not optimizer.is_paged


@pytest.mark.gpu
def test_paged_moments_go_on_as_before_and_are_paged_again_after_a_checkpoint(tmp_path):
    def start(values: torch.Tensor) -> tuple[torch.nn.Parameter, TrainingState]:
        parameter = torch.nn.Parameter(values.clone())
        return parameter, new_state(TrainConfig(optim="paged_adamw_8bit"), [parameter], 10)

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

"""An optimizer in host memory beside torch's own, with the CPU in the place of a card."""

import math

import pytest
import torch

from lowmem_dpo.records.checkpoints import TrainingState, load_checkpoint, save_checkpoint
from lowmem_dpo.settings.configs import TrainConfig
from lowmem_dpo.steps.update import HostAdamW, allocate_moments, clip_gradients, new_state

SIZES = [(64, 33), (7,), (16, 128)]
NUM_STEPS = 8
CONFIG = TrainConfig(
    learning_rate=0.1, weight_decay=0.3, max_grad_norm=0.5, warmup_steps=2, adam_beta2=0.95
)
SKIPPED = 3


def start(on_host: bool) -> tuple[dict[str, torch.nn.Parameter], TrainingState]:
    torch.manual_seed(0)
    parameters = {str(size): torch.nn.Parameter(torch.randn(size)) for size in SIZES}
    state = new_state(CONFIG, list(parameters.values()), NUM_STEPS, on_host=on_host)
    assert isinstance(state.optimizer, HostAdamW) == on_host
    return parameters, state


def take_steps(parameters, state, steps, *, lacks=None) -> None:
    """As the loop takes them: the gradient of `SKIPPED` is not finite; `lacks` never has one."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for name, parameter in parameters.items():
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = None if name == lacks else gradient
        if step == SKIPPED:
            parameters["(7,)"].grad[2] = math.inf
        if math.isfinite(clip_gradients(state, parameters, CONFIG.max_grad_norm)):
            state.scaler.step(state.optimizer)
        state.scaler.update()
        state.lr_scheduler.step()
        state.optimizer.zero_grad(set_to_none=True)
        assert all(parameter.grad is None for parameter in parameters.values())
        state.step += 1


def assert_alike(first, second) -> None:
    (values, state), (others, other) = first, second
    for value, found in zip(values.values(), others.values(), strict=True):
        assert torch.equal(value, found)
        moments, its = state.optimizer.state[value], other.optimizer.state[found]
        assert moments.keys() == its.keys()
        assert all(torch.equal(moments[name], its[name]) for name in moments)


@pytest.mark.parametrize("allocates", [False, True])
def test_steps_have_the_bits_of_torch(allocates):
    usual, ours = start(on_host=False), start(on_host=True)
    before = [value.clone() for value in ours[0].values()]
    if allocates:
        allocate_moments(ours[1].optimizer)
    for run in (usual, ours):
        take_steps(*run, range(NUM_STEPS))
    assert_alike(usual, ours)
    assert not any(torch.equal(a, b) for a, b in zip(before, ours[0].values(), strict=True))
    assert ours[1].optimizer.state[ours[0]["(7,)"]]["step"] == NUM_STEPS - 1


def test_a_parameter_without_a_gradient_stays():
    usual, ours = start(on_host=False), start(on_host=True)
    name = str(SIZES[0])
    before = ours[0][name].clone()
    for run in (usual, ours):
        take_steps(*run, range(2), lacks=name)
    assert_alike(usual, ours)
    assert torch.equal(ours[0][name], before) and not ours[1].optimizer.state[ours[0][name]]


def test_what_changed_a_parameter_meanwhile_counts():
    usual, ours = start(on_host=False), start(on_host=True)
    for run in (usual, ours):
        take_steps(*run, range(2))
        with torch.no_grad():
            for parameter in run[0].values():
                parameter.fill_(0.5)
        take_steps(*run, range(4, 6))
    assert_alike(usual, ours)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("after", [False, True])
def test_a_checkpoint_of_either_place_goes_on_in_either(tmp_path, before, after):
    whole, killed, resumed = start(on_host=False), start(on_host=before), start(on_host=after)
    take_steps(*whole, range(NUM_STEPS))
    take_steps(*killed, range(5))
    save_checkpoint(tmp_path, killed[1], lambda folder: None, {})
    load_checkpoint(tmp_path / "step-000005", resumed[1])
    with torch.no_grad():  # as the adapter is, apart
        for name, parameter in resumed[0].items():
            parameter.copy_(killed[0][name])
    take_steps(*resumed, range(5, NUM_STEPS))
    assert_alike(whole, resumed)


def test_loaded_moments_are_its_own():
    first, second = start(on_host=True), start(on_host=True)
    take_steps(*first, range(2))
    loaded = first[1].optimizer.state_dict()
    second[1].optimizer.load_state_dict(loaded)
    take_steps(*second, range(4, 6))
    again = start(on_host=True)
    take_steps(*again, range(2))
    assert_alike(first, again)


def test_a_loss_scale_is_taken_off_and_an_overflow_skips_the_step():
    """Scaled by a power of two and back, gradients keep their bits."""
    runs = []
    for on_host in (False, True):
        parameters, state = start(on_host)
        state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        for step in range(4):
            generator = torch.Generator().manual_seed(step)
            for parameter in parameters.values():
                gradient = torch.randn(parameter.shape, generator=generator)
                parameter.grad = state.scaler.scale(gradient)
            if step == 2:
                parameters["(7,)"].grad[0] = math.inf
            state.scaler.unscale_(state.optimizer)
            state.scaler.step(state.optimizer)
            state.scaler.update()
        assert state.scaler.get_scale() == 2.0**7
        assert state.optimizer.state[parameters["(7,)"]]["step"] == 3
        runs.append((parameters, state))
    assert_alike(*runs)

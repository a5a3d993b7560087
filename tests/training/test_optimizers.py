import pytest
import torch

from lowmem_dpo.config import TrainConfig
from lowmem_dpo.training.optimizers import make_optimizer, make_schedule


def rates(num_steps: int, **settings) -> list[float]:
    """The learning rate of every step, over the peak."""
    config = TrainConfig(learning_rate=1e-3, **settings)
    optimizer = make_optimizer(config, [torch.nn.Parameter(torch.zeros(1))])
    schedule = make_schedule(config, optimizer, num_steps)
    seen = []
    for _ in range(num_steps):
        seen.append(schedule.get_last_lr()[0] / config.learning_rate)
        optimizer.step()
        schedule.step()
    return seen


def test_make_schedule_warms_up_over_the_steps_or_the_share_asked_for():
    linear = {"lr_scheduler_type": "constant_with_warmup"}
    assert rates(10, warmup_steps=4, **linear) == pytest.approx([0, 0.25, 0.5, 0.75] + [1] * 6)
    assert rates(10, warmup_ratio=0.2, **linear) == pytest.approx([0, 0.5] + [1] * 8)
    assert rates(10, warmup_steps=0, **linear) == [1] * 10


def test_make_schedule_leaves_a_last_step_that_trains():
    assert rates(3, warmup_steps=50, lr_scheduler_type="constant_with_warmup")[-1] == 1


def test_warmup_settings_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match=r"warmup_ratio=0\.2 has no effect with warmup_steps=5"):
        TrainConfig(warmup_steps=5, warmup_ratio=0.2)
    with pytest.raises(ValueError, match="warmup_steps=5 has no effect with lr_scheduler_type"):
        TrainConfig(warmup_steps=5, lr_scheduler_type="constant")

import pytest

from lowmem_dpo.config import TrainConfig
from lowmem_dpo.training.schedule import Schedule


@pytest.mark.parametrize(
    ("epochs", "steps"), [(1.1, 110), (1.101, 111), (0.07, 7), (2.0, 200), (0.001, 1)]
)
def test_schedule_takes_no_step_for_rounding(epochs, steps):
    config = TrainConfig(batch_size=4, num_train_epochs=epochs)
    assert Schedule.of(config, 400).num_steps == steps

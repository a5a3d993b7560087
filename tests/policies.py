"""Policies as a training run makes them."""

from lowmem_dpo.settings.configs import TrainConfig
from lowmem_dpo.training.policy import Policy, load_policy


def policy_for(config: TrainConfig) -> Policy:
    """The policy of a run: its base, and a new adapter or the starting one."""
    return load_policy(config, config, config, init_adapter=config.init_adapter, seed=config.seed)

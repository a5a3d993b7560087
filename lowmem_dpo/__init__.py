"""Direct Preference Optimization of large language models on one consumer GPU.

from lowmem_dpo import TrainConfig, Trainer
"""

from typing import TYPE_CHECKING, Any

from lowmem_dpo.config import TrainConfig
from lowmem_dpo.version import __version__

if TYPE_CHECKING:
    from lowmem_dpo.training.trainer import Trainer

__all__ = ["TrainConfig", "Trainer", "__version__"]


def __getattr__(name: str) -> Any:
    """Import torch and transformers only when a Trainer is asked for, so that `--help` is quick."""
    if name == "Trainer":
        from lowmem_dpo.training.trainer import Trainer

        return Trainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

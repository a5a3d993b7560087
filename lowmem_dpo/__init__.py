"""Direct Preference Optimization of large language models on one consumer GPU.

from lowmem_dpo import TrainConfig, Trainer
"""

import importlib
import logging
import os
from typing import TYPE_CHECKING, Any

from lowmem_dpo.version import __version__

if TYPE_CHECKING:
    from lowmem_dpo.settings.configs import TrainConfig
    from lowmem_dpo.trainer import Trainer

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# On some CPUs it warns at import of kernels that are not used here.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

__all__ = ["TrainConfig", "Trainer", "__version__"]


def __getattr__(name: str) -> Any:
    """Import torch and transformers only when a Trainer is asked for, so that `--help` is quick."""
    modules = {"Trainer": "lowmem_dpo.trainer", "TrainConfig": "lowmem_dpo.settings.configs"}
    if name in modules:
        return getattr(importlib.import_module(modules[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

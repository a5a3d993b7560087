"""Loading a model in a test, with the lines that it prints."""

from dataclasses import dataclass, field
from unittest import mock

from lowmem_dpo.model.language_model import LanguageModel
from lowmem_dpo.weights import loading
from lowmem_dpo.weights.folders import load_config


@dataclass(frozen=True)
class Loaded(LanguageModel):
    """A model, and the lines that were printed while it was loaded."""

    notes: list[str] = field(default_factory=list)


def load_and_listen(folder, **options):
    """A model of a folder, on the CPU.

    Args:
        folder: The checkpoint.
        options: As `load_model` takes them.
    """
    lines = []
    with mock.patch.object(loading, "say", lines.append):
        config = load_config(str(folder))
        model = loading.load_model(str(folder), config=config, device="cpu", **options)
    return Loaded(**vars(model), notes=lines)

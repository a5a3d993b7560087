"""The settings of every verb: the groups that it needs, and what only it knows."""

from dataclasses import dataclass, field
from pathlib import Path

from lowmem_dpo.losses.types import losses_of
from lowmem_dpo.settings.fields import (
    COUNT_OR_NONE,
    Settings,
    check_unused,
    parse_config,
)
from lowmem_dpo.settings.groups import (
    AdapterSettings,
    DataSettings,
    EncodingSettings,
    LossSettings,
    MemorySettings,
    ModelSettings,
    OptimizerSettings,
    OutputSettings,
    PlaceSettings,
    RunSettings,
    SamplingSettings,
    SeedSettings,
    TemplateSettings,
)


def _check_places(model: ModelSettings, memory: PlaceSettings) -> None:
    """Refuse places in memory, and kernels, that cannot be beside the other settings."""
    if model.head_quantization != "none" and memory.head_weight == "host":
        raise ValueError(
            f"head_quantization={model.head_quantization} keeps the head on the device; "
            "leave it or head_weight host out"
        )
    if model.quantization == "none" and memory.layer_weights in ("host", "disk"):
        raise ValueError(
            f"layer_weights {memory.layer_weights} is for NF4; leave it or quantization none out"
        )
    head_kernel = getattr(memory, "head_kernel", "torch")  # what only answers has none,
    if "head" not in model.allowed_kernels and head_kernel not in ("auto", "torch"):
        raise ValueError(f"head_kernel {head_kernel} is not among kernels; leave one out")
    optim = getattr(memory, "optim", "adamw")  # and no optimizer
    if optim != "adamw" and getattr(memory, "optimizer_state", "auto") == "host":
        raise ValueError(f"optimizer_state host has no effect with optim={optim}; leave one out")


@dataclass(frozen=True)
class TrainingSettings(
    ModelSettings,
    DataSettings,
    EncodingSettings,
    LossSettings,
    OptimizerSettings,
    AdapterSettings,
    RunSettings,
    MemorySettings,
):
    """Every group that training reads."""


@dataclass(frozen=True)
class TrainConfig(TrainingSettings):
    """Settings of `train` and `precompute`."""

    def check(self) -> None:
        """Refuse what has no effect, or no meaning, beside settings of other groups."""
        _check_places(self, self)
        evaluates = self.eval_data or self.eval_fraction
        for name in ("eval_steps", "early_stopping_patience"):
            if getattr(self, name) is not None and not evaluates:
                raise ValueError(
                    f"{name} needs something to evaluate on: set eval_data or eval_fraction"
                )
        losses = losses_of(self).values()
        compares = any(loss.needs_reference for loss in losses) and not self.reference_free
        if self.reference == "accept" and not compares:
            cause = "reference_free" if self.reference_free else f"loss_type={self.loss_type}"
            raise ValueError(f"reference accept has no effect with {cause}; leave one out")
        if self.batch_size == 1 and any(loss.couples_pairs for loss in losses):
            raise ValueError(
                f"loss_type={self.loss_type} compares the pairs of a step with one another, and "
                "batch_size is 1; raise batch_size, or use sigmoid"
            )

    @classmethod
    def from_yaml(cls, path: str | Path) -> "TrainConfig":
        """Read a config from a YAML file.

        Args:
            path: The file; keys are the field names.

        Raises:
            ValueError: If the file is missing, is no YAML mapping, has an unknown key or a wrong
                value.
        """
        return parse_config(cls, ["--config", str(path)])


@dataclass(frozen=True)
class PlanConfig(TrainingSettings):
    """What shall fit, and where.

    The settings of `train` stand beside it, so that its files serve here too.
    """

    card: str | None = None
    """A card by the name people use, such as RTX 3060; it need not be here. By default, it is."""
    smallest: bool = False
    """Plan for the least memory on the card: 8-bit optimizer, and on the host what can be there."""
    longest: bool = False
    """Look for the longest max_length beyond 4,096 tokens too, which takes minutes."""
    all_cards: bool = False
    """Say of every known card which lengths fit, in place of a plan for one card."""
    json: bool = False
    """Print one JSON object in place of the table."""
    picture: str | None = None
    """A PNG file to draw: what holds the memory of card and host at the peak."""

    def check(self) -> None:
        """Refuse what a plan does not depend on, and what cannot be together."""
        _check_places(self, self)
        if self.max_length < 2:
            raise ValueError("max_length must be at least 2 for a plan: prompt and completion")
        if self.smallest:
            check_unused(self, "smallest", "keep_activations", "optimizer_state")
        if self.all_cards:
            unused = ("card", "memory_limit", "pack_tokens", "max_length", "batch_size", "data")
            check_unused(self, "all_cards", *unused, "host_memory_limit", "picture")
        if self.device == "cpu":
            raise ValueError("device=cpu has no effect on a plan for a card; leave it out")


@dataclass(frozen=True)
class GenerateConfig(ModelSettings, TemplateSettings, SamplingSettings, PlaceSettings):
    """What is answered, and by what."""

    adapter: str | None = None
    """PEFT adapter folder; its answers are shown beside the base's."""
    prompt: str | None = None
    """One prompt."""
    prompts: str | None = None
    """A file of prompts: one a line, or rows with a column prompt in any file that data may be."""
    compare: bool = True
    """Show the base's answer beside the adapter's."""

    def check(self) -> None:
        """Refuse an empty prompt, prompts from two places, and places that cannot be together."""
        _check_places(self, self)
        if self.prompt is not None and not self.prompt.strip():
            raise ValueError("prompt is empty; give it some text")
        if self.prompt is not None and self.prompts is not None:
            raise ValueError("prompt and prompts are both given; leave one out")


@dataclass(frozen=True)
class CacheConfig(Settings):
    """What of the cache is listed or removed."""

    cache_dir: str | None = None
    """Folder of caches; by default $LOWMEM_DPO_CACHE, or ~/.cache/lowmem_dpo."""
    prune: bool = False
    """Remove what no run will read again: damaged, half done, of earlier releases, of no base."""
    unused_days: int | None = field(default=None, metadata=COUNT_OR_NONE)
    """Count as of no use whatever was not used for so many days; --prune removes that too."""


@dataclass(frozen=True)
class DemoConfig(SeedSettings, OutputSettings):
    """Settings of `demo`."""

    # Another default than the group's: an earlier demo is replaced, a run never is.
    output_dir: str = "outputs/demo"
    """Folder that receives the demo's model, pairs and run; an earlier demo is replaced."""
    # No model is named here, and the demo's is so small that a CPU suits it best.
    device: str = "cpu"
    """cpu, cuda or cuda:N. The demo's model is so small that a CPU suits it best."""

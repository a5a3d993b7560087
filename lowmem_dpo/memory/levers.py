"""What a plan decides of memory: where a model's parts are, and what its layers keep."""

from dataclasses import dataclass
from typing import Literal

from lowmem_dpo.settings.groups import MemorySettings, PlaceSettings

Keeps = Literal["nothing", "attention", "all"]


@dataclass(frozen=True)
class Levers:
    """Places in memory; each leaves the bits of a step as they are, but for the optimizer's.

    Attributes:
        num_keep_all: How many layers keep all for the backward pass: the last ones, whose memory
            the backward pass gives back first.
        num_keep_attention: How many layers before these keep what attention needs. The rest keep
            their input alone and run again.
        inputs_on_host: Whether the inputs of layers that run again wait in pinned host memory.
        num_slots: Layers whose NF4 weights are on the device at a time, the others' being in host
            memory or on the disk; None for all.
        layers_on_disk: Whether these are on the disk, in the model's quantised files.
        embedding_on_host: Whether the embedding is in host memory.
        head_on_host: Whether the head is in pinned host memory.
        optimizer_on_host: Whether AdamW works in host memory: a card rounds its update otherwise.
    """

    num_keep_all: int = 0
    num_keep_attention: int = 0
    inputs_on_host: bool = False
    num_slots: int | None = None
    layers_on_disk: bool = False
    embedding_on_host: bool = False
    head_on_host: bool = False
    optimizer_on_host: bool = False

    @classmethod
    def of(cls, memory: PlaceSettings, num_layers: int) -> "Levers":
        """As the settings say; what they leave open stays on the device, and layers run again."""
        step = memory if isinstance(memory, MemorySettings) else MemorySettings()
        keeps = step.keep_activations
        return cls(
            num_keep_all=num_layers if keeps == "all" else 0,
            num_keep_attention=num_layers if keeps == "attention" else 0,
            inputs_on_host=step.layer_inputs == "host",
            num_slots=LEAST_SLOTS if memory.layer_weights in ("host", "disk") else None,
            layers_on_disk=memory.layer_weights == "disk",
            embedding_on_host=memory.embedding_weight == "host",
            head_on_host=memory.head_weight == "host",
            optimizer_on_host=step.optimizer_state == "host",
        )

    def agree_with(self, memory: PlaceSettings, num_layers: int) -> bool:
        """Whether all that the settings decide is as they say; what they leave open may be any."""
        wanted = Levers.of(memory, num_layers)
        return all(
            getattr(self, name) == getattr(wanted, name)
            for setting, names in _DECIDED_BY.items()
            if getattr(memory, setting, "auto") != "auto"
            for name in names
        )

    @property
    def few_tell_of_all(self) -> bool:
        """Whether few layers tell of all: of many slots, each of few layers has one."""
        return self.num_slots is None or self.num_slots <= LEAST_SLOTS + 1

    def words(self, num_layers: int) -> str:
        """For the user, such as `3 of 32 layers keep all; on the host: embedding`."""
        parts = []
        if self.num_keep_all:
            parts.append(f"{self.num_keep_all} of {num_layers} layers keep all")
        if self.num_keep_attention:
            parts.append(f"{self.num_keep_attention} of {num_layers} keep attention's")
        if not parts:
            parts = ["layers run again for the backward pass"]
        if self.num_slots is not None:
            source = "disk" if self.layers_on_disk else "host"
            parts.append(f"NF4 layers streamed from the {source}, {self.num_slots} at a time")
        on_host = {
            "embedding": self.embedding_on_host,
            "head": self.head_on_host,
            "layer inputs": self.inputs_on_host,
            "optimizer's states": self.optimizer_on_host,
        }
        if names := [name for name, is_there in on_host.items() if is_there]:
            parts.append(f"on the host: {', '.join(names)}")
        return "; ".join(parts)

    def keeps(self, num_layers: int) -> list[Keeps]:
        """What each layer keeps."""
        num_keep_nothing = num_layers - self.num_keep_attention - self.num_keep_all
        assert num_keep_nothing >= 0
        stretches: dict[Keeps, int] = {
            "nothing": num_keep_nothing,
            "attention": self.num_keep_attention,
            "all": self.num_keep_all,
        }
        return [keeps for keeps, number in stretches.items() for _ in range(number)]


_DECIDED_BY = {
    "optimizer_state": ("optimizer_on_host",),
    "keep_activations": ("num_keep_all", "num_keep_attention"),
    "layer_inputs": ("inputs_on_host",),
    "layer_weights": ("num_slots", "layers_on_disk"),
    "embedding_weight": ("embedding_on_host",),
    "head_weight": ("head_on_host",),
}
LEAST_SLOTS = 2
"""One layer computes while another is uploaded."""

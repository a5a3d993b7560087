"""Frozen weights that wait in host memory, or on the disk, and pass through a few slots.

    host     [layer 0][layer 1][layer 2] ... [layer L-1]   a blob of bytes each, or their files
    slots              [layer 1][layer 2]                  on the device, allocated once

While a layer computes, its neighbour is uploaded (`lanes`). In training a pass turns at the last
layer and comes back, so what was uploaded last is used again at once; elsewhere it starts again at
the first. A slot is taken from the layer that is needed last.

Uploads go on a lane of their own. Two orders must hold between it and the lane of computation:

- an upload waits until what the slot held was read for the last time (`released`);
- a layer waits until its upload is done (`uploaded`).

Whoever reads a weight outside of its turn would get another layer's bytes, without an error and
with wrong gradients. So every weight knows its lease, and refuses to be read when that is over.
"""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowmem_dpo.console import say, size
from lowmem_dpo.memory.lanes import COMPUTE, UPLOAD, Lanes, lanes_of, staging_of
from lowmem_dpo.memory.weight_files import FileRange, LayerOnDisk
from lowmem_dpo_kernels.triton_support import is_rehearsing

ALIGNMENT = 256  # of a tensor in its blob


class Slot:
    """Memory on the device for one layer.

    Args:
        memory: Its bytes.

    Attributes:
        owner: The layer whose bytes it holds, or is about to.
        held: Whether that layer computes now.
        uploaded: When the bytes are there; None once computation has waited for it.
        released: When the bytes were read last; None once an upload has waited for it.
    """

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        self.owner: int | None = None
        self.held = False
        self.uploaded: Any = None
        self.released: Any = None


@dataclass(frozen=True)
class Lease:
    """A layer's right to read a slot."""

    slot: Slot
    layer: int

    def check(self) -> None:
        """Refuse a reading outside of the layer's turn.

        Raises:
            RuntimeError: The slot is not the layer's now.
        """
        if not self.slot.held or self.slot.owner != self.layer:
            raise RuntimeError(
                f"a weight of layer {self.layer} is read outside of its turn: "
                f"its slot holds layer {self.slot.owner}"
            )


@dataclass(frozen=True)
class _Place:
    """A tensor of a layer, and where it lies in the layer's blob."""

    module: nn.Module
    name: str
    start: int
    nbytes: int
    dtype: torch.dtype
    shape: torch.Size
    on_disk: FileRange | None  # where it is read from; None of one in memory

    def in_memory(self, memory: Tensor) -> Tensor:
        return memory[self.start : self.start + self.nbytes].view(self.dtype).view(self.shape)


class WeightSlots:
    """The weights of decoder layers, of which a few are on the device at a time.

    Args:
        layers: Of each layer, modules whose buffers are on the host and are wanted on the device;
            each has an attribute `lease`, which it checks before it reads them. The buffers become
            views of slots. What a module's `on_disk` names, if anything, is read from there, and
            its other buffers stay.
        device: Where they are wanted.
        num_slots: Layers on the device at a time, at least 2.
        lanes: By default those of the device.

    Attributes:
        blobs: Of each layer its bytes in host memory, or where they are on the disk.
        slots: What is on the device.
        staging: Pinned memory that reads from the disk go through to a card.
        num_uploads: So far.
    """

    def __init__(
        self,
        layers: Sequence[Sequence[nn.Module]],
        device: torch.device,
        num_slots: int = 2,
        lanes: Lanes | None = None,
    ) -> None:
        assert num_slots >= 2, "a layer computes while another one is uploaded"
        self._layers = [_places(modules) for modules in layers]
        sizes = [sum(_aligned(place.nbytes) for place in places) for places in self._layers]
        on_disk = any(place.on_disk for places in self._layers for place in places)
        self.staging = staging_of(device, on_disk=on_disk)
        self._lanes = lanes or lanes_of(device, on_disk=on_disk, staging=self.staging)
        self.blobs = [
            _blob_of(places, num_bytes)
            for places, num_bytes in zip(self._layers, sizes, strict=True)
        ]
        if device.type == "cuda" and not is_rehearsing() and not on_disk:
            self._pin(device)
        self.slots = [
            Slot(torch.empty(max(sizes), dtype=torch.uint8, device=device))
            for _ in range(min(num_slots, len(layers)))
        ]
        # Their memory may still serve what was computed before.
        self._lanes.wait(UPLOAD, self._lanes.record(COMPUTE))
        self._direction, self._last = 1, -1
        self.num_uploads = 0
        for layer in range(len(layers)):
            self._bind(layer, self.slots[0])

    def _pin(self, device: torch.device) -> None:
        """Pin the blobs where the system lets us, each in its exact size.

        torch's own allocator of pinned memory rounds up to powers of two.
        """
        runtime = torch.cuda.cudart()
        for i, blob in enumerate(self.blobs):
            assert isinstance(blob, Tensor)
            code = int(runtime.cudaHostRegister(blob.data_ptr(), len(blob), 0))
            if code:
                rest = sum(map(len, self.blobs[i:]))
                say(
                    f"layer weights: {size(rest)} of host memory cannot be pinned (CUDA error "
                    f"{code}); uploads are slower"
                )
                # CUDA remembers the error, and torch's next launch would be blamed for it: here.
                with suppress(RuntimeError):
                    torch.ones(1, device=device)
                return
            # Before the memory is given back.
            weakref.finalize(self, runtime.cudaHostUnregister, blob.data_ptr())

    @contextmanager
    def hold(self, layer: int, *, returns: bool) -> Iterator[None]:
        """Have a layer's weights on the device while inside.

        Args:
            layer: Its index.
            returns: Whether the pass turns at the last layer and comes back.
        """
        slot = self._slot_with(layer, self._towards(layer), returns)
        slot.held = True
        try:
            if slot.uploaded is not None:
                slot.owner = None  # should it have failed, the step is taken again: as below
                self._lanes.wait(COMPUTE, slot.uploaded)
                slot.owner, slot.uploaded = layer, None
            self._bind(layer, slot)
            following = self._following(layer, returns)
            if following is not None and not all(other.held for other in self.slots):
                self._slot_with(following, self._direction, returns)
            yield
        finally:
            slot.held = False
            slot.released = self._lanes.record(COMPUTE)

    def _towards(self, layer: int) -> int:
        """The direction of the pass: 1 up, -1 down."""
        if layer in (0, len(self._layers) - 1):
            self._direction = 1 if layer == 0 else -1
        elif layer != self._last:
            self._direction = 1 if layer > self._last else -1
        self._last = layer
        return self._direction

    def _following(self, layer: int, returns: bool) -> int | None:
        """The layer after this one; None where a pass turns or ends."""
        if not returns:
            return (layer + 1) % len(self._layers)
        following = layer + self._direction
        return following if 0 <= following < len(self._layers) else None

    def _slot_with(self, layer: int, direction: int, returns: bool) -> Slot:
        """The slot that holds a layer, uploaded if none does."""
        for slot in self.slots:
            if slot.owner == layer:
                return slot
        last = len(self._layers) - 1

        def distance(slot: Slot) -> int:
            """Layers that compute before the one in a slot does again."""
            if slot.owner is None:
                return 2 * last + 2
            ahead = (slot.owner - layer) * direction
            if not returns:
                return (slot.owner - layer) % (last + 1)
            to_turn = last - layer if direction > 0 else layer
            return ahead if ahead > 0 else 2 * to_turn - ahead

        slot = max((slot for slot in self.slots if not slot.held), key=distance)
        if slot.released is not None:
            self._lanes.wait(UPLOAD, slot.released)
            slot.released = None
        slot.owner = None  # should the upload fail, the step is taken again: this is nobody's then
        self._lanes.upload(slot.memory[: len(self.blobs[layer])], self.blobs[layer])
        slot.uploaded = self._lanes.record(UPLOAD)
        slot.owner = layer
        self.num_uploads += 1
        return slot

    def _bind(self, layer: int, slot: Slot) -> None:
        """Let a layer's modules see a slot's memory."""
        lease = Lease(slot, layer)
        for place in self._layers[layer]:
            place.module._buffers[place.name] = place.in_memory(slot.memory)
            place.module.lease = lease  # type: ignore[assignment]


def _places(modules: Sequence[nn.Module]) -> list[_Place]:
    """Where each buffer of some modules lies in their blob."""
    places, start = [], 0
    for module in modules:
        on_disk: dict[str, FileRange] = getattr(module, "on_disk", {})
        for name, it in on_disk.items() or module.named_buffers(recurse=False):
            place = _Place(module, name, start, it.nbytes, it.dtype, it.shape, on_disk.get(name))
            places.append(place)
            start += _aligned(it.nbytes)
    return places


def _blob_of(places: Sequence[_Place], num_bytes: int) -> Tensor | LayerOnDisk:
    """A layer's tensors in one piece of memory, out of which they are taken; or their files."""
    ranges = tuple((place.start, place.on_disk) for place in places if place.on_disk is not None)
    if ranges:
        assert len(ranges) == len(places), "some of a layer is in memory, some on the disk"
        return LayerOnDisk(num_bytes, ranges)
    blob = torch.empty(num_bytes, dtype=torch.uint8)
    for place in places:
        place.in_memory(blob).copy_(place.module.get_buffer(place.name))
        place.module._buffers[place.name] = None  # freed before the next is copied
    return blob


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT

"""Two queues of work, computation and uploads, and events between them.

    computation   [layer 0][layer 1][layer 2] ...
    uploads       [layer 1][layer 2][layer 3] ...

On the host all is done at once, unless weights are read from the disk: then a thread reads the next
layer while the present one computes. On a card the queues are streams; what comes from the disk
goes through two pieces of pinned memory, of which one is filled while the other travels.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from lowmem_dpo.memory.weight_files import LayerOnDisk
from lowmem_dpo_kernels.triton_support import is_rehearsing

PIECE_BYTES = 2**24  # of an upload: what else is to be sent waits for no more than one piece
COMPUTE, UPLOAD = "compute", "upload"


class Lanes:
    """Both queues on the host, of what lies in its memory: all is done at once."""

    def record(self, lane: str) -> Any:
        """An event at the present end of a lane."""

    def wait(self, lane: str, event: Any) -> None:
        """Let what a lane gets from now on start after an event."""

    def upload(self, slot: Tensor, blob: Any) -> None:
        """Bring a layer's bytes into a slot, on the upload lane.

        Args:
            slot: As many bytes as the layer has.
            blob: A tensor of them, or a `LayerOnDisk`.
        """
        slot.copy_(blob)


class CudaLanes(Lanes):
    """Streams of a card: the present one, asked for each time, and one for uploads."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.uploads = torch.cuda.Stream(device)

    def _stream(self, lane: str) -> torch.cuda.Stream:
        return self.uploads if lane == UPLOAD else torch.cuda.current_stream(self.device)

    def record(self, lane: str) -> Any:
        """See `Lanes`."""
        event = torch.cuda.Event()
        event.record(self._stream(lane))
        return event

    def wait(self, lane: str, event: Any) -> None:
        """See `Lanes`."""
        self._stream(lane).wait_event(event)

    def upload(self, slot: Tensor, blob: Any) -> None:
        """See `Lanes`."""
        slot.record_stream(self.uploads)  # a model that goes may still be sent a layer
        for target, source in zip(slot.split(PIECE_BYTES), blob.split(PIECE_BYTES), strict=True):
            self._send(target, source)

    def _send(self, target: Tensor, piece: Tensor) -> None:
        with torch.cuda.stream(self.uploads):
            target.copy_(piece, non_blocking=True)


class ReadingLanes(Lanes):
    """Both queues on the host, of what lies on the disk: uploads are a thread's reads.

    What computes does so in the thread that asks for uploads, so all that it did before is over
    when the reader is asked: only computation has to wait.
    """

    def __init__(self) -> None:
        self._reader = _new_reader()
        self._last: Future[None]

    def record(self, lane: str) -> Any:
        """See `Lanes`; of uploads the last one, which raises what it met where it is waited for."""
        return self._last if lane == UPLOAD else None

    def wait(self, lane: str, event: Any) -> None:
        """See `Lanes`."""
        if lane == COMPUTE:
            event.result()

    def upload(self, slot: Tensor, blob: Any) -> None:
        """See `Lanes`."""
        self._last = self._reader.submit(self._read, slot, blob)

    def _read(self, slot: Tensor, blob: LayerOnDisk) -> None:
        blob.read_into(memoryview(slot.numpy()))  # type: ignore[arg-type]


class ReadingCudaLanes(CudaLanes):
    """Streams of a card, of what lies on the disk: a thread reads it and sends it on.

    Args:
        device: The card.
        staging: Pieces of pinned memory.
    """

    def __init__(self, device: torch.device, staging: list[Tensor]) -> None:
        super().__init__(device)
        self._reader = _new_reader()
        self._staging = staging
        self._sent = [torch.cuda.Event() for _ in staging]
        self._last: Future[Any]

    def record(self, lane: str) -> Any:
        """See `Lanes`; of uploads the last one: when it is sent, there is an event of the card."""
        return self._last if lane == UPLOAD else super().record(lane)

    def wait(self, lane: str, event: Any) -> None:
        """See `Lanes`."""
        super().wait(lane, event.result() if lane == COMPUTE else event)

    def upload(self, slot: Tensor, blob: Any) -> None:
        """See `Lanes`."""
        slot.record_stream(self.uploads)
        self._last = self._reader.submit(self._read_and_send, slot, blob)

    def _read_and_send(self, slot: Tensor, blob: LayerOnDisk) -> Any:
        for i, target in enumerate(slot.split(PIECE_BYTES)):
            sent, piece = self._sent[i % 2], self._staging[i % 2][: len(target)]
            sent.synchronize()  # the card has taken what the piece held before
            blob.read_into(memoryview(piece.numpy()), i * PIECE_BYTES)  # type: ignore[arg-type]
            self._send(target, piece)
            sent.record(self.uploads)
        return super().record(UPLOAD)


class RehearsedReading(Lanes):
    """What a rehearsal sees of reads from the disk: the pieces that travel to a card."""

    def __init__(self, staging: list[Tensor]) -> None:
        self._staging = staging

    def upload(self, slot: Tensor, blob: Any) -> None:
        """See `Lanes`."""
        if self._staging:
            for i, target in enumerate(slot.split(PIECE_BYTES)):
                target.copy_(self._staging[i % 2][: len(target)], non_blocking=True)


def lanes_of(device: torch.device, *, on_disk: bool, staging: list[Tensor]) -> Lanes:
    """The lanes between a device and where the layers lie.

    Args:
        device: Where layers compute.
        on_disk: Whether they lie on the disk; in host memory otherwise.
        staging: From `staging_of`.
    """
    if is_rehearsing():
        return RehearsedReading(staging) if on_disk else Lanes()
    if device.type != "cuda":
        return ReadingLanes() if on_disk else Lanes()
    return ReadingCudaLanes(device, staging) if on_disk else CudaLanes(device)


def staging_of(device: torch.device, *, on_disk: bool) -> list[Tensor]:
    """The pinned memory that reads from the disk go through; none where nothing does."""
    if not on_disk or device.type != "cuda":
        return []
    return [torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]


def _new_reader() -> ThreadPoolExecutor:
    """One thread, which ends when nobody holds this any more."""
    return ThreadPoolExecutor(1, "layer weights")

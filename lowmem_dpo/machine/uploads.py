"""Between host and card, by copies for which nobody waits."""

from collections.abc import Sequence

import torch
from torch import Tensor

SMALLEST_PIECE = 2**20
_ALIGNMENT = 256  # of a tensor in the copy, as torch's allocator gives it


def to_device(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Tensors of the host on a device.

    A copy of its own for each would, from memory that is not pinned, let the host wait until the
    card has done all that it was given before. The pinned memory is torch's: its allocator notes
    the stream that copies from it, and gives it to nobody else until that is past the copy.

    Args:
        tensors: On the CPU.
        device: Where to; if that is the CPU they stay what they are.

    Returns:
        The same numbers, on a card as views of one tensor.
    """
    if device.type != "cuda":
        return list(tensors)
    starts, end = [], 0
    for tensor in tensors:
        starts.append(end)
        end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    pinned = torch.empty(end, dtype=torch.uint8, pin_memory=True)
    places = list(zip(starts, tensors, strict=True))
    for start, tensor in places:
        _as(tensor, pinned, start).copy_(tensor)
    there = pinned.to(device, non_blocking=True)
    return [_as(tensor, there, start) for start, tensor in places]


def _as(tensor: Tensor, memory: Tensor, start: int) -> Tensor:
    """A view of bytes, of a tensor's type and shape."""
    return memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)


class PinnedCopy:
    """A card's tensor in pinned host memory, until it is wanted again.

    torch gives pinned memory in powers of two, so the tensor lies there in pieces of such sizes:
    what is lost is less than the smallest piece. Copies both ways run in the order of the stream.

    Args:
        x: The tensor.
    """

    def __init__(self, x: Tensor) -> None:
        self.shape = x.shape
        flat = x.detach().reshape(-1)
        self.sizes = piece_sizes(flat.numel(), flat.element_size())
        self.pieces = [
            torch.empty(len(part), dtype=x.dtype, pin_memory=True).copy_(part, non_blocking=True)
            for part in flat.split(self.sizes)
        ]

    def to(self, device: torch.device, *, non_blocking: bool = True) -> Tensor:
        """The tensor on a device."""
        x = torch.empty(self.shape, dtype=self.pieces[0].dtype, device=device)
        for part, piece in zip(x.view(-1).split(self.sizes), self.pieces, strict=True):
            part.copy_(piece, non_blocking=non_blocking)
        return x


def piece_sizes(numel: int, element_size: int) -> list[int]:
    """Elements of each piece: powers of two in bytes, largest first, and what is left last."""
    sizes = []
    while numel * element_size >= SMALLEST_PIECE:
        sizes.append(2 ** ((numel * element_size).bit_length() - 1) // element_size)
        numel -= sizes[-1]
    return [*sizes, numel] if numel or not sizes else sizes

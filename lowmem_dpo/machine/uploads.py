"""Small tensors of a micro-batch on their way to a card: in one copy, for which nobody waits."""

from collections.abc import Sequence

import torch
from torch import Tensor

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

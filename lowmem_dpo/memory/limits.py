"""Hold the process to a share of a CUDA card's memory."""

import contextlib
import ctypes

import torch

_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h
_LARGE_BYTES = 2**18


def limit_memory(limit_bytes: int, device: torch.device) -> None:
    """Make allocations beyond a limit fail as if the card were that small.

    Args:
        limit_bytes: The size, in bytes.
        device: A CUDA device.

    Raises:
        ValueError: If the device is no CUDA device or has less memory than that.
    """
    if device.type != "cuda":
        raise ValueError(
            f"memory_limit has no effect on {device.type}; leave it out or use a CUDA card"
        )
    total_bytes = torch.cuda.get_device_properties(device).total_memory
    check_limit(limit_bytes, total_bytes)
    torch.cuda.set_per_process_memory_fraction(limit_bytes / total_bytes, device)


def check_limit(limit_bytes: int, total_bytes: int) -> None:
    """Refuse a limit that would have no effect.

    Raises:
        ValueError: If a card has less memory than that.
    """
    if limit_bytes > total_bytes:
        raise ValueError(
            f"memory_limit {limit_bytes / 1e9:.1f}GB is more than the card has "
            f"({total_bytes / 1e9:.1f}GB)"
        )


def give_back_freed_memory() -> None:
    """Let the system have again what this process frees, on Linux with glibc.

    glibc keeps pieces of up to 32 MiB for itself, once such a one was freed: on a CPU a step that
    needs 180 MB of tensors was seen to take 740. From now on every large piece is one of its own.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library or system
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _LARGE_BYTES)

"""Hold the process to a share of a CUDA card's memory."""

import torch


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
    if limit_bytes > total_bytes:
        raise ValueError(
            f"memory_limit {limit_bytes / 1e9:.1f}GB is more than the card has "
            f"({total_bytes / 1e9:.1f}GB)"
        )
    torch.cuda.set_per_process_memory_fraction(limit_bytes / total_bytes, device)

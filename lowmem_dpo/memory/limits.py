"""Hold the process to a share of a CUDA card's memory."""

import torch

from lowmem_dpo.config import parse_bytes


def limit_memory(limit: str, device: torch.device) -> None:
    """Make allocations beyond `limit` fail as if the card were that small.

    Args:
        limit: A size such as 8GB.
        device: A CUDA device.

    Raises:
        ValueError: If the device is no CUDA device or has less memory than that.
    """
    if device.type != "cuda":
        raise ValueError(
            f"memory_limit has no effect on {device.type}; leave it out or use a CUDA card"
        )
    total_bytes = torch.cuda.get_device_properties(device).total_memory
    limit_bytes = parse_bytes(limit)
    if limit_bytes > total_bytes:
        raise ValueError(
            f"memory_limit {limit} is more than the card has ({total_bytes / 1e9:.1f}GB)"
        )
    torch.cuda.set_per_process_memory_fraction(limit_bytes / total_bytes, device)

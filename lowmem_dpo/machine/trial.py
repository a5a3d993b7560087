"""Trying a kernel once before a model uses it.

What a compiler makes of a kernel differs from card to card, and a kernel that serves policy and
reference alike would be wrong in both, so unseen at step zero.
"""

from collections.abc import Callable

import torch

from lowmem_dpo.console import warn


def passes_trial(trial: Callable[[], None], kernels: str, device: torch.device, other: str) -> bool:
    """Run a trial; one warning tells why kernels are not used.

    Args:
        trial: Raises where results are wrong; whatever a compiler or a driver raises counts too.
        kernels: What is tried, in words, in the plural.
        device: Where it is tried.
        other: What is used in its place.

    Raises:
        torch.OutOfMemoryError: Which tells nothing of the kernels: the next use tries them again.
    """
    try:
        trial()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        why = " ".join(str(error).split())[:200]
        warn(f"{kernels} failed their trial on {device} ({why}); {other} is used, please report it")
        return False
    return True


def check_error(found: torch.Tensor, expected: torch.Tensor, limit: float, what: str) -> None:
    """Refuse a result whose relative Frobenius error is above `limit`, or not a number.

    Raises:
        ValueError: With the error.
    """
    error = (found - expected).norm() / expected.norm()
    if not error <= limit:
        raise ValueError(f"{what}: relative error {error:.1e}")

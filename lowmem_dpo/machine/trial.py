"""Trying a kernel once before a model uses it.

What a compiler makes of a kernel differs from card to card, and a kernel that serves policy and
reference alike would be wrong in both, so unseen at step zero.
"""

import errno
import functools
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from lowmem_dpo.console import warn
from lowmem_dpo.settings.groups import KERNELS
from lowmem_dpo.stopping import RunStopped
from lowmem_dpo_kernels.triton_support import is_rehearsing, remembered_in_rehearsal

# Triton's driver, handles of CUDA's libraries, pinned memory and what is asked for in C++ raise a
# plain RuntimeError.
_FULL = re.compile(
    r"out of memory|(can't|cannot|could not) allocate memory|not enough memory|std::bad_alloc"
    r"|(CUBLAS|CUDNN)_STATUS_\w*ALLOC(ATION)?_FAILED|CUDA_ERROR_OUT_OF_MEMORY",
    re.I,
)


def once_a_device(function: Callable[..., Any], at_most: int | None = None) -> Any:
    """Remember what a function of a device gave; a rehearsal, whose card is another, for itself.

    Args:
        function: Its arguments are hashable; `cache_clear` of the result forgets.
        at_most: So many answers; the oldest goes first.
    """
    ours: dict[Any, Any] = {}

    @functools.wraps(function)
    def answer(*arguments: Any) -> Any:
        in_rehearsal = remembered_in_rehearsal()
        known = ours if in_rehearsal is None else in_rehearsal.setdefault(function, {})
        if arguments not in known:
            known[arguments] = function(*arguments)
            if at_most is not None and len(known) > at_most:
                del known[next(iter(known))]
        return known[arguments]

    answer.cache_clear = ours.clear  # type: ignore[attr-defined]
    return answer


def passes_trial(
    trial: Callable[[], None], name: str, kernels: str, device: torch.device, other: str
) -> bool:
    """Run a trial; one warning tells why kernels are not used. In a rehearsal all pass.

    Args:
        trial: Raises where results are wrong; whatever a compiler or a driver raises counts too.
        name: Of the kernels in the setting `kernels`.
        kernels: What is tried, in words, in the plural.
        device: Where it is tried.
        other: What is used in its place.

    Raises:
        torch.OutOfMemoryError: Which tells nothing of the kernels: the next use tries them again.
        RunStopped: If the card is of no use after it. CUDA does not forget an illegal access: what
            would be used in place of the kernels fails too, until the process ends.
    """
    if is_rehearsing():
        return True
    try:
        trial()
    except Exception as error:
        if is_out_of_memory(error):
            raise torch.OutOfMemoryError(str(error)) from error
        why = " ".join(str(error).split())[:200]
        failed = f"{kernels} failed their trial on {device} ({why})"
        if not _still_works(device):
            rest = ",".join(each for each in KERNELS if each != name)
            raise RunStopped(
                f"{failed} and the card does not answer any more; start again without them, "
                f"--kernels {rest}, and please report it"
            ) from error
        warn(f"{failed}; {other} is used, please report it")
        return False
    return True


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device, or the host, had no memory left, in whichever words."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and _FULL.search(str(error)) is not None


def _still_works(device: torch.device) -> bool:
    """Whether a card has come through what was done last."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError:
            return False
    return True


def value_and_gradients(
    function: Callable[..., Tensor], inputs: Iterable[Tensor], upstream: Tensor, *others: Any
) -> list[Tensor]:
    """The output of `function(*inputs, *others)`, and the gradients of its inputs."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    with torch.enable_grad():
        out = function(*leaves, *others)
    # A copy, since a backward pass may write over it.
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.clone())]


def check_error(found: Tensor, expected: Tensor, limit: float, what: str) -> None:
    """Refuse a result whose relative Frobenius error is above `limit`, or not a number.

    Raises:
        ValueError: With the error.
    """
    expected = expected.float()
    error = (found.float() - expected).norm() / expected.norm()
    if not error <= limit:
        raise ValueError(f"{what}: relative error {error:.1e}")

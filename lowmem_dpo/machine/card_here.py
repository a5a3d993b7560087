"""The card of this machine as a record, and what of it, and of the host, is free."""

import time
from collections.abc import Callable
from dataclasses import replace

import psutil
import torch

from lowmem_dpo.machine.card_table import Card, find_card
from lowmem_dpo.machine.cards import this_machine

SPILL_MARGIN_BYTES = 512 * 2**20
"""Left free under Windows, whose driver moves what is too much into host memory without an error;
an assumption."""
KERNELS_BYTES = 128 * 2**20
"""What kernels take when they are first launched, outside of torch; an assumption."""
_PRODUCT_SIZE, _COPY_BYTES, _REPEATS = 4096, 2**28, 8


def card_of(device: torch.device) -> Card:
    """A CUDA device with the memory that its driver tells, and the rates known of its name.

    A card that is not in the table is measured, which takes a second.
    """
    properties = torch.cuda.get_device_properties(device)
    try:
        known = find_card(properties.name)
    except ValueError:
        capability = (properties.major, properties.minor)
        known = Card(properties.name, capability, 0, *measured_rates(device))
    return replace(known, name=properties.name, memory_bytes=properties.total_memory)


def measured_rates(
    device: torch.device, product_size: int = _PRODUCT_SIZE, copy_bytes: int = _COPY_BYTES
) -> tuple[float, float, float]:
    """Rates as `Card` has them: FLOP/s of 16-bit products, bytes/s of memory and of the link.

    Args:
        device: On a CPU it is its own host.
        product_size: Rows and columns of the products.
        copy_bytes: Of the copies.
    """
    on_card = device.type == "cuda"
    half = torch.float16 if on_card else torch.bfloat16
    factor = torch.ones(product_size, product_size, dtype=half, device=device)
    here = torch.ones(copy_bytes, dtype=torch.uint8, device=device)
    there = torch.ones(copy_bytes, dtype=torch.uint8, pin_memory=on_card)
    target = torch.empty_like(here)

    def per_second(work: Callable[[], object]) -> float:
        work()  # the first one loads and compiles
        if on_card:
            torch.cuda.synchronize(device)
        begun = time.perf_counter()
        for _ in range(_REPEATS):
            work()
        if on_card:
            torch.cuda.synchronize(device)
        return _REPEATS / (time.perf_counter() - begun)

    return (
        2 * product_size**3 * per_second(lambda: factor @ factor),
        2 * copy_bytes * per_second(lambda: target.copy_(here)),
        copy_bytes * per_second(lambda: target.copy_(there, non_blocking=True)),
    )


def free_bytes(device: torch.device, system: str | None = None) -> int:
    """What torch may reserve of a card beside its tensors: what nobody else nor CUDA's context has.

    Args:
        device: A CUDA device whose context is there.
        system: As `Machine.system`; by default this one's.
    """
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free -= KERNELS_BYTES
    return max(0, free - SPILL_MARGIN_BYTES if spills(system) else free)


def spills(system: str | None = None) -> bool:
    """Whether what does not fit on the card goes to host memory without an error."""
    return (system or this_machine().system) in ("win32", "wsl")


def available_host_bytes() -> int:
    """Host memory that can be had without swapping."""
    return psutil.virtual_memory().available

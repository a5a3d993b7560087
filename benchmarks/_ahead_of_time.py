"""Triton kernels compiled for a card that need not be there: what each needs, whether it fits.

Launches go through their own host code, so what is compiled is what would run; only the driver is
a stand-in, and nothing runs.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import _common  # noqa: F401 - it finds the packages
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

CAPABILITIES = ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))


@dataclass(frozen=True)
class Card:
    """Limits of a multiprocessor, from the CUDA programming guide's table of capabilities.

    Attributes:
        shared_kib: That one program may have.
        total_shared_kib: That its programs may have together, 1 KiB a program for the system.
        max_warps: Resident at a time.
        max_programs: Resident at a time.
    """

    shared_kib: int
    total_shared_kib: int
    max_warps: int
    max_programs: int


CARDS = {
    (8, 0): Card(163, 164, 64, 32),
    (8, 6): Card(99, 100, 48, 16),
    (8, 9): Card(99, 100, 48, 24),
    (9, 0): Card(227, 228, 64, 32),
    (10, 0): Card(227, 228, 64, 32),
    (12, 0): Card(99, 100, 48, 24),
}
REGISTERS = 65536  # of a multiprocessor, on all of them
REGISTER_UNIT = 256  # a warp's registers are given out in these


@dataclass(frozen=True)
class Launch:
    """What a launch would have run, and on what.

    Attributes:
        code: Triton's compiled kernel.
        arguments: By name; tensors, and scalars as the host gave them.
    """

    code: Any
    arguments: dict[str, Any]

    @property
    def ptx(self) -> str:
        """The code before registers are given out."""
        return self.code.asm["ptx"]


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes.

    Attributes:
        registers: Of a thread.
        spilled_bytes: Of a thread, in local memory.
        shared_bytes: Of a program.
        num_warps: Of a program.
        programs: That one multiprocessor holds at a time; 0 if it does not fit.
        occupancy: Share of the multiprocessor's warps.
    """

    registers: int
    spilled_bytes: int
    shared_bytes: int
    num_warps: int
    programs: int
    occupancy: float


@contextmanager
def compiling_for(capability: tuple[int, int]) -> Iterator[list[Launch]]:
    """Inside, launches are compiled for a compute capability and noted down, and nothing runs."""
    number = 10 * capability[0] + capability[1]
    launches: list[Launch] = []
    launch = JITFunction.run

    def run(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        code = launch(kernel, *arguments, grid=grid, warmup=True, **options)
        named = dict(zip(kernel.arg_names, arguments, strict=False)) | options
        launches.append(Launch(code, named))

    # Compiled kernels are kept by device: every capability is one of its own.
    driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", number, 32),
        get_current_device=lambda: 1000 + number,
        get_current_stream=lambda device: 0,
    )
    with (
        mock.patch.object(triton.runtime.driver, "_active", driver),
        mock.patch.object(JITFunction, "run", run),
    ):
        yield launches


def resources(launch: Launch, capability: tuple[int, int]) -> Resources:
    """Read registers and spills off the compiled code, and see how many programs fit."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(launch.code.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        command = [tool, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {name: int(number) for name, number in re.findall(r"(\w+):(\d+)", text)}
    shared, num_warps = launch.code.metadata.shared, launch.code.metadata.num_warps
    # Local arrays are on the stack too, but these kernels have none: it is all spilled registers.
    spilled = max(usage["STACK"], usage["LOCAL"])
    programs = _programs(CARDS[capability], usage["REG"], shared, num_warps)
    occupancy = programs * num_warps / CARDS[capability].max_warps
    return Resources(usage["REG"], spilled, shared, num_warps, programs, occupancy)


def _programs(card: Card, registers: int, shared_bytes: int, num_warps: int) -> int:
    if shared_bytes > card.shared_kib * 1024:
        return 0
    warp_registers = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    return min(
        card.max_programs,
        card.max_warps // num_warps,
        REGISTERS // warp_registers // num_warps,
        card.total_shared_kib * 1024 // (shared_bytes + 1024),
    )

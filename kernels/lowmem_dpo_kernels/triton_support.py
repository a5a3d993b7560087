"""Where kernels are launched, what the card can do, and whether Triton can compile here.

Triton compiles a small C module for every process's driver and kernels, on the machine that runs
them. Without a C compiler or Python's headers it fails when the first kernel is launched, so that
is asked before.

A rehearsal runs host code on tensors without memory, for a card that is named: inside `rehearsing`,
launches are noted instead of made.
"""

import functools
import importlib.util
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TRITON_CAPABILITY = (8, 0)
"""Compute capability of the first cards that Triton supports; they multiply every type here."""


@dataclass(frozen=True)
class RehearsedCard:
    """The card of a rehearsal.

    Attributes:
        capability: Its compute capability.
        note_launch: Takes a kernel's name, its tensors and its products' operations.
        remembered: What was found out about it.
    """

    capability: tuple[int, int]
    note_launch: Callable[[str, list[Tensor], float], None]
    remembered: dict[Any, Any] = field(default_factory=dict)


_rehearsed: RehearsedCard | None = None


@contextmanager
def rehearsing(card: RehearsedCard) -> Iterator[None]:
    """Inside, CUDA devices are `card`, and no kernel runs."""
    global _rehearsed
    assert _rehearsed is None, "a rehearsal within a rehearsal"
    _rehearsed = card
    try:
        yield
    finally:
        _rehearsed = None


def is_rehearsing() -> bool:
    """Whether tensors have no content, so that there is nothing to try, compare or wait for."""
    return _rehearsed is not None


def capability_of(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device: of the card that is there, or that is rehearsed."""
    if _rehearsed is not None:
        return _rehearsed.capability
    return torch.cuda.get_device_capability(device)


def remembered_in_rehearsal() -> dict[Any, Any] | None:
    """What may be remembered of the rehearsed card; None outside of rehearsals."""
    return None if _rehearsed is None else _rehearsed.remembered


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, flops: float = 0.0, **options: Any
) -> None:
    """Launch a Triton kernel on the device of its first argument; all launches come here.

    Args:
        kernel: Compiled on its first launch.
        grid: Numbers of programs.
        *arguments: The kernel's own; the first is a tensor.
        flops: Floating-point operations of the kernel's products, for rehearsals.
        **options: Constants that are compiled in, and how the kernel is compiled.
    """
    if _rehearsed is not None:
        tensors = [each for each in arguments if isinstance(each, Tensor)]
        _rehearsed.note_launch(kernel.fn.__name__.strip("_"), tensors, flops)
        return
    with torch.cuda.device_of(arguments[0]):  # Triton launches on the current device
        kernel[grid](*arguments, **options)


@functools.cache
def triton_problem() -> str | None:
    """Why Triton cannot be used in this process, in words that end with the mend; None if it can.

    Source: triton/runtime/build.py, which looks for the compiler and the headers in this way.
    """
    if not importlib.util.find_spec("triton"):
        return "Triton is not installed"
    scheme = sysconfig.get_default_scheme()
    paths = sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)
    return missing_for_compiling(sys.platform, os.environ, Path(paths["include"]))


def runs_triton(device: torch.device) -> bool:
    """Whether kernels run on `device`: a CUDA card that is new enough, where Triton compiles."""
    if device.type != "cuda":
        return False
    if _rehearsed is not None:  # what this machine could compile does not matter
        compiles = importlib.util.find_spec("triton") is not None
    else:
        compiles = triton_problem() is None
    return compiles and capability_of(device) >= TRITON_CAPABILITY


def missing_for_compiling(
    platform: str, environment: Mapping[str, str], headers: Path
) -> str | None:
    """What Triton needs to compile and does not find.

    Args:
        platform: As `sys.platform`; on Windows Triton brings a compiler of its own.
        environment: `CC` names the compiler; else it is looked for on `PATH`.
        headers: The folder of this Python's C headers.
    """
    if platform != "win32":
        names = [environment["CC"]] if "CC" in environment else ["gcc", "clang"]
        if not any(shutil.which(name, path=environment.get("PATH")) for name in names):
            named = f" (CC={names[0]} is not there)" if "CC" in environment else ""
            return f"Triton needs a C compiler{named}; {_mend(platform)}"
    if not (headers / "Python.h").is_file():
        return f"Triton needs Python's headers (no Python.h in {headers}); {_mend(platform)}"
    return None


def _mend(platform: str) -> str:
    if platform == "win32":
        return "install Python from python.org, which brings them"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return f"on Debian and Ubuntu: sudo apt install build-essential python{version}-dev"

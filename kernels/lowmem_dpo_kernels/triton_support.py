"""Whether Triton can compile here: asked before the first kernel, not answered by its traceback.

Triton compiles a small C module for every process's driver and kernels, on the machine that runs
them. Without a C compiler or Python's headers it fails when the first kernel is launched.
"""

import functools
import importlib.util
import os
import shutil
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

import torch

TRITON_CAPABILITY = (8, 0)
"""Compute capability of the first cards that Triton supports; they multiply every type here."""


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
    return (
        device.type == "cuda"
        and triton_problem() is None
        and torch.cuda.get_device_capability(device) >= TRITON_CAPABILITY
    )


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

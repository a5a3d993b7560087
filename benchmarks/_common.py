"""What every benchmark here needs: the packages on the path, memory peaks, and records of runs."""

import argparse
import datetime
import importlib.metadata
import json
import math
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SCHEMA_VERSION = 1
PACKAGES = (
    "torch",
    "transformers",
    "triton",
    "bitsandbytes",
    "peft",
    "trl",
    "liger-kernel",
    "cut-cross-entropy",
)

sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]


def commit() -> str:
    """The checkout's commit, with a + where files differ from it."""
    command = ["git", "describe", "--always", "--abbrev=10", "--exclude=*", "--dirty=+"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return run.stdout.strip() or "unknown"


def device_name(device: torch.device) -> str:
    """The card's name, or the CPU's with its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """Versions of Python, CUDA, its driver and the packages that matter, where they are there."""
    found = {"python": platform.python_version()}
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    if torch.cuda.is_available() and shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found["driver"] = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def synchronize(device: torch.device) -> None:
    """Wait for the card, so that the clock tells what it did."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: torch.device) -> None:
    """Let the peak start again at what is held now; on a CPU this needs Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_mib(device: torch.device) -> float | None:
    """Largest memory since `reset_peak`, all that is held included; None where it is unknown.

    Tensors of the card, or what the process has resident.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if sys.platform != "linux":
        return None
    match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert match
    return int(match[1]) / 1024


def attempt(action: Callable[[], object]) -> str:
    """Run it; "memory" or "failed: ..." says why it came to nothing, "" that it did not."""
    try:
        action()
    except torch.OutOfMemoryError:
        return "memory"
    except Exception as error:  # a peer's, of any kind: the other rows are still wanted
        return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return ""


def exit_code(failures: list[str]) -> int:
    """1 if any row was wrong or failed; a card that is too small is an answer."""
    return int(any(failure not in ("", "memory") for failure in failures))


def add_memory_limit(parser: argparse.ArgumentParser) -> None:
    """The flag that emulates a smaller card."""
    parser.add_argument("--memory_limit", metavar="8GB", help="emulates a smaller card")


def hold_memory(
    parser: argparse.ArgumentParser, options: argparse.Namespace, device: torch.device
) -> None:
    """Do as `add_memory_limit`'s flag says."""
    from lowmem_dpo.memory.limits import limit_memory
    from lowmem_dpo.settings.groups import parse_bytes

    if not options.memory_limit:
        return
    try:
        limit_memory(parse_bytes(options.memory_limit), device)
    except ValueError as error:
        parser.error(str(error))
    print(f"memory limit {options.memory_limit}: the memory of a smaller card, not its speed")


class StepClock:
    """Wall time of steps, with the device idle at both ends of each.

    Attributes:
        steps_ms: Of each step that was stopped.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.steps_ms: list[float] = []
        self.begun = 0.0

    def start(self) -> None:
        """Begin a step."""
        synchronize(self.device)
        self.begun = time.perf_counter()

    def stop(self) -> None:
        """End it."""
        synchronize(self.device)
        self.steps_ms.append(1000 * (time.perf_counter() - self.begun))


def default_output(op: str, device: torch.device) -> Path:
    """benchmarks/results/<op>-<device>-<date>.json."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return RESULTS / f"{op}-{slug}-{datetime.date.today():%Y-%m-%d}.json"


def write_record(
    path: Path, op: str, device: torch.device, settings: dict[str, Any], results: list[Any]
) -> None:
    """Write what was measured, on what and with what, as JSON."""
    record = {
        "schema_version": SCHEMA_VERSION,
        "op": op,
        "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%dT%H:%M:%SZ}",
        "device": device_name(device),
        "commit": commit(),
        "versions": versions(),
        "settings": settings,
        "results": results,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(without_nan(record), indent=2, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def without_nan(value: Any) -> Any:
    """Measurements with null for every number that is not finite: JSON has none of those."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""What this machine has to compute with: what torch can use, and the cards that it cannot.

A card that torch does not see is looked for without torch: in nvidia-smi, in the driver's files, on
the PCI bus. So "no card" and "a card that is not ready" are told apart; `device` judges them.
"""

import os
import platform
import shutil
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

_SMI_SECONDS = 20  # without a resident driver the first question wakes every card
_NAMELESS = "an NVIDIA card"
_NVIDIA_VENDOR, _DISPLAY_CLASSES = "0x10de", ("0x0300", "0x0302")


@dataclass(frozen=True)
class NvidiaCards:
    """NVIDIA cards that the system shows, ready or not.

    Attributes:
        names: At least one.
        driver: The driver's version, such as 580.65.06; None where none is loaded.
        is_withheld: Whether they are the host's and this container was not given them.
    """

    names: tuple[str, ...]
    driver: str | None = None
    is_withheld: bool = False


@dataclass(frozen=True)
class UsableCard:
    """A card that torch can use.

    Attributes:
        name: As the driver calls it.
        capability: Its compute capability.
        has_kernels: Whether this torch was built for it.
    """

    name: str
    capability: tuple[int, int]
    has_kernels: bool = True


@dataclass(frozen=True)
class Machine:
    """What decides where a run can compute.

    Attributes:
        system: linux, wsl, win32 or darwin.
        torch_version: Such as 2.13.0+cpu.
        cuda_build: The CUDA that torch was built with; None for other builds.
        is_rocm_build: Whether torch was built for AMD cards, which it calls CUDA devices.
        has_apple_gpu: Whether torch sees an Apple GPU.
        cards: What torch can use, in its order.
        nvidia: Cards found without torch; looked for only where torch sees none.
        visible_devices: CUDA_VISIBLE_DEVICES, None if it is not set.
        problem: What torch said of a CUDA it cannot use.
    """

    system: str
    torch_version: str
    cuda_build: str | None = None
    is_rocm_build: bool = False
    has_apple_gpu: bool = False
    cards: tuple[UsableCard, ...] = ()
    nvidia: NvidiaCards | None = None
    visible_devices: str | None = None
    problem: str = ""


def this_machine() -> Machine:
    """Look at the machine this process runs on."""
    system = "wsl" if "microsoft" in platform.release().lower() else sys.platform
    cards, problem = _usable_cards()
    return Machine(
        system=system,
        torch_version=torch.__version__,
        cuda_build=torch.version.cuda,
        is_rocm_build=torch.version.hip is not None,
        has_apple_gpu=torch.backends.mps.is_available(),
        cards=cards,
        nvidia=None if cards else find_nvidia_cards(system),
        visible_devices=os.environ.get("CUDA_VISIBLE_DEVICES"),
        problem=problem,
    )


def _usable_cards() -> tuple[tuple[UsableCard, ...], str]:
    """What torch can use, and what it says where it can use nothing."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            count = torch.cuda.device_count() if torch.cuda.is_available() else 0
            built_for = torch.cuda.get_arch_list() if count else []
            found = [torch.cuda.get_device_properties(index) for index in range(count)]
        except RuntimeError as error:
            return (), str(error).partition("\n")[0]
    cards = (
        UsableCard(
            each.name, (each.major, each.minor), has_kernels((each.major, each.minor), built_for)
        )
        for each in found
    )
    return tuple(cards), str(caught[-1].message).partition("\n")[0] if caught else ""


def has_kernels(capability: tuple[int, int], built_for: list[str]) -> bool:
    """Whether a build of torch runs on a card.

    Args:
        capability: The card's.
        built_for: As `torch.cuda.get_arch_list` has it: sm_86 runs on 8.6 to 8.9, compute_90 (PTX)
            on 9.0 and everything newer. An empty list says nothing.
    """
    if not built_for:
        return True
    for name in built_for:
        kind, _, digits = name.rstrip("af").partition("_")
        if not digits.isdigit():
            continue
        built = (int(digits[:-1]), int(digits[-1]))
        same_family = built[0] == capability[0] or kind == "compute"
        if built <= capability and same_family:
            return True
    return False


def find_nvidia_cards(
    system: str, *, root: Path = Path("/"), programs: list[str] | None = None
) -> NvidiaCards | None:
    """Find NVIDIA cards without torch.

    Args:
        system: linux, wsl, win32 or darwin.
        root: Where the file system starts.
        programs: Candidates for nvidia-smi; by default those of this machine.
    """
    answer = ask_nvidia_smi(_nvidia_smi_programs() if programs is None else programs)
    if answer:
        return answer
    if system == "win32":
        library = Path(os.environ.get("SYSTEMROOT", "C:/Windows")) / "System32" / "nvcuda.dll"
        return NvidiaCards((_NAMELESS,)) if library.is_file() else None
    if system == "wsl":  # the driver is that of Windows
        has_driver = (root / "mnt/c/Windows/System32/nvidia-smi.exe").is_file()
        return NvidiaCards((_NAMELESS,)) if has_driver else None
    return _cards_of_linux(root)


def _nvidia_smi_programs() -> list[str]:
    found = [shutil.which("nvidia-smi"), shutil.which("nvidia-smi", path="/usr/lib/wsl/lib")]
    return [program for program in found if program]


def ask_nvidia_smi(programs: list[str]) -> NvidiaCards | None:
    """The cards that the first answering nvidia-smi knows of."""
    for program in programs:
        words = [program, "--query-gpu=name,driver_version", "--format=csv,noheader"]
        try:
            answer = subprocess.run(
                words, capture_output=True, timeout=_SMI_SECONDS, encoding="utf-8", errors="replace"
            )
        except (OSError, subprocess.SubprocessError):
            continue
        rows = [line.rsplit(",", 1) for line in answer.stdout.splitlines() if "," in line]
        if answer.returncode == 0 and rows:
            return NvidiaCards(tuple(row[0].strip() for row in rows), rows[0][1].strip())
    return None


def _cards_of_linux(root: Path) -> NvidiaCards | None:
    """Cards by the driver's files, or by the PCI bus where no driver is loaded."""
    driver = _driver_of_linux(root / "proc/driver/nvidia/version")
    on_bus = any(_is_nvidia_card(path) for path in root.glob("sys/bus/pci/devices/*"))
    if driver is None and not on_bus:
        return None
    names = [_model_name(p) for p in sorted(root.glob("proc/driver/nvidia/gpus/*/information"))]
    in_container = any((root / name).exists() for name in (".dockerenv", "run/.containerenv"))
    # A driver makes its device files with the first card it serves; a container gets them or not.
    has_device = (root / "dev/nvidiactl").exists()
    withheld = not has_device and (driver is not None or in_container)
    return NvidiaCards(tuple(names) or (_NAMELESS,), driver, withheld)


def _driver_of_linux(path: Path) -> str | None:
    """The version in a line such as `NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06`."""
    try:
        words = path.read_text(encoding="utf-8").partition("\n")[0].split()
    except OSError:
        return None
    return next((word for word in words if word[:1].isdigit() and "." in word), "unknown")


def _model_name(path: Path) -> str:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return _NAMELESS
    return next((x.partition(":")[2].strip() for x in lines if x.startswith("Model:")), _NAMELESS)


def _is_nvidia_card(path: Path) -> bool:
    try:
        vendor = (path / "vendor").read_text(encoding="utf-8").strip()
        return vendor == _NVIDIA_VENDOR and (
            (path / "class").read_text(encoding="utf-8").startswith(_DISPLAY_CLASSES)
        )
    except OSError:
        return False

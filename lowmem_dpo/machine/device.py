"""The device of a run: which it is, in what number format it computes, how fast, what goes there.

`auto` takes the card. It never takes the CPU beside a card that only needs something installed: a
run of hours would become one of weeks. What is missing is said in one line, and so is the way out,
which is to name the CPU.
"""

import os
import re
import sys
import time
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lowmem_dpo.machine.cards import Machine, NvidiaCards, this_machine
from lowmem_dpo_kernels import triton_problem
from lowmem_dpo_kernels.triton_support import TRITON_CAPABILITY, capability_of, is_rehearsing

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

OLDEST_CAPABILITY = (7, 5)
PROBE_SECONDS, SHORT_PROBE_SECONDS = 0.3, 0.03
CPU_DTYPES = (torch.float32, torch.bfloat16)
MUCH_FASTER = 2.0
SMALLEST_PIECE = 2**20
_ALIGNMENT = 256  # of a tensor in a copy of several, as torch's allocator gives it

# Every CUDA of a major version runs on drivers from this one on.
# Source: https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html
_OLDEST_DRIVERS = {11: 450, 12: 525, 13: 580}

# Room for partial sums, without which cuBLAS does not split a sum over K: on compute capability 9.0
# and 10.0 that split is all that lets a row's bits depend on the other rows of a product.
# Source: vllm-project/vllm, batch_invariant.py (pull requests 27660 and 43337).
WORKSPACES = {"CUBLAS_WORKSPACE_CONFIG": ":16:8", "CUBLASLT_WORKSPACE_SIZE": "1"}

_SELECTOR = "https://pytorch.org/get-started/locally/"
_DRIVERS = "https://www.nvidia.com/drivers"
_WAY_OUT = "to compute on the CPU all the same, name it: --device cpu"


def resolve_device(name: str, machine: Machine | None = None) -> tuple[torch.device, list[str]]:
    """Turn the setting `device` into a torch device that is ready.

    Args:
        name: auto (the CUDA card; the CPU only where there is none), cpu, cuda or cuda:N.
        machine: What there is; by default the machine is looked at.

    Returns:
        The device, and lines to tell the user.

    Raises:
        ValueError: If the name is unknown, or the card is not there or not ready.
    """
    kind, _, index = name.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (index and not (kind == "cuda" and index.isdigit())):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if name == "cpu":
        return torch.device("cpu"), []
    machine = machine or this_machine()
    if problem := unusable_cards(machine):
        raise ValueError(f"{problem}; {_WAY_OUT}")
    if not machine.cards:
        why = _why_no_card(machine)
        if kind == "cuda":
            raise ValueError(f"device {name} was asked for, but {why or 'there is no NVIDIA card'}")
        return torch.device("cpu"), [f"{why}: computing on the CPU"] if why else []
    device = torch.device("cuda", _card_index(kind, index, machine))
    pin_workspaces()
    _open(device, machine.cards[device.index].name)
    return device, _notes(machine.cards[device.index].capability)


def pin_workspaces() -> None:
    """Set cuBLAS's workspaces where the user did not; its first product in a process reads them."""
    for name, value in WORKSPACES.items():
        os.environ.setdefault(name, value)


def workspace_bytes() -> int:
    """What cuBLAS takes for its workspaces, under the user's values or ours."""
    cublas, lt = (os.environ.get(name, ours) for name, ours in WORKSPACES.items())
    numbers = [int(number) for number in re.findall(r"\d+", cublas)]
    buffers = sum(size * count for size, count in zip(numbers[::2], numbers[1::2], strict=False))
    return 1024 * (buffers + int(lt))


def matmul_settings() -> dict[str, Any]:
    """What else of this process can move the last bits of a card's products and kernels."""
    names = (*WORKSPACES, "TRITON_DEFAULT_FP_FUSION")
    matmul = torch.backends.cuda.matmul
    return {name.lower(): os.environ.get(name) for name in names} | {
        "blas_library": str(torch.backends.cuda.preferred_blas_library()),
        "reduced_precision_sums": [
            str(matmul.allow_bf16_reduced_precision_reduction),
            str(matmul.allow_fp16_reduced_precision_reduction),
        ],
    }


def unusable_cards(machine: Machine) -> str | None:
    """Why the machine's cards are of no use, and the mend; None if they are, or there is none."""
    if machine.is_rocm_build and machine.cards:
        return f"{machine.cards[0].name} is an AMD card, which is not supported"
    if machine.has_apple_gpu:
        return "Apple's GPU is not supported"
    nvidia = machine.nvidia
    if machine.cards or nvidia is None or nvidia.is_withheld or _are_hidden(machine):
        return None
    what, mend = _missing(machine, nvidia)
    return f"{nvidia.names[0]} is here, but {what}; {mend}"


def _are_hidden(machine: Machine) -> bool:
    """Whether the user hid every card, which is a wish for the CPU."""
    return machine.visible_devices is not None and machine.visible_devices.strip() in ("", "-1")


def _why_no_card(machine: Machine) -> str:
    """Who keeps a card that is there from this run; empty if there is none."""
    if machine.nvidia is None:
        return ""
    name = machine.nvidia.names[0]
    if machine.nvidia.is_withheld:
        return f"the host has {name}, which this container was not given (docker run --gpus all)"
    return f"CUDA_VISIBLE_DEVICES={machine.visible_devices!r} hides {name}"


def _missing(machine: Machine, nvidia: NvidiaCards) -> tuple[str, str]:
    """What keeps torch from a card that is there, and how to mend it."""
    torch_name = f"torch {machine.torch_version}"
    driver = nvidia.driver
    if driver is None and machine.system == "wsl":
        mend = "update the driver in Windows, then run `wsl --update` and `wsl --shutdown` there"
        return "WSL2 does not show it (no driver in /usr/lib/wsl/lib)", mend
    if driver is None and machine.system != "win32":
        return "no NVIDIA driver is loaded", f"install one ({_DRIVERS}) and start the machine anew"
    if machine.cuda_build is None:
        mend = f"install a CUDA build: {_install_command(machine, driver)} (others: {_SELECTOR})"
        return f"{torch_name} was built without CUDA", mend
    oldest = _OLDEST_DRIVERS.get(int(machine.cuda_build.partition(".")[0]))
    if driver is not None and oldest is not None and _major(driver) < oldest:
        what = f"its driver {driver} is too old for {torch_name} with CUDA {machine.cuda_build}"
        return (
            what,
            f"install driver {oldest} or newer ({_DRIVERS}), or an older build ({_SELECTOR})",
        )
    if machine.visible_devices is not None:
        what = f"CUDA_VISIBLE_DEVICES={machine.visible_devices!r} names no card of this machine"
        return what, "unset it, or count from 0"
    what = f"{torch_name} cannot use it ({machine.problem or 'it gives no reason'})"
    return what, "start the machine anew if its driver was updated, and see what nvidia-smi says"


def _major(driver: str) -> int:
    digits = driver.partition(".")[0]
    return int(digits) if digits.isdigit() else sys.maxsize


def _install_command(machine: Machine, driver: str | None) -> str:
    """The pip command for the same torch with the newest CUDA that the driver runs."""
    python = f'"{sys.executable}"' if " " in sys.executable else sys.executable
    build = "cu130" if driver is None or _major(driver) >= _OLDEST_DRIVERS[13] else "cu129"
    version = machine.torch_version.partition("+")[0]
    return (
        f"{python} -m pip install --force-reinstall torch=={version} "
        f"--index-url https://download.pytorch.org/whl/{build}"
    )


def _card_index(kind: str, index: str, machine: Machine) -> int:
    """The card that was named, or the first that can be used."""
    cards = machine.cards
    faults = [_fault(machine, place) for place in range(len(cards))]
    if kind == "auto" and None in faults:
        return faults.index(None)
    chosen = int(index or 0)
    if chosen >= len(cards):
        there = "1 card" if len(cards) == 1 else f"{len(cards)} cards"
        raise ValueError(f"device cuda:{chosen} was asked for; there is {there}, counted from 0")
    if fault := faults[chosen]:
        raise ValueError(f"{fault}; {_WAY_OUT}")
    return chosen


def _fault(machine: Machine, index: int) -> str | None:
    """Why a card that torch sees is of no use."""
    card = machine.cards[index]
    has = f"{card.name} has compute capability {card.capability[0]}.{card.capability[1]}"
    if card.capability < OLDEST_CAPABILITY:
        return (
            f"{has}; {OLDEST_CAPABILITY[0]}.{OLDEST_CAPABILITY[1]} (RTX 20, T4) or newer is needed"
        )
    if not card.has_kernels:
        return (
            f"{has}, for which torch {machine.torch_version} was not built; "
            f"choose another build ({_SELECTOR})"
        )
    return None


def _open(device: torch.device, name: str) -> None:
    """Let the card do something: another process may hold it, or all of its memory."""
    try:
        torch.zeros(1, device=device)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{name} ({device}) cannot be used now: {reason}; nvidia-smi shows what holds it"
        ) from None


def _notes(capability: tuple[int, int]) -> list[str]:
    """What a card will do without."""
    if capability < TRITON_CAPABILITY:  # takes the torch path in any case
        return []
    problem = triton_problem()
    return [f"the kernels take their slower PyTorch path: {problem}"] if problem else []


def resolve_dtype(
    name: str, device: torch.device, shape: tuple[int, int] = (2048, 2048)
) -> torch.dtype:
    """Turn the setting `dtype` into a torch dtype that suits the device.

    Args:
        name: auto, bfloat16, float16 or float32.
        device: Where the run computes.
        shape: Of the weights that most products are with, such as (D, width of the MLP).

    Raises:
        ValueError: If the device cannot compute in it.
    """
    if device.type == "cpu":
        if name == "float16":
            raise ValueError(
                "dtype float16 needs loss scaling on a CUDA card; on the CPU use float32"
            )
        return _dtype_for_this_cpu(shape) if name == "auto" else DTYPES[name]
    has_bfloat16 = capability_of(device) >= (8, 0)
    if name == "auto":
        return torch.bfloat16 if has_bfloat16 else torch.float16
    if name == "bfloat16" and not has_bfloat16:
        raise ValueError(f"{_name_of(device)} has no bfloat16; use dtype float16 or auto")
    return DTYPES[name]


def _name_of(device: torch.device) -> str:
    return "the card" if is_rehearsing() else torch.cuda.get_device_name(device)


def cuda_devices(device: torch.device) -> list[torch.device]:
    """The device for `torch.random.fork_rng`, whose list is of CUDA devices beside the CPU.

    A rehearsed card has no random generator.
    """
    return [device] if device.type == "cuda" and not is_rehearsing() else []


@lru_cache
def _dtype_for_this_cpu(shape: tuple[int, int]) -> torch.dtype:
    """bfloat16 where its products are measured to be much faster, else float32.

    A CPU that has instructions for bfloat16 may well be slower with them, and small products are
    slower on any. Where the two are close it is float32, so that the choice does not change from
    run to run.
    """
    usual, narrow = (matmul_rate(dtype, SHORT_PROBE_SECONDS, shape) for dtype in CPU_DTYPES)
    return CPU_DTYPES[narrow > MUCH_FASTER * usual]


def matmul_rate(
    dtype: torch.dtype, seconds: float = PROBE_SECONDS, shape: tuple[int, int] = (2048, 2048)
) -> float:
    """Floating-point operations per second of products on this CPU, measured now.

    Args:
        dtype: Of both sides.
        seconds: How long to measure.
        shape: Of the right side; the left one has 256 rows.
    """
    left, right = torch.ones(256, shape[0], dtype=dtype), torch.ones(shape, dtype=dtype)
    torch.mm(left, right)  # the first one starts threads
    count, begun = 0, time.perf_counter()
    while time.perf_counter() - begun < seconds or not count:
        torch.mm(left, right)
        count += 1
    return 2 * left.numel() * right.shape[1] * count / (time.perf_counter() - begun)


def to_device(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Tensors of the host on a device.

    A copy of its own for each would, from memory that is not pinned, let the host wait until the
    card has done all that it was given before. The pinned memory is torch's: its allocator notes
    the stream that copies from it, and gives it to nobody else until that is past the copy.

    Args:
        tensors: On the CPU.
        device: Where to; if that is the CPU they stay what they are.

    Returns:
        The same numbers, on a card as views of one tensor.
    """
    if device.type != "cuda":
        return list(tensors)
    starts, end = [], 0
    for tensor in tensors:
        starts.append(end)
        end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    pinned = torch.empty(end, dtype=torch.uint8, pin_memory=True)
    places = list(zip(starts, tensors, strict=True))
    for start, tensor in places:
        _as(tensor, pinned, start).copy_(tensor)
    there = pinned.to(device, non_blocking=True)
    return [_as(tensor, there, start) for start, tensor in places]


def _as(tensor: Tensor, memory: Tensor, start: int) -> Tensor:
    """A view of bytes, of a tensor's type and shape."""
    return memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)


class PinnedCopy:
    """A card's tensor in pinned host memory, until it is wanted again.

    torch gives pinned memory in powers of two, so the tensor lies there in pieces of such sizes:
    what is lost is less than the smallest piece. Copies both ways run in the order of the stream.

    Args:
        x: The tensor.
    """

    def __init__(self, x: Tensor) -> None:
        self.shape = x.shape
        flat = x.detach().reshape(-1)
        self.sizes = piece_sizes(flat.numel(), flat.element_size())
        self.pieces = [
            torch.empty(len(part), dtype=x.dtype, pin_memory=True).copy_(part, non_blocking=True)
            for part in flat.split(self.sizes)
        ]

    def to(self, device: torch.device, *, non_blocking: bool = True) -> Tensor:
        """The tensor on a device."""
        x = torch.empty(self.shape, dtype=self.pieces[0].dtype, device=device)
        for part, piece in zip(x.view(-1).split(self.sizes), self.pieces, strict=True):
            part.copy_(piece, non_blocking=non_blocking)
        return x


def piece_sizes(numel: int, element_size: int) -> list[int]:
    """Elements of each piece: powers of two in bytes, largest first, and what is left last."""
    sizes = []
    while numel * element_size >= SMALLEST_PIECE:
        sizes.append(2 ** ((numel * element_size).bit_length() - 1) // element_size)
        numel -= sizes[-1]
    return [*sizes, numel] if numel or not sizes else sizes

import dataclasses
import json
import os
import time

import pytest
import torch

from lowmem_dpo.machine import device
from lowmem_dpo.machine.cards import Machine, NvidiaCards, UsableCard
from lowmem_dpo.machine.device import (
    matmul_rate,
    matmul_settings,
    resolve_device,
    resolve_dtype,
    unusable_cards,
)

SHAPE = (2048, 5632)
BARE = Machine(system="linux", torch_version="2.13.0+cu130", cuda_build="13.0")
RTX = NvidiaCards(("NVIDIA GeForce RTX 3060",), "580.65.06")
CPU_BUILD = Machine("win32", "2.13.0+cpu", nvidia=RTX)
READY = dataclasses.replace(BARE, cards=(UsableCard("RTX 3060", (8, 6)), UsableCard("T4", (7, 5))))


def machine(**changes) -> Machine:
    return dataclasses.replace(BARE, **changes)


@pytest.fixture(autouse=True)
def opened(monkeypatch):
    """The cards of these tests open without a sound."""
    devices = []
    monkeypatch.setattr(device, "_open", lambda device, name: devices.append((device, name)))
    monkeypatch.setattr(device, "triton_problem", lambda: None)
    return devices


def refusal(name: str, machine: Machine) -> str:
    with pytest.raises(ValueError) as caught:
        resolve_device(name, machine)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_resolve_device_takes_the_card_and_opens_it(opened):
    assert resolve_device("auto", READY) == (torch.device("cuda", 0), [])
    assert resolve_device("cuda", READY)[0] == torch.device("cuda", 0)
    assert resolve_device("cuda:1", READY)[0] == torch.device("cuda", 1)
    assert opened[0] == (torch.device("cuda", 0), "RTX 3060")


def test_resolve_device_takes_the_cpu_where_there_is_no_card():
    assert resolve_device("auto", machine()) == (torch.device("cpu"), [])
    assert resolve_device("cpu", CPU_BUILD) == (torch.device("cpu"), [])


UNREADY = {
    "cpu build": (
        CPU_BUILD,
        ["NVIDIA GeForce RTX 3060 is here", "torch 2.13.0+cpu was built without CUDA"],
        ["-m pip install --force-reinstall torch==2.13.0 --index-url", "/whl/cu130", "get-started"],
    ),
    "cpu build, older driver": (
        Machine("linux", "2.13.0+cpu", nvidia=NvidiaCards(("T4",), "535.1")),
        ["T4 is here"],
        ["/whl/cu129"],
    ),
    "driver too old": (
        machine(nvidia=NvidiaCards(("T4",), "535.183.01")),
        ["its driver 535.183.01 is too old for torch 2.13.0+cu130 with CUDA 13.0"],
        ["driver 580 or newer", "nvidia.com/drivers"],
    ),
    "no driver": (
        machine(nvidia=NvidiaCards(("an NVIDIA card",))),
        ["no NVIDIA driver is loaded"],
        ["nvidia.com/drivers"],
    ),
    "wsl": (
        machine(system="wsl", nvidia=NvidiaCards(("an NVIDIA card",))),
        ["WSL2 does not show it"],
        ["wsl --update"],
    ),
    "wrong CUDA_VISIBLE_DEVICES": (
        machine(nvidia=RTX, visible_devices="7"),
        ["CUDA_VISIBLE_DEVICES='7' names no card"],
        ["unset it"],
    ),
    "torch's own reason": (
        machine(nvidia=RTX, problem="CUDA unknown error"),
        ["cannot use it (CUDA unknown error)"],
        ["nvidia-smi"],
    ),
    "amd": (
        machine(is_rocm_build=True, cuda_build=None, cards=(UsableCard("RX 7900", (11, 0)),)),
        ["RX 7900 is an AMD card, which is not supported"],
        [],
    ),
    "apple": (machine(system="darwin", has_apple_gpu=True), ["Apple's GPU is not supported"], []),
    "old card": (
        machine(cards=(UsableCard("GTX 1080", (6, 1)),)),
        ["GTX 1080 has compute capability 6.1"],
        ["7.5 (RTX 20, T4) or newer"],
    ),
    "card newer than torch": (
        machine(cards=(UsableCard("RTX 5090", (12, 0), has_kernels=False),)),
        ["RTX 5090 has compute capability 12.0, for which torch 2.13.0+cu130 was not built"],
        ["get-started"],
    ),
}


@pytest.mark.parametrize("case", UNREADY)
@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_resolve_device_never_falls_back_beside_a_card(case, name):
    unready, what, mend = UNREADY[case]
    message = refusal(name, unready)
    for words in [*what, *mend, "name it: --device cpu"]:
        assert words in message
    assert resolve_device("cpu", unready) == (torch.device("cpu"), [])


def test_resolve_device_takes_hidden_cards_for_a_wish_and_says_so():
    for hidden in ("", "-1"):
        chosen, notes = resolve_device("auto", machine(nvidia=RTX, visible_devices=hidden))
        assert chosen.type == "cpu"
        assert notes == [
            f"CUDA_VISIBLE_DEVICES='{hidden}' hides NVIDIA GeForce RTX 3060: computing on the CPU"
        ]
        cpu_build = dataclasses.replace(CPU_BUILD, visible_devices=hidden)
        assert resolve_device("auto", cpu_build)[0].type == "cpu"
    assert "hides NVIDIA" in refusal("cuda", machine(nvidia=RTX, visible_devices=""))


def test_resolve_device_tells_a_container_how_to_get_the_card():
    withheld = machine(nvidia=dataclasses.replace(RTX, is_withheld=True))
    chosen, notes = resolve_device("auto", withheld)
    assert chosen.type == "cpu" and "docker run --gpus all" in notes[0]
    assert "docker run --gpus all" in refusal("cuda", withheld)


def test_resolve_device_skips_a_card_that_is_too_old_unless_it_is_named():
    mixed = machine(cards=(UsableCard("GTX 1080", (6, 1)), UsableCard("RTX 3060", (8, 6))))
    assert resolve_device("auto", mixed)[0] == torch.device("cuda", 1)
    assert "GTX 1080" in refusal("cuda:0", mixed)


def test_resolve_device_refuses_cards_that_are_not_there():
    assert "there is no NVIDIA card" in refusal("cuda", machine())
    assert "there is 1 card" in refusal("cuda:3", machine(cards=(UsableCard("T4", (7, 5)),)))
    for name in ("tpu", "cuda:x", "cpu:0", ""):
        assert "device must be auto, cpu, cuda or cuda:N" in refusal(name, READY)


def test_resolve_device_says_what_a_busy_card_says(monkeypatch):
    def busy(*args, **kwargs):
        raise RuntimeError("CUDA-capable device(s) is/are busy or unavailable\nCompile with ...")

    monkeypatch.undo()
    monkeypatch.setattr(torch, "zeros", busy)
    message = refusal("auto", READY)
    assert message.startswith("RTX 3060 (cuda:0) cannot be used now: CUDA-capable device(s)")
    assert "nvidia-smi" in message


def test_resolve_device_says_once_that_triton_cannot_compile(monkeypatch):
    monkeypatch.setattr(device, "triton_problem", lambda: "Triton needs a C compiler; apt")
    assert resolve_device("cuda:0", READY)[1] == [
        "the kernels take their slower PyTorch path: Triton needs a C compiler; apt"
    ]
    assert resolve_device("cuda:1", READY)[1] == []  # 7.5 takes that path in any case


def test_unusable_cards_is_silent_where_nothing_is_to_be_mended():
    assert unusable_cards(READY) is None and unusable_cards(machine()) is None
    assert "--device" not in str(unusable_cards(CPU_BUILD))


@pytest.mark.parametrize(
    ("narrow", "chosen"), [(0.5, torch.float32), (1.9, torch.float32), (2.1, torch.bfloat16)]
)
def test_resolve_dtype_measures_which_the_cpu_is_fast_in(monkeypatch, narrow, chosen):
    rates = {torch.float32: 1.0, torch.bfloat16: narrow}
    monkeypatch.setattr(device, "matmul_rate", lambda dtype, seconds, shape: rates[dtype])
    device._dtype_for_this_cpu.cache_clear()
    assert resolve_dtype("auto", torch.device("cpu"), SHAPE) == chosen
    device._dtype_for_this_cpu.cache_clear()


def test_resolve_dtype_on_the_cpu():
    cpu = torch.device("cpu")
    assert resolve_dtype("bfloat16", cpu, SHAPE) == torch.bfloat16
    with pytest.raises(ValueError, match="on the CPU use float32"):
        resolve_dtype("float16", cpu, SHAPE)


@pytest.mark.parametrize(("capability", "chosen"), [((8, 0), "bfloat16"), ((7, 5), "float16")])
def test_resolve_dtype_takes_bfloat16_where_the_card_has_it(monkeypatch, capability, chosen):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "T4")
    card = torch.device("cuda", 0)
    assert resolve_dtype("auto", card, SHAPE) == getattr(torch, chosen)
    if capability < (8, 0):
        with pytest.raises(ValueError, match="T4 has no bfloat16; use dtype float16 or auto"):
            resolve_dtype("bfloat16", card, SHAPE)


def test_matmul_rate_counts_the_products_of_the_time_measured(monkeypatch):
    clock = iter([0.0, 0.1, 0.2, 0.4, 0.4])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    assert matmul_rate(torch.float32) == 2 * (2 * 256 * 2048 * 2048) / 0.4


def test_resolve_device_leaves_no_room_to_split_sums_but_what_the_user_set(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.delenv("CUBLASLT_WORKSPACE_SIZE", raising=False)
    resolve_device("cpu", READY)
    assert "CUBLASLT_WORKSPACE_SIZE" not in os.environ
    resolve_device("cuda", READY)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert os.environ.pop("CUBLASLT_WORKSPACE_SIZE") == "1"


def test_matmul_settings_tell_what_a_user_set(monkeypatch):
    before = matmul_settings()
    assert before.keys() == {
        "cublas_workspace_config",
        "cublaslt_workspace_size",
        "triton_default_fp_fusion",
        "blas_library",
        "reduced_precision_sums",
    }
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:2")
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")
    matmul = torch.backends.cuda.matmul
    allowed = matmul.allow_bf16_reduced_precision_reduction
    matmul.allow_bf16_reduced_precision_reduction = False
    found = matmul_settings()
    matmul.allow_bf16_reduced_precision_reduction = allowed
    assert found["cublas_workspace_config"] == ":4096:2"
    assert found["triton_default_fp_fusion"] == "0"
    assert found["reduced_precision_sums"][0] == "False"
    assert json.loads(json.dumps(found)) == found

import subprocess
from pathlib import Path

import pytest

from lowmem_dpo.machine.cards import (
    NvidiaCards,
    ask_nvidia_smi,
    find_nvidia_cards,
    has_kernels,
    this_machine,
)


def program(path: Path, text: str) -> list[str]:
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return [str(path)]


def write(path: Path, text: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def find(root: Path, system: str = "linux") -> NvidiaCards | None:
    return find_nvidia_cards(system, root=root, programs=[])


def pci_device(root: Path, vendor: str, kind: str) -> None:
    folder = root / "sys/bus/pci/devices" / f"0000:{vendor}:{kind}"
    write(folder / "vendor", f"{vendor}\n")
    write(folder / "class", f"{kind}\n")


def test_ask_nvidia_smi_reads_names_and_driver(tmp_path):
    lines = "echo 'NVIDIA GeForce RTX 3060, 580.65.06'\necho 'Tesla T4, 580.65.06'"
    cards = ask_nvidia_smi(program(tmp_path / "smi", lines))
    assert cards == NvidiaCards(("NVIDIA GeForce RTX 3060", "Tesla T4"), "580.65.06")


def test_ask_nvidia_smi_takes_failure_silence_and_hanging_for_no_answer(tmp_path, monkeypatch):
    failing = program(tmp_path / "a", "echo 'NVIDIA-SMI has failed, no driver'; exit 9")
    silent = program(tmp_path / "b", "echo 'No devices were found'")
    assert ask_nvidia_smi([*failing, *silent, str(tmp_path / "absent")]) is None
    monkeypatch.setattr("lowmem_dpo.machine.cards._SMI_SECONDS", 0.05)
    assert ask_nvidia_smi(program(tmp_path / "c", "sleep 5; echo 'a, 1'")) is None


def test_find_nvidia_cards_asks_the_first_program_that_answers(tmp_path):
    broken = program(tmp_path / "a", "exit 9")
    working = program(tmp_path / "b", "echo 'Tesla T4, 535.1'")
    found = find_nvidia_cards("linux", root=tmp_path, programs=[*broken, *working])
    assert found == NvidiaCards(("Tesla T4",), "535.1")


def test_find_nvidia_cards_reads_the_drivers_files(tmp_path):
    assert find(tmp_path) is None
    line = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 2024\nGCC"
    write(tmp_path / "proc/driver/nvidia/version", line)
    write(tmp_path / "proc/driver/nvidia/gpus/0000:01:00.0/information", "Model: \t RTX 3060\nIRQ")
    assert find(tmp_path) == NvidiaCards(("RTX 3060",), "535.183.01", is_withheld=True)
    write(tmp_path / "dev/nvidiactl")
    assert find(tmp_path) == NvidiaCards(("RTX 3060",), "535.183.01")


def test_find_nvidia_cards_sees_a_card_without_a_driver_on_the_bus(tmp_path):
    pci_device(tmp_path, "0x8086", "0x030000")  # another maker's
    pci_device(tmp_path, "0x10de", "0x040300")  # the sound device of a card
    assert find(tmp_path) is None
    pci_device(tmp_path, "0x10de", "0x030000")
    assert find(tmp_path) == NvidiaCards(("an NVIDIA card",))
    write(tmp_path / ".dockerenv")
    assert find(tmp_path).is_withheld


def test_find_nvidia_cards_in_wsl_looks_at_the_driver_of_windows(tmp_path):
    assert find(tmp_path, "wsl") is None
    write(tmp_path / "mnt/c/Windows/System32/nvidia-smi.exe")
    assert find(tmp_path, "wsl") == NvidiaCards(("an NVIDIA card",))


def test_find_nvidia_cards_on_windows_looks_for_the_drivers_library(tmp_path, monkeypatch):
    monkeypatch.setenv("SYSTEMROOT", str(tmp_path))
    assert find(tmp_path, "win32") is None
    write(tmp_path / "System32" / "nvcuda.dll")
    assert find(tmp_path, "win32") == NvidiaCards(("an NVIDIA card",))


@pytest.mark.parametrize(
    ("capability", "built_for", "runs"),
    [
        ((8, 9), ["sm_75", "sm_86"], True),
        ((8, 0), ["sm_86"], False),
        ((12, 0), ["sm_75", "sm_90"], False),
        ((12, 0), ["sm_75", "compute_90"], True),
        ((9, 0), ["sm_90a"], True),
        ((6, 1), ["sm_75", "sm_80", "compute_120"], False),
        ((8, 6), [], True),
    ],
)
def test_has_kernels_follows_the_rules_of_binaries_and_ptx(capability, built_for, runs):
    assert has_kernels(capability, built_for) is runs


def test_this_machine_asks_nothing_where_torch_has_cards(monkeypatch):
    def asked(*args, **kwargs):
        raise AssertionError("looked for cards that torch has")

    monkeypatch.setattr(subprocess, "run", asked)
    monkeypatch.setattr("lowmem_dpo.machine.cards._usable_cards", lambda: (("card",), ""))
    assert this_machine().cards == ("card",) and this_machine().nvidia is None

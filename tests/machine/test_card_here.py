import types

import pytest
import torch

from lowmem_dpo.machine import card_here
from lowmem_dpo.machine.card_here import card_of, free_bytes, measured_rates
from lowmem_dpo.machine.card_table import find_card

CARD = torch.device("cuda", 0)
MIB = 2**20


def tell(monkeypatch, name, total=25_000_000_000, free=0):
    found = types.SimpleNamespace(name=name, total_memory=total, major=8, minor=9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, total))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 10 * MIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 4 * MIB)


def test_the_card_here_has_the_rates_of_its_name_and_the_memory_its_driver_tells(monkeypatch):
    tell(monkeypatch, "NVIDIA GeForce RTX 4090")
    card = card_of(CARD)
    assert (card.name, card.memory_bytes) == ("NVIDIA GeForce RTX 4090", 25_000_000_000)
    assert card.flops == find_card("4090").flops


@pytest.mark.parametrize("name", ["NVIDIA RTX 9999", "NVIDIA GeForce RTX 3080"])
def test_a_card_that_is_unknown_or_ambiguous_is_measured(monkeypatch, name):
    tell(monkeypatch, name)
    monkeypatch.setattr(card_here, "measured_rates", lambda device: (1e12, 2e11, 3e10))
    card = card_of(CARD)
    assert (card.name, card.capability, card.memory_bytes) == (name, (8, 9), 25_000_000_000)
    assert (card.flops, card.memory_bandwidth, card.link_bandwidth) == (1e12, 2e11, 3e10)


def test_rates_are_measured_in_the_units_of_a_card():
    flops, memory, link = measured_rates(torch.device("cpu"), product_size=256, copy_bytes=2**20)
    assert 1e8 < flops < 1e14
    assert 1e8 < memory < 1e13 and 1e8 < link < 1e13


def test_rates_count_two_operations_a_product_and_what_is_read_and_written(monkeypatch):
    times = iter(range(100))  # a second from one look at the clock to the next
    monkeypatch.setattr(card_here.time, "perf_counter", lambda: next(times))
    rates = measured_rates(torch.device("cpu"), product_size=4, copy_bytes=10)
    assert rates == (8 * 2 * 4**3, 8 * 2 * 10, 8 * 10)


def test_what_is_free_leaves_out_other_programs_tensors_that_are_there_and_what_windows_would_spill(
    monkeypatch,
):
    tell(monkeypatch, "any", free=1000 * MIB)
    assert free_bytes(CARD, "linux") == 1000 * MIB + 6 * MIB - card_here.KERNELS_BYTES
    spilling = free_bytes(CARD, "linux") - card_here.SPILL_MARGIN_BYTES
    assert free_bytes(CARD, "wsl") == free_bytes(CARD, "win32") == spilling
    tell(monkeypatch, "any", free=0)
    assert free_bytes(CARD, "wsl") == 0

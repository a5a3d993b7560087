"""How many launches a decoder layer takes on a card, counted on tensors without memory."""

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from lowmem_dpo.model import attention, layer
from tests.kernels.helpers import import_benchmark

layer_launches = import_benchmark("layer_launches")


def test_a_layer_takes_few_launches_forth_and_back():
    counts = layer_launches.count("tiny", 128)
    assert counts.forward.total() <= 45
    assert counts.backward.total() <= 130


def test_what_is_cast_is_cast_once_a_step_and_gradients_are_added_by_products():
    counts = layer_launches.count("tiny", 128)
    later = counts.forward + counts.backward
    # Three are tables of attention, made once for all layers.
    assert counts.first["_to_copy"] == 14 + 3 and later["_to_copy"] == 0
    assert later["addmm"] == 14  # into .grad
    assert later["cat"] == 0


def test_each_product_is_there_once_and_inputs_meet_joined_matrices_once():
    """Forward: a product and a dense weight for each of seven linears, x A^T of four inputs."""
    counts = layer_launches.count("tiny", 128)
    assert counts.forward["mm"] == 7 + 4
    assert counts.forward["nf4_dequantize_kernel"] == 7
    assert counts.forward["addmm_"] == 7
    assert counts.forward["rotary_kernel"] == 2
    assert counts.backward["nf4_dequantize_kernel"] == 6 + 7


def test_two_tiles_run_the_token_wise_half_twice():
    counts = layer_launches.count("tiny", 256, tile_rows=128)
    assert counts.forward["gated_product_fwd_kernel"] == 2
    assert counts.backward["gated_product_bwd_kernel"] == 2
    assert counts.forward["forward_kernel"] == counts.backward["key_gradient_kernel"] == 1


def test_the_count_sees_what_is_not_joined(monkeypatch):
    joined = layer_launches.count("tiny", 128)
    for module in (attention, layer):
        monkeypatch.setattr(module, "project", lambda x, layers: [each(x) for each in layers])
    apart = layer_launches.count("tiny", 128)
    assert apart.forward["mm"] == joined.forward["mm"] + 3  # x A^T of k, v and up by themselves
    assert apart.backward["add"] == joined.backward["add"] + 3  # sums of the gradients of x

"""Tests of the kernels on the CPU. They need TRITON_INTERPRET=1 before triton is imported.

`test_tree_attention.py` starts it, in the process that all such files share.
"""

import pytest
import torch

from lowmem_dpo_kernels import TreePlan, tree_attention, tree_attention_triton, twins
from lowmem_dpo_kernels.tree_attention_triton import TileSize, TileSizes
from tests.kernels.helpers import all_equal, poisoned_memory

SETTINGS = [
    {},
    {"sliding_window": 7},
    {"softcap": 3.0},
    {"sliding_window": 19, "softcap": 2.0},
    # A tile's first query begins to see a tile of 16 with its last key alone.
    {"sliding_window": 2},
    {"sliding_window": 18},
]
FORESTS = {
    "tail": [(0, 5, 3, 4), (12, 18, 1, 16)],
    "trunk-of-one": [(0, 1, 17, 2), (20, 1, 0, 18), (39, 1, 1, 1)],
    "empty-branches": [(0, 4, 0, 5), (9, 18, 5, 0), (32, 6, 0, 0), (38, 0, 3, 4)],
    "whole-tiles": [(0, 16, 16, 16)],
    "sequences": [(0, 33, 0, 0), (33, 1, 0, 0), (34, 10, 0, 0)],
    "nothing": [],
}
NUM_TOKENS = 48


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """The interpreter takes a millisecond an instruction: many tiles of 16 in few tokens."""
    set_tile_size(monkeypatch, TileSize(16, 16, 4, 1))


def set_tile_size(monkeypatch, size):
    """The same for all three kernels."""
    sizes = TileSizes(size, size, size)
    monkeypatch.setattr(tree_attention_triton, "tile_sizes_for", lambda capability, size: sizes)


def make_inputs(dtype=torch.float32, *, heads=2, key_heads=1, size=24, num_tokens=NUM_TOKENS):
    """Query, key, value, and the gradient from above; views of [N, heads * size], as projected."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(num_tokens, count * size, generator=generator)
        .to(dtype)
        .view(num_tokens, count, size)
        .transpose(0, 1)
        for count in (heads, key_heads, key_heads)
    )
    return query, key, value, torch.randn(num_tokens, heads, size, generator=generator).to(dtype)


def values_and_grads(function, inputs, where, **settings):
    *tensors, upstream = inputs
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    out = function(*tensors, where, scale=0.3, **settings)
    return out.detach(), *torch.autograd.grad(out, tensors, upstream)


def ours(inputs, layout, **settings):
    return values_and_grads(
        tree_attention, inputs, TreePlan(layout, inputs[0].shape[1]), **settings
    )


def assert_near_float64(inputs, layout, limit, **settings):
    found = ours(inputs, layout, **settings)
    exact = [tensor.double() for tensor in inputs]
    expected = values_and_grads(twins.tree_attention, exact, layout, **settings)
    for name, one, other in zip(["out", "query", "key", "value"], found, expected, strict=True):
        error = (one.double() - other).norm() / other.norm().clamp_min(1e-30)
        assert error <= limit, (name, error.item())


@pytest.mark.parametrize("settings", SETTINGS[:4:3], ids=str)
@pytest.mark.parametrize("forest", FORESTS)
def test_tree_attention_matches_float64(forest, settings):
    assert_near_float64(make_inputs(), FORESTS[forest], 1e-6, **settings)


@pytest.mark.parametrize("settings", SETTINGS[1:3] + SETTINGS[4:], ids=str)
def test_tree_attention_matches_float64_with_one_setting_alone(settings):
    assert_near_float64(make_inputs(), FORESTS["tail"], 1e-6, **settings)


def test_tree_attention_with_a_window_beyond_the_pack_has_the_bits_of_none():
    """Up to 2^31 - 1, which a position may not be added to."""
    inputs = make_inputs(num_tokens=16)
    expected = ours(inputs, [(0, 5, 3, 4)])
    for window in (16, 2**31 - 1):
        found = ours(inputs, [(0, 5, 3, 4)], sliding_window=window)
        assert all_equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tree_attention_of_half_inputs_is_off_by_their_rounding(dtype):
    """The interpreter cuts bfloat16 off instead of rounding it: twice the card's error."""
    limit = {torch.float16: 2**-10, torch.bfloat16: 2**-7}[dtype]
    assert_near_float64(make_inputs(dtype), FORESTS["tail"], limit, softcap=3.0)


@pytest.mark.parametrize("heads, key_heads, size", [(3, 1, 64), (2, 2, 16), (4, 2, 80)])
def test_tree_attention_takes_any_group_and_head_size(heads, key_heads, size):
    inputs = make_inputs(heads=heads, key_heads=key_heads, size=size)
    assert_near_float64(inputs, FORESTS["tail"], 1e-6)


@pytest.mark.parametrize("settings", SETTINGS[:2], ids=str)
@pytest.mark.parametrize("queries, keys", [(16, 32), (32, 16), (64, 16)])
def test_tree_attention_takes_tiles_of_any_shape(monkeypatch, queries, keys, settings):
    set_tile_size(monkeypatch, TileSize(queries, keys, 4, 1))
    layout = [(0, 35, 12, 23), (70, 5, 2, 3)]
    assert_near_float64(make_inputs(num_tokens=80), layout, 1e-6, **settings)


@pytest.mark.parametrize("settings", SETTINGS[:2], ids=str)
def test_tree_attention_gives_a_tree_the_same_bits_in_any_pack(settings):
    inputs = make_inputs()
    alone = ours(inputs, [(0, 20, 5, 10)], **settings)
    # 11 rows further on, where no tile of 16 would begin, behind a tree of other numbers.
    moved = [torch.cat([x[:, 37:], x[:, :37]], dim=1) for x in inputs[:3]]
    moved.append(torch.cat([inputs[3][37:], inputs[3][:37]]))
    beside = ours(moved, [(0, 3, 6, 2), (11, 20, 5, 10)], **settings)
    assert torch.equal(alone[0][:35], beside[0][11:46])
    for one, other in zip(alone[1:], beside[1:], strict=True):
        assert torch.equal(one[:, :35], other[:, 11:46])


def test_tree_attention_has_the_same_bits_without_gradient():
    inputs = make_inputs(torch.float16)
    plan = TreePlan(FORESTS["tail"], NUM_TOKENS)
    with torch.no_grad():
        without = tree_attention(*inputs[:3], plan, scale=0.3)
    assert torch.equal(without, ours(inputs, FORESTS["tail"])[0])


def test_tree_attention_writes_zeros_behind_the_last_tree_whatever_is_there():
    inputs = make_inputs()
    clean = ours(inputs, FORESTS["tail"])
    for tensor in inputs[:3]:
        tensor[:, 47:] = torch.nan
    inputs[3][47:] = torch.nan
    with poisoned_memory():
        out, *grads = ours(inputs, FORESTS["tail"])
    assert torch.equal(out, clean[0]) and not out[47:].any()
    for grad, expected in zip(grads, clean[1:], strict=True):
        assert torch.equal(grad, expected) and not grad[:, 47:].any()


@pytest.mark.parametrize("settings", SETTINGS[:2], ids=str)
def test_tree_attention_keeps_nan_in_its_tree(settings):
    inputs = make_inputs()
    clean = ours(inputs, FORESTS["tail"], **settings)
    for tensor in inputs[:3]:
        tensor[:, 15] = torch.nan
    out, *grads = ours(inputs, FORESTS["tail"], **settings)
    assert torch.equal(out[:12], clean[0][:12]) and out[15].isnan().all()
    for grad, expected in zip(grads, clean[1:], strict=True):
        assert torch.equal(grad[:, :12], expected[:, :12])


@pytest.mark.parametrize("settings", SETTINGS[:2], ids=str)
def test_tree_attention_writes_all_of_its_results(settings):
    with poisoned_memory():
        results = ours(make_inputs(), FORESTS["empty-branches"], **settings)
    assert not any(x.isnan().any() for x in results)


def test_tree_attention_takes_a_strided_gradient_from_above():
    inputs, layout = make_inputs(num_tokens=16), [(0, 5, 3, 4)]
    expected = ours(inputs, layout)
    upstream = inputs[3].transpose(0, 1).contiguous().transpose(0, 1)
    found = ours((*inputs[:3], upstream), layout)
    assert all_equal(found, expected)
    columns = inputs[3].transpose(1, 2).contiguous().transpose(1, 2)  # no unit stride
    found = ours((*inputs[:3], columns), layout)
    assert all_equal(found, expected)


def test_tree_attention_stays_finite_where_scores_are_large():
    inputs = make_inputs()
    inputs[0].mul_(100)
    for settings in SETTINGS[:4:2]:
        assert_near_float64(inputs, FORESTS["tail"], 1e-5, **settings)

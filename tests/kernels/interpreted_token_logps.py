"""Tests of the Triton path on the CPU. They need TRITON_INTERPRET=1 before triton is imported.

`test_token_logps_triton.py` starts it, in the process that all such files share.
"""

import pytest
import torch

from lowmem_dpo_kernels import token_logps, token_logps_fused, token_logps_pass, token_logps_triton
from lowmem_dpo_kernels.heads import FrozenHead, HeadSlice, ScoredRows
from lowmem_dpo_kernels.token_logps_fused import LaunchSizes
from tests.kernels.helpers import HEAD_VARIANTS as VARIANTS
from tests.kernels.helpers import (
    SlicedHead,
    all_equal,
    exact_logps_and_grad,
    logps_and_grad,
    make_head_case,
    poisoned_memory,
    relative_error,
)

IMPLEMENTATIONS = ["triton", "fused"]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """The interpreter takes milliseconds a row: blocks of 16 rows, slices of 128 tokens."""
    monkeypatch.setattr(
        token_logps_pass,
        "pass_numerics",
        lambda device, dtype: (16, 128, torch.promote_types(dtype, torch.float32)),
    )
    monkeypatch.setattr(token_logps_fused, "FP32_SIZES", LaunchSizes(16, 64, 32, 32, 32, 4, 2))


@pytest.fixture
def half_operands(monkeypatch, small_tiles):
    """Products of half operands, as on a card; on a CPU the head becomes fp32."""
    monkeypatch.setattr(token_logps_pass, "pass_numerics", lambda device, dtype: (16, 128, dtype))


def make_case(dtype, *, vocabulary=300, **settings):
    return make_head_case(
        dtype, num_rows=9, dim=19, vocabulary=vocabulary, num_tokens=13, **settings
    )


def pass_grads(inputs, path):
    """g [T, D] in fp32, or float64 for float64."""
    hidden, rows, weight, targets = inputs
    return token_logps_pass.run_pass(hidden, rows, targets, FrozenHead(weight), path, grads=True)[1]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_triton_paths_match_float64(dtype, variant, implementation):
    inputs, settings, upstream = make_case(dtype, **VARIANTS[variant])
    expected_logps, expected_grad = exact_logps_and_grad(inputs, settings, upstream)
    settings["implementation"] = implementation
    logps, grad = logps_and_grad(token_logps, inputs, settings, upstream)
    assert logps.dtype == torch.float32
    torch.testing.assert_close(logps.double(), expected_logps, atol=1e-5, rtol=0)
    error = relative_error(grad, expected_grad)
    assert error <= (1e-5 if dtype == torch.float32 else 2**-8)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_paths_have_the_same_bits_without_gradient(dtype, variant, implementation):
    """The fused path then takes the whole vocabulary at once, and slices of it otherwise."""
    inputs, settings, upstream = make_case(dtype, **VARIANTS[variant])
    settings["implementation"] = implementation
    logps, _ = logps_and_grad(token_logps, inputs, settings, upstream)
    assert torch.equal(token_logps(*inputs, **settings), logps)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_triton_paths_keep_nan_in_its_row(implementation):
    (hidden, _, weight, targets), _, _ = make_case(torch.float32, vocabulary=70)
    inputs, settings = (
        (hidden, torch.arange(9), weight, targets[4:]),
        {"implementation": implementation},
    )
    clean, clean_grad = logps_and_grad(token_logps, inputs, settings)
    hidden[5] = torch.nan
    logps, grad = logps_and_grad(token_logps, inputs, settings)
    others = torch.arange(9) != 5
    assert logps[5].isnan()
    assert grad[5].isnan().all()
    assert torch.equal(logps[others], clean[others])
    assert torch.equal(grad[others], clean_grad[others])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("logit_softcap", [None, 4.0])
def test_fused_path_is_right_with_half_operands(half_operands, dtype, logit_softcap):
    inputs, settings, upstream = make_case(dtype, logit_softcap=logit_softcap)
    expected_logps, expected_grad = exact_logps_and_grad(inputs, settings, upstream)
    settings["implementation"] = "fused"
    logps, grad = logps_and_grad(token_logps, inputs, settings, upstream)
    torch.testing.assert_close(logps.double(), expected_logps, atol=1e-5, rtol=0)
    # The interpreter cuts weights off to bfloat16, where cards round: twice the error.
    assert relative_error(grad, expected_grad) <= (2**-8 if dtype == torch.float16 else 2**-7)
    assert torch.equal(token_logps(*inputs, **settings), logps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_fused_path_of_a_row_does_not_depend_on_its_neighbours(half_operands, dtype):
    (hidden, _, weight, targets), _, _ = make_case(dtype)
    settings = {"implementation": "fused"}
    rows = torch.arange(40) % 9
    targets = (torch.arange(40) * 7) % 300
    hidden = hidden[rows] * torch.linspace(0.5, 2, 40)[:, None].to(dtype)
    rows = torch.arange(40)
    logps = token_logps(hidden, rows, weight, targets, **settings)
    for subset in (torch.tensor([39]), torch.arange(39, -1, -2)):
        some = token_logps(hidden, rows[subset], weight, targets[subset], **settings)
        assert torch.equal(some, logps[subset])
    grads, some = (
        pass_grads((hidden, r, weight, targets[r]), "fused") for r in (rows, rows[[39, 3]])
    )
    assert torch.equal(some, grads[[39, 3]])


def test_fused_path_withstands_logits_of_80():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-4, 5, (300, 16), generator=generator).float() / 4
    inputs = (80 * torch.eye(16), torch.arange(16), weight, torch.arange(100, 116))
    logps, grad = logps_and_grad(token_logps, inputs, {"implementation": "fused"})
    expected_logps, expected_grad = exact_logps_and_grad(inputs, {})
    assert expected_logps.min() < -150
    torch.testing.assert_close(logps.double(), expected_logps, atol=1e-5, rtol=2e-7)
    assert relative_error(grad, expected_grad) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_fused_gradient_keeps_its_accuracy_for_confident_tokens(half_operands, dtype):
    """At p_y = 1 - 1e-6 the gradient is a millionth of W_y."""
    generator = torch.Generator().manual_seed(0)
    weight = (0.2 * torch.randn(300, 64, generator=generator)).to(dtype)
    targets = torch.arange(0, 300, 20)
    directions = weight[targets].double()
    hidden = (directions * 24 / directions.square().sum(1, keepdim=True)).to(dtype)
    inputs = (hidden, torch.arange(len(targets)), weight, targets)
    grads = pass_grads(inputs, "fused")
    expected_logps, _ = exact_logps_and_grad(inputs, {})
    assert -1e-5 < expected_logps.median() < 0
    exact_inputs = [t.double() if t.is_floating_point() else t for t in inputs]
    expected = pass_grads(exact_inputs, "torch")
    for row, expected_row in zip(grads, expected, strict=True):
        assert relative_error(row, expected_row) <= (1e-4 if dtype == torch.float32 else 2**-7)


def test_fused_path_sees_a_target_in_the_narrow_last_tile_only():
    """A tile that holds nothing but the target has no maximum."""
    inputs, _, upstream = make_case(torch.float32, vocabulary=129)
    targets = torch.full_like(inputs[3], 128)
    inputs = (*inputs[:3], targets)
    logps, grad = logps_and_grad(token_logps, inputs, {"implementation": "fused"}, upstream)
    expected_logps, expected_grad = exact_logps_and_grad(inputs, {}, upstream)
    torch.testing.assert_close(logps.double(), expected_logps, atol=1e-5, rtol=0)
    assert relative_error(grad, expected_grad) <= 1e-5


def test_fused_path_reads_no_uninitialised_memory(half_operands):
    inputs, settings, upstream = make_case(torch.float16, **VARIANTS["all"])
    settings["implementation"] = "fused"
    expected = logps_and_grad(token_logps, inputs, settings, upstream)
    with poisoned_memory():
        actual = logps_and_grad(token_logps, inputs, settings, upstream)
    assert all_equal(actual, expected)


def test_fused_path_of_no_token_is_empty():
    (hidden, rows, weight, targets), _, _ = make_case(torch.float32)
    logps, grad = logps_and_grad(
        token_logps, (hidden, rows[:0], weight, targets[:0]), {"implementation": "fused"}
    )
    assert logps.shape == (0,)
    assert torch.equal(grad, torch.zeros_like(hidden))


def fold_one_slice(logits, weights, *, with_weights=True, logit_softcap=None):
    """Statistics of rows that hold no target, all of whose logits are in this slice."""
    num_rows, width = logits.shape
    rows = ScoredRows(
        queries=logits,
        targets=torch.full((num_rows,), -1),
        top=torch.full((num_rows,), -1e30),
        rest=torch.zeros(num_rows),
        target_logit=torch.zeros(num_rows),
        values=logits if with_weights else None,
        target_weights=None,
    )
    head_slice = HeadSlice(logits, 0, width, None, 1.0, logit_softcap)
    rescale = token_logps_triton.fold_slice(logits, weights, rows, head_slice)
    return rows.top, rows.rest, rows.target_logit, rescale


@pytest.mark.parametrize("logit_softcap", [None, 4.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_fold_slice_has_the_same_bits_without_weights_and_writes_none(dtype, logit_softcap):
    logits = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    before, weights = logits.clone(), torch.full((3, 64), 7.0, dtype=dtype)
    # fp32 weights take the logits' place, as in `token_logps`.
    unwanted = logits if dtype == torch.float32 else weights.clone()
    without = fold_one_slice(logits, unwanted, with_weights=False, logit_softcap=logit_softcap)
    expected = fold_one_slice(logits, weights, logit_softcap=logit_softcap)
    assert all_equal(without, expected)
    assert torch.equal(unwanted, before if dtype == torch.float32 else torch.full_like(weights, 7))
    assert not (weights == 7).any()


def test_fold_slice_keeps_the_tail_of_float16_weights():
    """With headroom, a token 19 nats below the maximum still weighs something in float16."""
    logits = torch.full((1, 64), -19.0)
    logits[0, 0] = 0.0
    weights = torch.empty(1, 64, dtype=torch.float16)
    top, rest, _, _ = fold_one_slice(logits, weights)
    assert top.item() == -10.0
    torch.testing.assert_close(weights.double().sum(1), rest.double(), rtol=1e-3, atol=0)
    torch.testing.assert_close(weights[0, 1].double().item(), 2.718281828**-9, rtol=1e-3, atol=0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_triton_paths_score_a_sliced_head_as_a_dense_one(implementation):
    (hidden, rows, weight, targets), settings, upstream = make_case(
        torch.float32, **VARIANTS["all"]
    )
    settings["implementation"] = implementation
    inputs = hidden, rows, SlicedHead(weight), targets
    dense = logps_and_grad(token_logps, (hidden, rows, weight, targets), settings, upstream)
    assert all_equal(logps_and_grad(token_logps, inputs, settings, upstream), dense)
    assert torch.equal(token_logps(*inputs, **settings), dense[0])


def test_fused_path_keeps_the_tail_of_float16_weights(half_operands):
    """Tokens 19 nats below the maximum weigh less than float16's smallest number, as e^z."""
    weight = torch.zeros(300, 64, dtype=torch.float16)
    weight[2:, 0] = -19.0
    weight[2:, 1] = 1.0  # so that column 1 of the gradient is the tail's weight alone
    hidden = torch.zeros(1, 64, dtype=torch.float16)
    hidden[0, 0] = 1.0
    inputs = (hidden, torch.tensor([0]), weight, torch.tensor([1]))
    grads = pass_grads(inputs, "fused")
    expected = -0.5 * 298 * 2.718281828**-19
    assert grads[0, 1].item() == pytest.approx(expected, rel=1e-2)

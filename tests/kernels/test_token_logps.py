import logging
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from lowmem_dpo_kernels import token_logps, token_logps_pass, token_logps_path, triton_support
from tests.kernels.helpers import HEAD_VARIANTS as VARIANTS
from tests.kernels.helpers import (
    all_equal,
    exact_logps_and_grad,
    logps_and_grad,
    make_head_case,
    poisoned_memory,
    relative_error,
)

HALF = (torch.float16, torch.bfloat16)
MODULE = sys.modules["lowmem_dpo_kernels.token_logps"]


def make_case(dtype, **changes):
    """Odd sizes."""
    sizes = {"num_rows": 50, "dim": 37, "vocabulary": 4163, "num_tokens": 300}
    return make_head_case(dtype, **(sizes | changes))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [*HALF, torch.float32, torch.float64])
def test_token_logps_and_gradient_match_float64(dtype, variant):
    inputs, settings, upstream = make_case(dtype, **VARIANTS[variant])
    logps, grad = logps_and_grad(token_logps, inputs, settings, upstream)
    expected_logps, expected_grad = exact_logps_and_grad(inputs, settings, upstream)
    logps_atol, grad_rtol = {
        torch.float16: (1e-3, 2**-8),
        torch.bfloat16: (1e-3, 2**-8),
        torch.float32: (1e-5, 1e-5),
        torch.float64: (1e-12, 1e-12),
    }[dtype]
    assert logps.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert grad.dtype == dtype
    assert (logps - expected_logps).abs().max() <= logps_atol
    assert relative_error(grad, expected_grad) <= grad_rtol


@pytest.mark.parametrize("dtype", HALF)
def test_token_logps_is_no_less_accurate_than_rounded_logits(dtype):
    inputs, settings, upstream = make_case(dtype, num_rows=300)

    def rounded(hidden, rows, weight, targets):
        logps = F.log_softmax(F.linear(hidden[rows], weight).float(), -1)
        picked = logps.gather(1, targets.clamp_min(0)[:, None])[:, 0]
        return picked.masked_fill(targets == -100, 0.0)

    expected_logps, expected_grad = exact_logps_and_grad(inputs, settings, upstream)
    ours, peers = (logps_and_grad(f, inputs, {}, upstream) for f in (token_logps, rounded))
    assert (ours[0] - expected_logps).norm() <= (peers[0] - expected_logps).norm()
    assert relative_error(ours[1], expected_grad) <= relative_error(peers[1], expected_grad)


def test_token_logps_passes_gradcheck():
    inputs, settings, _ = make_case(
        torch.float64, num_rows=3, dim=5, vocabulary=70, num_tokens=8, **VARIANTS["all"]
    )
    hidden, *rest = inputs
    assert torch.autograd.gradcheck(
        lambda h: token_logps(h, *rest, **settings), hidden.requires_grad_()
    )


@pytest.mark.parametrize("dim, vocabulary", [(1, 2), (3, 63), (64, 2048), (65, 2049), (100, 3000)])
def test_token_logps_handles_odd_sizes(dim, vocabulary):
    inputs, settings, upstream = make_case(
        torch.float32, dim=dim, vocabulary=vocabulary, num_tokens=31
    )
    logps, grad = logps_and_grad(token_logps, inputs, settings, upstream)
    expected_logps, expected_grad = exact_logps_and_grad(inputs, settings, upstream)
    torch.testing.assert_close(logps.double(), expected_logps, atol=1e-5, rtol=0)
    assert relative_error(grad, expected_grad) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [37, 64])
def test_token_logps_of_a_row_does_not_depend_on_its_neighbours(dtype, dim):
    (hidden, _, weight, targets), settings, _ = make_case(
        dtype, dim=dim, num_rows=300, bias=True, vocabulary=4103
    )
    rows = torch.arange(300)
    logps, grad = logps_and_grad(token_logps, (hidden, rows, weight, targets), settings)
    generator = torch.Generator().manual_seed(1)
    for count in (300, 299, 77, 1):
        subset = torch.randperm(300, generator=generator)[:count]
        some, some_grad = logps_and_grad(
            token_logps, (hidden, rows[subset], weight, targets[subset]), settings
        )
        assert torch.equal(some, logps[subset])
        assert torch.equal(some_grad[subset], grad[subset])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_logps_has_the_same_bits_without_gradient(dtype, variant):
    inputs, settings, upstream = make_case(dtype, **VARIANTS[variant])
    with_gradient, _ = logps_and_grad(token_logps, inputs, settings, upstream)
    without = token_logps(*inputs, **settings)
    with torch.no_grad():
        suppressed = token_logps(inputs[0].requires_grad_(), *inputs[1:], **settings)
    assert torch.equal(without, with_gradient)
    assert torch.equal(suppressed, with_gradient)
    assert not without.requires_grad
    assert not suppressed.requires_grad


def test_token_logps_sums_repeated_rows_in_order():
    (hidden, rows, weight, targets), settings, upstream = make_case(torch.float32, num_rows=9)
    _, grad = logps_and_grad(token_logps, (hidden, rows, weight, targets), settings, upstream)
    _, parts = logps_and_grad(
        token_logps, (hidden[rows], torch.arange(len(rows)), weight, targets), settings, upstream
    )
    expected = torch.zeros_like(hidden)
    for row, part in zip(rows.tolist(), parts, strict=True):
        expected[row] += part
    assert torch.equal(grad, expected)


def test_token_logps_of_no_token_is_empty():
    (hidden, rows, weight, targets), settings, _ = make_case(torch.bfloat16)
    logps, grad = logps_and_grad(token_logps, (hidden, rows[:0], weight, targets[:0]), settings)
    assert logps.shape == (0,)
    assert logps.dtype == torch.float32
    assert torch.equal(grad, torch.zeros_like(hidden))


def test_token_logps_ignores_targets_of_minus_100():
    (hidden, rows, weight, targets), settings, upstream = make_case(torch.float32)
    targets = torch.full_like(targets, -100)
    hidden[3] = torch.nan
    logps, grad = logps_and_grad(token_logps, (hidden, rows, weight, targets), settings, upstream)
    assert torch.equal(logps, torch.zeros(len(targets)))
    assert torch.equal(grad, torch.zeros_like(hidden))


def test_token_logps_withstands_logits_of_80():
    """Hidden rows pick a column of the weight, so that logits are exactly +-80 or in between."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-4, 5, (1500, 16), generator=generator).float() / 4
    inputs = (80 * torch.eye(16), torch.arange(16), weight, torch.arange(100, 116))
    logps, grad = logps_and_grad(token_logps, inputs, {})
    expected_logps, expected_grad = exact_logps_and_grad(inputs, {})
    assert expected_logps.min() < -160
    torch.testing.assert_close(logps.double(), expected_logps, atol=1e-5, rtol=2e-7)
    assert relative_error(grad, expected_grad) <= 1e-5


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
def test_token_logps_gradient_keeps_its_accuracy_for_confident_tokens(dtype):
    """At p_y = 1 - 1e-6 the gradient is a millionth of W_y; p_y - 1 in fp32 would be 6 % off."""
    generator = torch.Generator().manual_seed(0)
    weight = (0.2 * torch.randn(4163, 64, generator=generator)).to(dtype)
    targets = torch.arange(0, 4163, 200)
    directions = weight[targets].double()
    hidden = (directions * 28 / directions.square().sum(1, keepdim=True)).to(dtype)
    inputs = (hidden, torch.arange(len(targets)), weight, targets)
    upstream = torch.full((len(targets),), 2.0**14)  # lifts the gradient into float16's range
    logps, grad = logps_and_grad(token_logps, inputs, {}, upstream)
    expected_logps, expected_grad = exact_logps_and_grad(inputs, {}, upstream)
    assert (-expected_logps).median() < 1e-6
    torch.testing.assert_close(logps.double(), expected_logps, atol=0, rtol=1e-4)
    tolerance = 1e-4 if dtype == torch.float32 else 2**-8
    for row, expected in zip(grad, expected_grad, strict=True):
        assert relative_error(row, expected) <= tolerance


def test_token_logps_keeps_nan_in_its_row():
    (hidden, rows, weight, targets), settings, _ = make_case(torch.float32)
    rows = torch.arange(50)
    targets = targets[1:51].clamp_min(0)
    clean, clean_grad = logps_and_grad(token_logps, (hidden, rows, weight, targets), settings)
    hidden[7] = torch.nan
    logps, grad = logps_and_grad(token_logps, (hidden, rows, weight, targets), settings)
    others = rows != 7
    assert logps[7].isnan()
    assert grad[7].isnan().all()
    assert torch.equal(logps[others], clean[others])
    assert torch.equal(grad[others], clean_grad[others])


@pytest.mark.parametrize("overflows", [True, False])
def test_token_logps_says_once_that_float16_overflowed(caplog, overflows):
    """As it would on a card of compute capability 7.5, which has no bfloat16."""
    (hidden, rows, weight, targets), _, _ = make_case(torch.float16)
    token_logps_pass._warn_overflow.cache_clear()
    if overflows:
        hidden[rows[1]] = torch.tensor(1e5).half()
    with caplog.at_level(logging.WARNING):
        logps = token_logps(hidden, rows, weight, targets)
        token_logps(hidden, rows, weight, targets)
    assert [r.levelname for r in caplog.records] == ["WARNING"] * overflows
    assert logps[(rows == rows[1]) & (targets != -100)].isnan().all() == overflows
    assert logps[rows != rows[1]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_logps_reads_no_uninitialised_memory(dtype):
    inputs, settings, upstream = make_case(dtype, **VARIANTS["all"])
    expected = logps_and_grad(token_logps, inputs, settings, upstream)
    with poisoned_memory():
        actual = logps_and_grad(token_logps, inputs, settings, upstream)
    assert all_equal(actual, expected)


def test_token_logps_leaves_its_inputs_alone():
    inputs, settings, upstream = make_case(torch.float32, **VARIANTS["all"])
    before = [t.clone() for t in (*inputs, settings["bias"])]
    logps_and_grad(token_logps, inputs, settings, upstream)
    assert all_equal((*inputs, settings["bias"]), before)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"logit_softcap": 0.0}, "logit_softcap must be > 0, got 0.0"),
        (
            {"implementation": "cuda"},
            "implementation must be auto, torch, triton or fused, got 'cuda'",
        ),
        ({"implementation": "triton"}, "implementation triton needs CUDA, got cpu"),
    ],
)
def test_token_logps_refuses_settings_that_cannot_be(settings, message):
    inputs, _, _ = make_case(torch.float32)
    with pytest.raises(ValueError, match=message) as error:
        token_logps(*inputs, **settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "capability, path",
    [((7, 5), "torch"), ((8, 0), "triton"), ((8, 7), "triton"), ((12, 1), "triton")],
)
def test_token_logps_path_knows_cards(monkeypatch, capability, path):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(triton_support, "triton_problem", lambda: None)
    assert token_logps_path("cuda").startswith(f"{path}, ")
    assert token_logps_path("cuda", "fused").startswith("fused, ")


def test_resolve_implementation_refuses_a_card_without_triton_products(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(MODULE, "triton_problem", lambda: None)
    assert MODULE.resolve_implementation("torch", torch.device("cuda")) == "torch"
    with pytest.raises(ValueError, match=r"fused needs compute capability 8.0, got \(7, 5\)"):
        MODULE.resolve_implementation("fused", torch.device("cuda"))


def test_token_logps_path_names_what_runs_on_the_cpu():
    assert token_logps_path("cpu") == "torch, blocks of 256 rows, slices of 2048 tokens"


def test_token_logps_logs_its_path_once(caplog):
    inputs, _, _ = make_case(torch.float32)
    MODULE._log_path.cache_clear()
    with caplog.at_level(logging.INFO):
        token_logps(*inputs)
        token_logps(*inputs)
    assert [r.message for r in caplog.records] == ["token_logps on cpu takes the torch path"]


MEASURE_PEAK = """
import resource, sys
import torch
from lowmem_dpo_kernels import token_logps
with_gradient = sys.argv[1] == "True"
torch.set_num_threads(1)
weight = torch.empty(128256, 64).normal_()
def step(num_tokens, weight):
    hidden = torch.randn(num_tokens, 64, requires_grad=with_gradient)
    targets = torch.randint(len(weight), (num_tokens,))
    logps = token_logps(hidden, torch.arange(num_tokens), weight, targets)
    if with_gradient:
        logps.sum().backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = step(8, weight[:2048])
print((step(1024, weight) - before) / 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
@pytest.mark.parametrize("with_gradient", [True, False])
def test_token_logps_needs_less_than_16_mib_for_128k_tokens(request, with_gradient):
    """The logits alone would take 501 MiB, a copy of the head 31."""
    kernels = request.config.rootpath / "kernels"
    run = subprocess.run(
        [sys.executable, "-c", MEASURE_PEAK, str(with_gradient)],
        cwd=kernels,
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(run.stdout) < 16


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["torch", "triton", "fused"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
def test_token_logps_on_cuda_matches_float64_and_itself(dtype, variant, implementation):
    inputs, settings, upstream = make_case(dtype, vocabulary=20000, **VARIANTS[variant])
    expected_logps, expected_grad = exact_logps_and_grad(inputs, settings, upstream)
    inputs = [t.cuda() for t in inputs]
    settings = {k: v.cuda() if torch.is_tensor(v) else v for k, v in settings.items()}
    settings["implementation"] = implementation
    logps, grad = logps_and_grad(token_logps, inputs, settings, upstream.cuda())
    again, grad_again = logps_and_grad(token_logps, inputs, settings, upstream.cuda())
    assert torch.equal(logps, again)
    assert torch.equal(grad, grad_again)
    assert torch.equal(logps, token_logps(*inputs, **settings))
    assert (logps.cpu() - expected_logps).abs().max() <= (1e-5 if dtype == torch.float32 else 1e-3)
    tolerance = 1e-5 if dtype == torch.float32 else 2**-8
    assert relative_error(grad.cpu(), expected_grad) <= tolerance

from pathlib import Path

import pytest
import torch

from lowmem_dpo_kernels import TreePlan, tree_attention, tree_attention_path, triton_support, twins
from lowmem_dpo_kernels.tree_attention import check_attention_inputs
from tests.interpreter import assert_passes_in_the_interpreter

LAYOUT = [(0, 5, 3, 4), (12, 1, 0, 2), (15, 4, 0, 0)]
CPU = torch.device("cpu")


def rows_of(table):
    return {tuple(row) for row in table.tolist()}


def test_query_tiles_are_cut_from_the_first_row_of_each_segment():
    plan = TreePlan(LAYOUT, 24)
    assert rows_of(plan.query_tiles(4, CPU)) == {
        # row, queries, position, prefix row, prefix length, own row, own position, own length
        (0, 4, 0, 0, 0, 0, 0, 4),
        (4, 4, 4, 0, 0, 0, 0, 8),
        (8, 4, 5, 0, 5, 8, 5, 4),
        (12, 1, 0, 12, 0, 12, 0, 1),
        (13, 2, 1, 12, 1, 13, 1, 2),
        (15, 4, 0, 15, 0, 15, 0, 4),
        (19, 4, 0, 19, 0, 19, 0, 0),
        (23, 1, 0, 23, 0, 23, 0, 0),
    }


def test_key_tiles_name_the_queries_that_see_them():
    plan = TreePlan(LAYOUT, 20)
    assert rows_of(plan.key_tiles(4, CPU)) == {
        # row, keys, position, own queries, rejected's row, rejected's queries, trunk
        (0, 4, 0, 8, 8, 4, 5),
        (4, 4, 4, 4, 8, 4, 5),
        (8, 4, 5, 4, 8, 0, 5),
        (12, 1, 0, 1, 13, 2, 1),
        (13, 2, 1, 2, 13, 0, 1),
        (15, 4, 0, 4, 19, 0, 4),
        (19, 1, 0, 0, 19, 0, 0),
    }


@pytest.mark.parametrize("kind", ["query_tiles", "key_tiles"])
@pytest.mark.parametrize("size", [1, 3, 16, 64])
def test_tiles_hold_every_row_once_the_longest_work_first(kind, size):
    table = getattr(TreePlan(LAYOUT, 24), kind)(size, CPU)
    rows = [row + i for row, count, *_ in table.tolist() for i in range(count)]
    assert sorted(rows) == list(range(24))
    assert table.dtype == torch.int32
    assert int(table[:, 1].max()) <= size
    work = table[:, 4] + table[:, 7] if kind == "query_tiles" else table[:, 3] + table[:, 5]
    assert torch.equal(work, work.sort(descending=True).values)


def test_tiles_are_made_once():
    plan = TreePlan(LAYOUT, 24)
    assert plan.query_tiles(4, CPU) is plan.query_tiles(4, CPU)
    assert plan.query_tiles(4, CPU) is not plan.query_tiles(8, CPU)


@pytest.mark.parametrize(
    "layout, num_tokens, message",
    [
        ([(1, 2, 3, 4)], 24, r"must lie end to end, got \(1, 2, 3, 4\) where row 0 comes next"),
        ([(0, 2, 3, 4), (8, 1, 1, 1)], 24, "row 9 comes next"),
        ([(0, 2, -1, 4)], 24, "must lie end to end"),
        (LAYOUT, 18, "have 19 tokens, the pack 18"),
    ],
)
def test_tree_plan_refuses_trees_that_overlap_or_do_not_fit(layout, num_tokens, message):
    with pytest.raises(ValueError, match=message):
        TreePlan(layout, num_tokens)


def inputs():
    return {
        "query": torch.zeros(4, 6, 8),
        "key": torch.zeros(2, 6, 8),
        "value": torch.zeros(2, 6, 8),
        "num_tokens": 6,
        "sliding_window": None,
        "softcap": None,
    }


def test_check_attention_inputs_accepts_what_fits():
    check_attention_inputs(**inputs())
    view = torch.zeros(6, 4 * 8).view(6, 4, 8).transpose(0, 1)
    check_attention_inputs(**inputs() | {"query": view, "sliding_window": 1, "softcap": 0.5})


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("query", torch.zeros(1, 4, 6, 8), r"query must be \[H, N, E\]"),
        ("query", torch.zeros(3, 6, 8), "K a divisor of H"),
        ("query", torch.zeros(4, 5, 8), r"got \[4, 5, 8\], \[2, 6, 8\]"),
        ("value", torch.zeros(2, 6, 4), r"key and value \[K, N, E\]"),
        ("num_tokens", 7, "a plan of 7 tokens"),
        ("key", torch.zeros(2, 6, 8).half(), "key must be torch.float32 on cpu.*float16"),
        (
            "value",
            torch.zeros(2, 6, 8, device="meta"),
            "value must be .* got torch.float32 on meta",
        ),
        ("key", torch.zeros(2, 8, 6).transpose(1, 2), "unit stride in its last dimension, got 6"),
        ("sliding_window", 0, "sliding_window must be at least 1, got 0"),
        ("softcap", -1.0, "softcap must be > 0, got -1.0"),
    ],
)
def test_check_attention_inputs_refuses_what_does_not_fit(name, value, message):
    with pytest.raises(ValueError, match=message) as error:
        check_attention_inputs(**inputs() | {name: value})
    assert "\n" not in str(error.value)


def test_tree_attention_refuses_a_device_without_the_kernels():
    assert tree_attention_path("cpu", torch.bfloat16, 64) == ""
    x = torch.zeros(1, 20, 8)
    with pytest.raises(ValueError, match=r"needs Triton, CUDA .* got torch.float32 on cpu, E = 8"):
        tree_attention(x, x, x, TreePlan(LAYOUT, 20), scale=1.0)


@pytest.mark.parametrize(
    "capability, dtype, head_size, runs",
    [
        ((8, 0), torch.bfloat16, 64, True),
        ((12, 0), torch.float16, 256, True),
        ((7, 5), torch.float16, 64, False),
        ((8, 0), torch.float32, 64, False),
        ((8, 0), torch.bfloat16, 257, False),
    ],
)
def test_tree_attention_path_tells_what_runs_on_a_card(
    monkeypatch, capability, dtype, head_size, runs
):
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(triton_support, "triton_problem", lambda: None)
    path = tree_attention_path("cuda", dtype, head_size)
    assert path.startswith("triton, tiles ") if runs else path == ""


def test_tree_attention_path_is_none_where_triton_cannot_compile(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(triton_support, "triton_problem", lambda: "no compiler")
    assert tree_attention_path("cuda", torch.bfloat16, 64) == ""


@pytest.mark.parametrize("settings", [{}, {"sliding_window": 3}, {"softcap": 2.0}], ids=str)
def test_twin_of_tree_attention_equals_plain_sequences(settings):
    """Each branch with its own copy of the trunk, in float64, one query at a time."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(h, 20, 8, dtype=torch.float64) for h in (4, 2, 2))
    out = twins.tree_attention(query, key, value, LAYOUT, scale=0.3, **settings)
    assert out.shape == (20, 4, 8) and not out[19:].any()
    for start, trunk, chosen, rejected in LAYOUT:
        for branch, length in ((trunk, chosen), (trunk + chosen, rejected)):
            rows = [*range(start, start + trunk), *range(start + branch, start + branch + length)]
            for i, row in enumerate(rows):
                seen = rows[max(0, i + 1 - settings.get("sliding_window", 20)) : i + 1]
                for head in range(4):
                    scores = 0.3 * key[head // 2, seen] @ query[head, row]
                    if "softcap" in settings:
                        scores = 2.0 * (scores / 2.0).tanh()
                    expected = scores.softmax(0) @ value[head // 2, seen]
                    torch.testing.assert_close(out[row, head], expected)


CASES = Path(__file__).with_name("interpreted_tree_attention.py")


def test_tree_attention_matches_float64_in_the_interpreter():
    """Every setting alone, on one pack; the other cases are slow."""
    pytest.importorskip("triton", reason="Triton is not installed")
    name = "test_tree_attention_matches_float64_with_one_setting_alone"
    assert_passes_in_the_interpreter(Path(f"{CASES}::{name}"))


@pytest.mark.slow
def test_tree_attention_is_right_in_the_interpreter():
    pytest.importorskip("triton", reason="Triton is not installed")
    assert_passes_in_the_interpreter(CASES)


CUDA_CASES = [
    (32, 8, 128, {}),
    (8, 4, 256, {"sliding_window": 100, "softcap": 50.0}),
    (14, 2, 64, {"softcap": 30.0}),
    (4, 4, 80, {"sliding_window": 33}),
]


@pytest.mark.gpu
@pytest.mark.parametrize("heads, key_heads, size, settings", CUDA_CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tree_attention_on_cuda_matches_float64_and_repeats_to_the_bit(
    dtype, heads, key_heads, size, settings
):
    layout = [(0, 150, 93, 200), (443, 1, 70, 5), (519, 300, 0, 64), (883, 64, 64, 64)]
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(1152, h, size, device="cuda", dtype=dtype).transpose(0, 1).requires_grad_()
        for h in (heads, key_heads, key_heads)
    )
    upstream = torch.randn(1152, heads, size, device="cuda", dtype=dtype)

    def run(function, tensors, where, upstream):
        out = function(*tensors, where, scale=size**-0.5, **settings)
        return out.detach(), *torch.autograd.grad(out, tensors, upstream)

    tensors = (query, key, value)
    found = run(tree_attention, tensors, TreePlan(layout, 1152), upstream)
    again = run(tree_attention, tensors, TreePlan(layout, 1152), upstream)
    exact = tuple(x.detach().double().requires_grad_() for x in tensors)
    expected = run(twins.tree_attention, exact, layout, upstream.double())
    for one, same, other in zip(found, again, expected, strict=True):
        assert torch.equal(one, same)
        assert (one.double() - other).norm() <= 2**-7 * other.norm()
    tail = TreePlan([(0, 300, 0, 64)], 364)
    alone = run(
        tree_attention,
        tuple(x.detach()[:, 519:883].requires_grad_() for x in tensors),
        tail,
        upstream[519:883],
    )
    assert torch.equal(alone[0], found[0][519:883])
    for one, other in zip(alone[1:], found[1:], strict=True):
        assert torch.equal(one, other[:, 519:883])


@pytest.mark.parametrize("window", [None, 1, 5, 100])
def test_num_pairs_counts_what_queries_see(window):
    seen = twins._visible(LAYOUT, 24, window)
    assert TreePlan(LAYOUT, 24).num_pairs(window) == int(seen.sum())

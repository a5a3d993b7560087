import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig
from transformers.masking_utils import create_causal_mask

from lowmem_dpo.model import attention
from lowmem_dpo.model.attention import (
    TREE_ATTENTION_BY_TORCH,
    Variant,
    attention_path,
    segment_attention,
    tree_attention,
)
from tests.interpreter import assert_passes_in_the_interpreter
from tests.kernels.helpers import import_benchmark

HEADS, KEY_HEADS, SIZE = 4, 2, 16


def plain_attention(q, k, v, scaling, sliding_window=None, softcap=None):
    """One sequence, or its last queries, with one dense mask: [H, L, E]."""
    k, v = k.repeat_interleave(HEADS // KEY_HEADS, 0), v.repeat_interleave(HEADS // KEY_HEADS, 0)
    scores = q @ k.transpose(1, 2) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    before = k.shape[1] - q.shape[1]
    seen = torch.ones(scores.shape[1:], dtype=torch.bool).tril(before)
    if sliding_window is not None:
        seen = seen.triu(before - sliding_window + 1)
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v


def tree_by_tree(q, k, v, layout, scaling, **rule):
    """Each branch with its own copy of the trunk, written into the places the pack has."""
    output = torch.zeros(q.shape, dtype=q.dtype)
    for start, trunk, chosen, rejected in layout:
        stem = list(range(start, start + trunk))
        for begin, length in ((trunk, chosen), (trunk + chosen, rejected)):
            places = stem + list(range(start + begin, start + begin + length))
            output = output.index_copy(
                1,
                torch.tensor(places, dtype=torch.long),
                plain_attention(*(x[:, places] for x in (q, k, v)), scaling, **rule),
            )
    return output


LAYOUTS = [
    [(0, 5, 3, 4)],
    [(0, 1, 7, 2), (10, 6, 1, 9), (26, 3, 3, 3)],
    [(0, 4, 0, 5), (9, 4, 5, 0)],
    [(0, 0, 3, 4)],
]


RULES = [
    {},
    {"sliding_window": 4},
    {"softcap": 0.7},
    {"sliding_window": 4, "softcap": 0.7},
    {"sliding_window": 1},
    {"sliding_window": 100},
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["one", "three", "empty-branches", "no-trunk"])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_tree_attention_equals_plain_sequences_in_value_and_gradient(layout, rule):
    torch.manual_seed(0)
    num_tokens = 40
    q, k, v = (
        torch.randn(heads, num_tokens, SIZE, dtype=torch.float64, requires_grad=True)
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    )
    upstream = torch.randn(HEADS, num_tokens, SIZE, dtype=torch.float64)
    output, weights = tree_attention(
        torch.nn.Module(), q[None], k[None], v[None], None, scaling=0.3, tree_layout=layout, **rule
    )
    packed = output[0].transpose(0, 1)
    expected = tree_by_tree(q, k, v, layout, 0.3, **rule)
    assert weights is None
    torch.testing.assert_close(packed, expected)
    grads = torch.autograd.grad((packed * upstream).sum(), [q, k, v])
    wanted = torch.autograd.grad((expected * upstream).sum(), [q, k, v])
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want)


def test_tree_attention_within_the_window_gives_the_bits_of_no_window():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, h, 20, SIZE) for h in (HEADS, KEY_HEADS, KEY_HEADS))
    settings = {"scaling": 0.3, "tree_layout": [(0, 9, 6, 5)]}
    plain, _ = tree_attention(torch.nn.Module(), q, k, v, None, **settings)
    for window, same in ((15, True), (14, False)):
        within, _ = tree_attention(
            torch.nn.Module(), q, k, v, None, **settings, sliding_window=window
        )
        assert torch.equal(within, plain) == same


@pytest.mark.parametrize("rule", [{}, {"sliding_window": 4, "softcap": 0.7}], ids=str)
def test_tree_attention_gives_a_tree_the_same_bits_in_any_pack(rule):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, h, 64, SIZE) for h in (HEADS, KEY_HEADS, KEY_HEADS))
    alone, _ = tree_attention(
        torch.nn.Module(), q, k, v, None, scaling=0.3, tree_layout=[(0, 9, 6, 5)], **rule
    )
    q2, k2, v2 = (torch.cat([torch.randn_like(x[:, :, :20]), x], dim=2) for x in (q, k, v))
    beside, _ = tree_attention(
        torch.nn.Module(),
        q2,
        k2,
        v2,
        None,
        scaling=0.3,
        tree_layout=[(0, 3, 8, 9), (20, 9, 6, 5)],
        **rule,
    )
    assert torch.equal(alone[:, :20], beside[:, 20:40])


def test_tree_attention_leaves_zeros_behind_the_last_tree():
    x = torch.randn(1, 2, 12, SIZE)
    output, _ = tree_attention(
        torch.nn.Module(), x, x, x, None, scaling=1.0, tree_layout=[(0, 2, 2, 2)]
    )
    assert output.shape == (1, 12, 2, SIZE) and not output[:, 6:].any() and output[:, :6].all()


def test_tree_attention_refuses_to_run_without_a_layout():
    x = torch.randn(1, 2, 4, SIZE)
    with pytest.raises(ValueError, match="no tree_layout"):
        tree_attention(torch.nn.Module(), x, x, x, None, scaling=1.0)


def test_transformers_builds_no_mask_for_tree_attention():
    embeddings = torch.zeros(1, 6, 64)
    masks = []
    for implementation in ("lowmem_dpo_tree", "eager"):
        config = LlamaConfig(hidden_size=64, attn_implementation=implementation)
        masks.append(
            create_causal_mask(
                config=config, inputs_embeds=embeddings, attention_mask=None, past_key_values=None
            )
        )
    assert masks[0] is None and masks[1] is not None


def test_attention_path_names_the_kernel_and_its_tiles_where_it_runs(monkeypatch):
    asked = []

    def path(*arguments):
        asked.append(arguments)
        return "triton, tiles 1x2"

    config = LlamaConfig(hidden_size=64, num_attention_heads=4)
    device = torch.device("cpu")
    assert attention_path(config, device, torch.float16) == "lowmem_dpo_tree"
    monkeypatch.setattr(attention, "tree_attention_path", path)
    monkeypatch.setattr(attention, "_kernels_agree", lambda *arguments: True)
    found = attention_path(config, device, torch.float16)
    assert found == "lowmem_dpo_tree, triton, tiles 1x2"
    config.head_dim = 32
    attention_path(config, device, torch.float16)
    assert asked == [(device, torch.float16, 16), (device, torch.float16, 32)]


@pytest.fixture
def trial(monkeypatch):
    """Run the trial of some kernels on a CPU; gives the path that is taken then."""

    def take(kernel, *, window=False, softcap=False):
        monkeypatch.setattr(attention, "_by_kernel", kernel)
        monkeypatch.setattr(attention, "tree_attention_path", lambda *arguments: "triton")
        variant = Variant(6, 2, 24, window, softcap)
        return attention._kernel_path(torch.device("cpu"), torch.float32, variant)

    attention._kernels_agree.cache_clear()
    yield take
    attention._kernels_agree.cache_clear()


@pytest.mark.parametrize("fault", ["", "values", "gradients", "crash"])
def test_kernels_that_fail_their_trial_are_not_used(fault, trial, capsys):
    def kernel(query, key, value, tree_layout, rule):
        assert query.shape[1::2] == (6, 24) and key.shape[1] == 2
        assert query.stride(2) == 6 * 24  # seen as projections are
        if fault == "crash":
            raise RuntimeError("no kernel image\nfor this card")
        if fault == "gradients":  # of trunk keys: rejected's part is missing
            key = key + 0.2 * (key.detach() - key)
        output = segment_attention(query, key, value, tree_layout, rule)
        return output * 1.03 if fault == "values" else output

    assert trial(kernel) == ("" if fault else "triton")
    assert ("PyTorch's attention is used" in capsys.readouterr().out) == bool(fault)


@pytest.mark.parametrize("softcap", [False, True])
def test_the_variants_of_a_model_are_tried_and_no_others(softcap, trial):
    tried = set()

    def kernel(query, key, value, tree_layout, rule):
        tried.add((rule.sliding_window is not None, rule.softcap is not None))
        output = segment_attention(query, key, value, tree_layout, rule)
        return output if rule.sliding_window is None else output * 1.03

    assert trial(kernel, softcap=softcap) == "triton"
    assert tried == {(False, softcap)}
    assert trial(kernel, window=True, softcap=softcap) == ""  # wrong with a window alone
    assert tried == {(False, softcap), (True, softcap)}


def test_attention_path_tells_kernels_that_serve_some_layers_only(monkeypatch):
    monkeypatch.setattr(attention, "tree_attention_path", lambda *arguments: "triton")
    monkeypatch.setattr(attention, "_kernels_agree", lambda *case: not case[2].has_window)
    device = torch.device("cpu")
    config = LlamaConfig(hidden_size=64, num_attention_heads=4)
    assert attention_path(config, device, torch.float16) == "lowmem_dpo_tree, triton"
    config.sliding_window = 8
    assert attention_path(config, device, torch.float16) == "lowmem_dpo_tree, triton, torch"
    config._attn_implementation = TREE_ATTENTION_BY_TORCH
    assert attention_path(config, device, torch.float16) == "lowmem_dpo_tree"


@pytest.mark.slow
@pytest.mark.parametrize("window, expected", [(False, 3), (True, 6)])
def test_the_trial_compiles_what_the_model_runs(window, expected, monkeypatch):
    """On a card that is not there: the layer's launches take the trial's compiled objects."""
    pytest.importorskip("triton", reason="Triton is not installed")
    module = importlib.import_module("lowmem_dpo_kernels.tree_attention")
    monkeypatch.setattr(module, "tree_attention_path", lambda *_: "triton")
    monkeypatch.setattr(attention, "check_error", lambda *_: None)
    device, dtype = torch.device("cpu"), torch.bfloat16
    variant = Variant(8, 2, 64, window, False)
    with import_benchmark("_ahead_of_time").compiling_for((8, 6)) as launches:
        attention._try_kernels(device, dtype, variant)
        tried = {id(launch.code) for launch in launches}
        launches.clear()
        query, key, value = (
            torch.zeros(1, 192, heads, 64, dtype=dtype, requires_grad=True) for heads in (8, 2, 2)
        )
        kind = attention.AttentionKind(0.125, 100 if window else None, None)
        views = (x.transpose(1, 2) for x in (query, key, value))
        attention._by_kernel(*views, ((0, 90, 40, 30),), kind).sum().backward()
    assert len(tried) == expected
    assert len(launches) == 3 and {id(launch.code) for launch in launches} <= tried


def test_a_full_card_does_not_change_the_path(trial):
    def greedy(*arguments):
        raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError):
        trial(greedy)
    assert trial(segment_attention) == "triton"


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Triton is not installed")
def test_models_with_the_kernels_equal_the_portable_path_in_the_interpreter():
    assert_passes_in_the_interpreter(Path(__file__).with_name("interpreted_attention.py"))

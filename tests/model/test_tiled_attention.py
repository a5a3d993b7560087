import pytest
import torch

from lowmem_dpo.model import tiled_attention as tiled
from lowmem_dpo.model.tiled_attention import tiled_attention
from tests.model.test_attention import HEADS, KEY_HEADS, SIZE, plain_attention

NUM_KEYS = 23


def inputs(num_queries=NUM_KEYS, num_keys=NUM_KEYS, dtype=torch.float64):
    torch.manual_seed(0)
    return [
        torch.randn(1, heads, length, SIZE, dtype=dtype, requires_grad=True)
        for heads, length in ((HEADS, num_queries), (KEY_HEADS, num_keys), (KEY_HEADS, num_keys))
    ]


@pytest.mark.parametrize("window", [None, 1, 6, NUM_KEYS])
@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("num_queries", [1, 10, NUM_KEYS])
def test_tiled_attention_equals_one_dense_mask_in_value_and_gradient(
    monkeypatch, window, softcap, num_queries
):
    monkeypatch.setattr(tiled, "_TILE_ROWS", 4)
    q, k, v = inputs(num_queries)
    output = tiled_attention(q, k, v, scaling=0.3, window=window, softcap=softcap)
    expected = plain_attention(q[0], k[0], v[0], 0.3, window, softcap)[None]
    torch.testing.assert_close(output, expected)
    upstream = torch.randn_like(output)
    grads = torch.autograd.grad((output * upstream).sum(), [q, k, v])
    wanted = torch.autograd.grad((expected * upstream).sum(), [q, k, v])
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tiled_attention_computes_in_fp32_and_answers_in_the_type_of_its_inputs(dtype):
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in inputs(dtype=torch.float32))
    output = tiled_attention(q, k, v, scaling=0.3, window=6, softcap=0.7)
    exact = plain_attention(*(x[0].double() for x in (q, k, v)), 0.3, 6, 0.7)[None]
    assert torch.equal(output, exact.to(dtype)) or (output - exact).abs().max() < 0.01
    grads = torch.autograd.grad(output.float().square().sum(), [q, k, v])
    wanted = torch.autograd.grad(exact.square().sum(), [q, k, v])
    for grad, want in zip(grads, wanted, strict=True):
        assert grad.dtype == dtype
        assert (grad - want).norm() < 0.01 * want.norm()


def test_tiled_attention_keeps_its_inputs_alone_for_the_backward_pass():
    q, k, v = inputs()
    kept = []

    def keep(tensor):
        kept.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        tiled_attention(q, k, v, scaling=0.3, softcap=0.7)
    assert kept == [x.data_ptr() for x in (q, k, v)]


@pytest.mark.parametrize("window", [None, 1024])
@pytest.mark.parametrize("num_heads", [8, 64])
def test_tiles_cover_every_query_once_within_the_bound_of_scores(window, num_heads):
    num_queries, num_keys = 5_000, 8_000
    segment = tiled._Segment(num_keys - num_queries, 1.0, window, None)
    end = 0
    for rows, keys in segment.tiles(num_queries, num_keys, num_heads):
        assert rows.start == end and rows.stop > end
        end = rows.stop
        assert keys.stop == num_keys - num_queries + rows.stop
        first = 0 if window is None else num_keys - num_queries + rows.start - window + 1
        assert keys.start == first
        num_scores = num_heads * (rows.stop - rows.start) * (keys.stop - keys.start)
        assert num_scores <= tiled._TILE_SCORES
    assert end == num_queries

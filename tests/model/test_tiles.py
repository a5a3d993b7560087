import pytest
import torch
from lowmem_dpo.model.second_run import output_unread
from lowmem_dpo.model.tiles import TokenTiles
from torch import nn

from lowmem_dpo.model.lora import LoraLinear, dropout_live

WIDTH = 64


def make_tiles(tile_rows, dropout=0.0):
    torch.manual_seed(0)
    linears = []
    for name in ("up_proj", "down_proj"):
        weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 8, requires_grad=False)
        linears.append(LoraLinear(name, weight))
        linears[-1].add_adapter(4, scaling=0.5, dropout=dropout, seed=0)
        nn.init.normal_(linears[-1].lora_b)
    return TokenTiles(
        linears[0],
        nn.Tanh(),
        linears[1],
        last=linears[1],
        has_randomness=dropout > 0,
        tile_rows=tile_rows,
    )


def inputs(num_rows):
    return torch.randn(1, num_rows, WIDTH, generator=torch.Generator().manual_seed(2))


def gradients(tiles, function, num_rows=20):
    torch.manual_seed(5)
    x = inputs(num_rows).requires_grad_()
    out = function(x)
    (out * inputs(num_rows + 1)[:, 1:]).sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in tiles.parameters() if p.requires_grad)]


@pytest.mark.parametrize("num_rows", [1, 7, 8, 20])
def test_token_tiles_give_the_plain_output_and_gradients(num_rows):
    tiles = make_tiles(7)
    want = gradients(tiles, tiles.inner, num_rows)
    tiles.zero_grad()
    for got, plain in zip(gradients(tiles, tiles, num_rows), want, strict=True):
        torch.testing.assert_close(got, plain, atol=1e-5, rtol=1e-5)


def test_token_tiles_repeat_their_dropout():
    """`run` under autograd draws the same masks and differentiates them as they are."""
    results = []
    for again in (False, True):
        tiles = make_tiles(7, dropout=0.5)
        with dropout_live(tiles):
            results.append(gradients(tiles, tiles if again else tiles.run))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    tiles.has_randomness = False
    with dropout_live(tiles):
        assert not torch.allclose(gradients(tiles, tiles)[1], results[0][1])


def test_token_tiles_have_one_shape_and_cover_every_row():
    tiles = make_tiles(2048)
    for num_rows in (1, 2047, 2048, 2049, 4097, 8192):
        slices = tiles.tiles(num_rows)
        assert [i for s in slices for i in range(num_rows)[s]] == list(range(num_rows))
        heights = [s.stop - s.start for s in slices]
        assert len(set(heights[:-1])) <= 1 and heights[-1] <= heights[0] <= 2048
        assert len(slices) == -(-num_rows // 2048)


def test_rows_have_the_same_bits_in_any_tile():
    tiles, x = make_tiles(64), inputs(150)
    order = torch.randperm(150, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(tiles(x[:, order]), tiles(x)[:, order])


def test_gradient_and_no_gradient_give_the_same_bits():
    tiles, x = make_tiles(64), inputs(150)
    with torch.no_grad():
        want = tiles(x)
    assert torch.equal(tiles(x.requires_grad_()), want)


def test_an_output_that_is_not_read_is_nan_and_its_gradient_is_right():
    tiles = make_tiles(7)
    want = gradients(tiles, tiles)
    tiles.zero_grad()
    with output_unread(tiles):
        x = inputs(20).requires_grad_()
        out = tiles(x)
    out.backward(inputs(21)[:, 1:])
    assert out.isnan().all()
    assert tiles.output_is_read
    parameters = [p.grad for p in tiles.parameters() if p.requires_grad]
    for got, plain in zip([x.grad, *parameters], want[1:], strict=True):
        assert torch.equal(got, plain)


def test_token_tiles_hold_one_tile_at_a_time():
    """What is kept between the passes is the input; inside, no tensor has more rows than a tile."""
    tiles, heights = make_tiles(8), []
    tiles.inner[1].register_forward_hook(lambda module, args, out: heights.append(out.shape[1]))
    kept = []
    x = inputs(30).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = tiles(x)
    assert [t.data_ptr() for t in kept] == [x.data_ptr()]
    out.sum().backward()
    assert heights == [8] * 8

"""The token-wise half of a decoder layer, one tile of tokens at a time.

From attention to the end of a layer every token is for itself: norm, MLP, norm. So this half runs
tile by tile, and again tile by tile in the backward pass: what an MLP makes of all tokens, four
times the intermediate size and as much again in gradients, is alive for one tile only. What waits
is the half's input.

It runs no more often than before. The layer runner's second run needs the inside of the attention
half, and of this half nothing: its output would only be added to the residual, whose gradient needs
no value. So there the half is left out, NaN stands for its output, and the last product of a tile
that is run for its gradient is left out too where nothing follows it.

All tiles have one shape, the last one padded, so that a token's bits do not depend on its place.

Shapes: N packed tokens, D hidden, T rows of a tile.
"""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from lowmem_dpo.model.lora import LoraLinear
from lowmem_dpo.model.second_run import output_unread, random_state, restored, unread

TILE_ROWS = 2048
"""Most rows of a tile. A tile's weights are dequantised for it: 5 to 10 % of its products' time."""


class TokenTiles(nn.Module):
    """Token-wise modules, run tile by tile.

    Args:
        *modules: Applied one after the other, each [1, N, D] to [1, N, D].
        last: The linear whose output is that of the last module, or None.
        has_randomness: Save the state of the random generators, so that dropout can be repeated.
        tile_rows: Most rows of a tile.

    Attributes:
        output_is_read: Whether the caller looks at the output's values; see `output_unread`.
    """

    def __init__(
        self,
        *modules: nn.Module,
        last: LoraLinear | None,
        has_randomness: bool,
        tile_rows: int = TILE_ROWS,
    ) -> None:
        super().__init__()
        self.inner = nn.Sequential(*modules)
        self.find_last = lambda: last  # a second path to the module would be a second name for it
        self.has_randomness = has_randomness
        self.tile_rows = tile_rows
        self.output_is_read = True

    def forward(self, x: Tensor) -> Tensor:
        """Map [1, N, D] to [1, N, D]."""
        if torch.is_grad_enabled() and x.requires_grad:
            return _RunTiles.apply(x, self)
        return self.run(x)

    def run(self, x: Tensor) -> Tensor:
        """The output, without gradient."""
        tiles = self.tiles(x.shape[1])
        if len(tiles) == 1:
            return self.inner(x)
        out = torch.empty_like(x)
        for tile in tiles:
            part = out[:, tile]
            part.copy_(self.inner(_padded(x[:, tile], tiles[0].stop))[:, : part.shape[1]])
        return out

    def tiles(self, num_rows: int) -> list[slice]:
        """As few as there can be, of one height but for the last."""
        num_tiles = max(1, -(-num_rows // self.tile_rows))
        height = -(-num_rows // num_tiles)
        return [slice(i, min(i + height, num_rows)) for i in range(0, num_rows, height or 1)]


class _RunTiles(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, module: TokenTiles) -> Tensor:
        ctx.module = module
        ctx.random_state = random_state(x.device) if module.has_randomness else None
        ctx.save_for_backward(x)
        return module.run(x) if module.output_is_read else unread(x, *x.shape)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, None]:
        (x,) = ctx.saved_tensors
        module: TokenTiles = ctx.module
        tiles = module.tiles(x.shape[1])
        grad_x = torch.empty_like(x) if len(tiles) > 1 else None
        state = ctx.random_state
        with restored(state, x.device) if state else nullcontext():
            for tile in tiles:
                part = _padded(x[:, tile].detach(), tiles[0].stop).requires_grad_()
                with torch.enable_grad(), output_unread(module.find_last()):
                    out = module.inner(part)
                edge = get_gradient_edge(out)
                del out  # only its place in the graph is needed
                torch.autograd.backward(edge, _padded(grad_out[:, tile], tiles[0].stop))
                if grad_x is None or part.grad is None:
                    return part.grad, None
                rows = grad_x[:, tile]
                rows.copy_(part.grad[:, : rows.shape[1]])
        return grad_x, None


def _padded(tile: Tensor, height: int) -> Tensor:
    missing = height - tile.shape[1]
    if not missing:
        return tile
    return torch.cat([tile, tile.new_zeros(1, missing, tile.shape[2])], dim=1)

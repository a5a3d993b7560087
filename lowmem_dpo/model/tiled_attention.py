"""Causal attention with a sliding window or soft-capped scores, one tile of queries at a time.

torch's attention caps no scores, and takes a window only as a dense mask. Here a tile of queries
meets the keys that its window reaches:

    p = softmax(cap(scaling * q k^T)),  cap(s) = softcap * tanh(s / softcap),  output = p v

in fp32. Only q, k and v wait for the backward pass, which computes the scores of a tile again, so
what is alive is one tile: the rows times the reach of the window, never a tree's square.

Shapes: Q queries, S keys, H query heads, K key heads, G = H / K, E head size, T rows of a tile.
Source: Gemma 2 (arXiv 2408.00118), section 2, for windows and soft-capping.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_TILE_ROWS = 256
_TILE_SCORES = 2**22  # at most so many scores in a tile: 16 MiB in fp32, about five times alive


def tiled_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention of the last Q of S positions.

    Args:
        query: [1, H, Q, E].
        key: [1, K, S, E]; K divides H, S is at least Q.
        value: [1, K, S, E].
        scaling: Factor on the scores.
        window: A query sees itself and so many keys less one before it; None for all of them.
        softcap: Scores are bent to stay within +-softcap; None leaves them.

    Returns:
        [1, H, Q, E] in the dtype of `query`.
    """
    segment = _Segment(key.shape[2] - query.shape[2], scaling, window, softcap)
    return _TiledAttention.apply(query, key, value, segment)


@dataclass(frozen=True)
class _Segment:
    """Queries that are the last of so many positions: the first stands behind `before` keys."""

    before: int
    scaling: float
    window: int | None
    softcap: float | None

    def tiles(self, num_queries: int, num_keys: int, num_heads: int) -> Iterator[tuple[slice, ...]]:
        """The rows of each tile and the keys that they reach."""
        reach = num_keys if self.window is None else min(num_keys, self.window + _TILE_ROWS)
        num_rows = max(1, min(_TILE_ROWS, _TILE_SCORES // (num_heads * reach)))
        for start in range(0, num_queries, num_rows):
            stop = min(start + num_rows, num_queries)
            first = 0 if self.window is None else max(0, self.before + start - self.window + 1)
            yield slice(start, stop), slice(first, self.before + stop)

    def attend(self, q: Tensor, k: Tensor, rows: slice, keys: slice) -> tuple[Tensor, Tensor]:
        """Probabilities [K, G * T, keys] of a tile, and its scores as a share of the cap."""
        scores = (q @ k.transpose(1, 2)).mul_(self.scaling)
        shares = scores
        if self.softcap is not None:
            shares = scores.div_(self.softcap).tanh_()
            scores = shares * self.softcap
        at = torch.arange(rows.start, rows.stop, device=q.device)[:, None] + self.before
        distance = at - torch.arange(keys.start, keys.stop, device=q.device)
        hidden = distance < 0
        if self.window is not None:
            hidden |= distance >= self.window
        by_row = scores.view(len(q), -1, *hidden.shape)
        return by_row.masked_fill(hidden, -torch.inf).softmax(-1).view_as(scores), shares


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, segment: _Segment) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.segment = segment
        output = torch.empty_like(query)
        grouped, grouped_output = _grouped(query, key), _grouped(output, key)
        for rows, keys in segment.tiles(query.shape[2], key.shape[2], query.shape[1]):
            q, k, v = _tile(grouped, rows), _wide(key[0, :, keys]), _wide(value[0, :, keys])
            probabilities, _ = segment.attend(q, k, rows, keys)
            part = grouped_output[:, :, rows]
            part.copy_((probabilities @ v).view(part.shape))
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        segment = ctx.segment
        grad_query = torch.empty_like(query)
        grad_key, grad_value = (torch.zeros_like(_wide(x[0])) for x in (key, value))
        grouped, grouped_grad, upstream = (
            _grouped(x, key) for x in (query, grad_query, grad_output)
        )
        for rows, keys in segment.tiles(query.shape[2], key.shape[2], query.shape[1]):
            q, k, v = _tile(grouped, rows), _wide(key[0, :, keys]), _wide(value[0, :, keys])
            grad = _tile(upstream, rows)
            probabilities, shares = segment.attend(q, k, rows, keys)
            grad_value[:, keys] += probabilities.transpose(1, 2) @ grad
            grad_scores = grad @ v.transpose(1, 2)
            grad_scores -= (grad_scores * probabilities).sum(-1, keepdim=True)
            grad_scores *= probabilities
            if segment.softcap is not None:
                grad_scores *= 1 - shares.square()
            grad_scores *= segment.scaling
            part = grouped_grad[:, :, rows]
            part.copy_((grad_scores @ k).view(part.shape))
            grad_key[:, keys] += grad_scores.transpose(1, 2) @ q
        return grad_query, grad_key[None].to(key.dtype), grad_value[None].to(value.dtype), None


def _grouped(x: Tensor, key: Tensor) -> Tensor:
    """[1, H, Q, E] as [K, G, Q, E]: the query heads by the key head that they share."""
    return x[0].unflatten(0, (key.shape[1], -1))


def _tile(grouped: Tensor, rows: slice) -> Tensor:
    """Some rows of every head, [K, G * T, E] in fp32."""
    return _wide(grouped[:, :, rows].flatten(1, 2))


def _wide(x: Tensor) -> Tensor:
    """In fp32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))

"""Time and memory of attention over token trees, forward and backward, beside plain sequences.

    python benchmarks/benchmark_tree_attention.py
    python benchmarks/benchmark_tree_attention.py --shapes 4x512+256+256x32/8x128 --output h200.json

A shape is TREESxTRUNK+CHOSEN+REJECTEDxH/KxE, then wWINDOW and cCAP where a model has them. "Plain"
rows hold the same pairs as sequences of their own, the trunk twice: there PyTorch's FlashAttention
(elsewhere its best) sets the rate to beat. A rate counts the products that are needed, 14 E a pair
of query and seen key and head, whatever is recomputed: rates compare kernels at equal work, times
what a training step sees. Values and gradients of the first and the last tree are compared with
float64: where they are wrong, no speed is printed and the exit code is 1. The twin is left out
where its scores would fill a card.
"""

import argparse
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from _operations import Row, measure, parse_options, run_table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lowmem_dpo.model.attention import AttentionKind, segment_attention
from lowmem_dpo_kernels import TreeLayout, TreePlan, tree_attention, tree_attention_path, twins

SHAPES = {
    "quick": ["2x8+4+6x2/1x16"],
    "cpu": ["4x128+64+64x8/2x64"],
    "cuda": [
        "8x512+256+256x32/8x128",  # Llama 3.1 8B
        "2x2048+1024+1024x32/8x128",
        "8x512+256+256x14/2x64",  # Qwen2.5 0.5B
        "8x512+256+256x8/4x256c50",  # Gemma 2 2B, every second layer
        "8x512+256+256x8/4x256w4096c50",  # and the others
    ],
}
SHAPE = re.compile(r"(\d+)x(\d+)\+(\d+)\+(\d+)x(\d+)/(\d+)x(\d+)(?:w(\d+))?(?:c([\d.]+))?")
TWIN_SCORES = 2**28  # H N^2, 1 GiB in fp32


@dataclass(frozen=True)
class Case:
    """A pack of trees, or of plain sequences: trees without branches.

    Attributes:
        query: [H, N, E], as key and value with K heads; views of [N, heads * E], as projected.
        key: [K, N, E].
        value: [K, N, E].
        upstream: [N, H, E], the gradient from above.
        plan: Where the trees are.
        sliding_window: Positions that a query looks back, or None.
        softcap: Of the scores, or None.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    upstream: Tensor
    plan: TreePlan
    sliding_window: int | None
    softcap: float | None

    @property
    def scale(self) -> float:
        """The usual factor on the scores."""
        return self.query.shape[2] ** -0.5

    @property
    def settings(self) -> dict[str, float | int | None]:
        """What the kernels and their twin are told."""
        return {
            "scale": self.scale,
            "sliding_window": self.sliding_window,
            "softcap": self.softcap,
        }

    @property
    def sees_all(self) -> bool:
        """Whether plain causal attention would do for every sequence."""
        longest = max(trunk + max(rest) for _, trunk, *rest in self.plan.layout)
        return self.softcap is None and (self.sliding_window or longest) >= longest


Implementation = Callable[[Case], Tensor]


def ours(case: Case) -> Tensor:
    """This repository's kernels."""
    return tree_attention(case.query, case.key, case.value, case.plan, **case.settings)


def ours_sdpa(case: Case) -> Tensor:
    """This repository's portable path: PyTorch's attention, segment by segment."""
    tensors = [x[None] for x in (case.query, case.key, case.value)]
    rule = AttentionKind(case.scale, case.sliding_window, case.softcap)
    return segment_attention(*tensors, case.plan.layout, rule)[0]


def twin(case: Case) -> Tensor:
    """A dense mask over the pack, and autograd."""
    return twins.tree_attention(case.query, case.key, case.value, case.plan.layout, **case.settings)


def flash(case: Case) -> Tensor:
    """PyTorch's causal attention of plain sequences: one call for every run of equal lengths."""
    lengths = [length for _, length, *_ in case.plan.layout]
    runs = [len(list(run)) * length for length, run in itertools.groupby(lengths)]
    sizes = [length for length, _ in itertools.groupby(lengths)]
    on_card = case.query.is_cuda and case.query.dtype != torch.float32
    outputs = []
    for length, *tensors in zip(
        sizes, *(x.split(runs, dim=1) for x in (case.query, case.key, case.value)), strict=True
    ):
        q, k, v = (x.unflatten(1, (-1, length)).transpose(0, 1) for x in tensors)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if on_card else nullcontext():
            out = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=case.scale, enable_gqa=True
            )
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)


def implementations(trees: Case, plain: Case) -> dict[str, tuple[Implementation, Case]]:
    """What can run here and on what, ours first."""
    query = trees.query
    kernels_run = tree_attention_path(query.device, query.dtype, query.shape[2])
    found: dict[str, tuple[Implementation, Case]] = {}
    if kernels_run or os.environ.get("TRITON_INTERPRET") == "1":
        found = {"ours": (ours, trees), "ours, plain": (ours, plain)}
    found["ours (sdpa)"] = (ours_sdpa, trees)
    if plain.sees_all:
        found["flash, plain"] = (flash, plain)
    if query.shape[0] * query.shape[1] ** 2 <= TWIN_SCORES:
        found["twin"] = (twin, trees)
    return found


def make_cases(shape: str, dtype: torch.dtype, device: torch.device) -> tuple[Case, Case]:
    """The trees of a shape, and their pairs as plain sequences, all chosen ones first."""
    match = SHAPE.fullmatch(shape)
    assert match
    *numbers, window, softcap = match.groups()
    trees, trunk, chosen, rejected, *heads = map(int, numbers)
    limits = (int(window) if window else None, float(softcap) if softcap else None)
    length = trunk + chosen + rejected
    layout = [(i * length, trunk, chosen, rejected) for i in range(trees)]
    lengths = [trunk + chosen] * trees + [trunk + rejected] * trees
    starts = itertools.accumulate(lengths, initial=0)
    plain = [(start, length, 0, 0) for start, length in zip(starts, lengths, strict=False)]
    return tuple(_make_case(some, *heads, dtype, device, limits) for some in (layout, plain))


def _make_case(
    layout: TreeLayout,
    heads: int,
    key_heads: int,
    size: int,
    dtype: torch.dtype,
    device: torch.device,
    limits: tuple[int | None, float | None],
) -> Case:
    """Seeded numbers; query, key and value require a gradient."""
    num_tokens = sum(sum(lengths) for _, *lengths in layout)
    generator = torch.Generator(device).manual_seed(0)

    def normal(count: int) -> Tensor:
        numbers = torch.randn(num_tokens, count * size, generator=generator, device=device)
        return numbers.to(dtype).view(-1, count, size)

    query, key, value = (
        normal(count).transpose(0, 1).requires_grad_() for count in (heads, key_heads, key_heads)
    )
    return Case(query, key, value, normal(heads), TreePlan(layout, num_tokens), *limits)


def needed_flops(case: Case) -> float:
    """Of the products of a forward and a backward pass: seven, of 2 E a pair of query and key."""

    def causal(length: int) -> float:
        window = min(case.sliding_window or length, length)
        return window * (window + 1) / 2 + (length - window) * window

    pairs = sum(
        causal(trunk + chosen) + causal(trunk + rejected) - causal(trunk)
        for _, trunk, chosen, rejected in case.plan.layout
    )
    return 14.0 * case.query.shape[2] * len(case.query) * pairs


def step(implementation: Implementation, case: Case) -> tuple[Tensor, ...]:
    """Output [N, H, E], and the gradients of query, key and value."""
    out = implementation(case)
    grads = torch.autograd.grad(out, (case.query, case.key, case.value), case.upstream)
    return out.detach(), *grads


def largest_error(case: Case, found: tuple[Tensor, ...]) -> float:
    """Of the first and the last tree: largest relative Frobenius error of output and gradients."""
    group = len(case.query) // len(case.key)
    squares = torch.zeros(2, 4, dtype=torch.float64)  # of differences, of exact numbers
    for start, *lengths in {case.plan.layout[0], case.plan.layout[-1]}:
        rows = slice(start, start + sum(lengths))
        for k in range(len(case.key)):
            exact = _exact(case, rows, lengths, k)
            heads = slice(k * group, (k + 1) * group)
            out, *grads = found
            ours = (out[rows, heads], grads[0][heads, rows], grads[1][k, rows], grads[2][k, rows])
            for i, (one, other) in enumerate(zip(ours, exact, strict=True)):
                squares[0, i] += (one - other).square().sum().cpu()
                squares[1, i] += other.square().sum().cpu()
    return (squares[0] / squares[1]).sqrt().max().item()


def _exact(case: Case, rows: slice, lengths: list[int], k: int) -> list[Tensor]:
    """Of one tree and the queries of one key head, as `step`, in float64.

    Head by head: its scores, and what autograd keeps of them, are five matrices [n, n].
    """
    group, num_tokens = len(case.query) // len(case.key), sum(lengths)
    plan = TreePlan([(0, *lengths)], num_tokens)
    key, value = (x.detach()[k : k + 1, rows].double() for x in (case.key, case.value))
    steps = []
    for head in range(k * group, (k + 1) * group):
        query = case.query.detach()[head : head + 1, rows].double()
        upstream = case.upstream[rows, head : head + 1].double()
        tensors = [x.requires_grad_() for x in (query, key, value)]
        steps.append(step(twin, Case(*tensors, upstream, plan, case.sliding_window, case.softcap)))
    outs, query_grads, key_grads, value_grads = zip(*steps, strict=True)
    sums = [torch.stack(grads).sum(0)[0] for grads in (key_grads, value_grads)]
    return [torch.cat(outs, 1), torch.cat(query_grads), *sums]


def rows_of(shape: str, dtype: torch.dtype, options: argparse.Namespace) -> Iterator[Row]:
    """Every implementation on one shape."""
    cases = make_cases(shape, dtype, options.device)
    limit = 1e-5 if dtype == torch.float32 else 0.02
    for name, (implementation, case) in implementations(*cases).items():

        def run(f: Implementation = implementation, case: Case = case) -> tuple[Tensor, ...]:
            return step(f, case)

        def check(
            run: Callable[[], tuple[Tensor, ...]] = run, case: Case = case
        ) -> tuple[dict[str, float], bool]:
            error = largest_error(case, run())
            return {"error": error}, error <= limit

        row = measure(name, dtype, check, run, options)
        rate = None if row["ms"] is None else needed_flops(case) / row["ms"] / 1e9
        yield row | {"tflops": rate}


def main(arguments: list[str] | None = None) -> int:
    """Run every implementation on every shape and dtype."""
    form = "TREESxTRUNK+CHOSEN+REJECTEDxH/KxE, such as 8x512+256+256x32/8x128"
    options = parse_options(arguments, __doc__, SHAPES, form, SHAPE.pattern, repeats=10)
    return run_table(
        "tree_attention",
        ("ms", "tflops", "peak_mib"),
        options,
        options.dtypes or ["bfloat16" if options.device.type == "cuda" else "float32"],
        lambda shape, dtype: rows_of(shape, dtype, options),
    )


if __name__ == "__main__":
    sys.exit(main())

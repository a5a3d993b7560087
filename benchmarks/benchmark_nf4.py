"""Time of making an NF4 weight dense, beside bitsandbytes and a copy of as many bytes.

    python benchmarks/benchmark_nf4.py
    python benchmarks/benchmark_nf4.py --shapes 14336x4096 --output nf4.json

A shape is OUTxIN. Bandwidth counts what has to be read and written once, 0.516 bytes a number and
the dense number; the copy moves as many, half read and half written. Bits are compared with
bitsandbytes: where they differ, no speed is printed and the exit code is 1. On a card the launches
of a measurement go round several copies, more than its L2 cache holds. On a CPU ours is the plain
twin.
"""

import argparse
import copy
import functools
import sys
from collections.abc import Callable, Iterator

import torch
from _operations import Row, measure, parse_options, run_table
from bitsandbytes import functional as bnb
from torch import Tensor

from lowmem_dpo.linears.nf4 import Nf4Weight, quantize_nf4
from lowmem_dpo_kernels import twins

SHAPES = {"quick": ["64x128"], "cpu": ["2048x2048"], "cuda": ["4096x4096", "14336x4096"]}
INNER = 20  # launches a measurement, so that the clock's own pauses do not count
ROUND_BYTES = 512 * 2**20  # beyond any card's L2


@functools.cache
def tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """What the codes of both levels stand for."""
    return bnb.create_dynamic_map().to(device), bnb.get_4bit_type("nf4", device=str(device))


def ours(weight: Nf4Weight, out: Tensor) -> Tensor:
    """This repository's kernel; on a CPU its twin."""
    dequantize = twins.nf4_dequantize
    if out.is_cuda:
        from lowmem_dpo_kernels import nf4

        dequantize = nf4.nf4_dequantize
    state = weight.packed, weight.absmax, weight.absmax2, weight.offset
    return dequantize(*state, *tables(out.device), out)


def bitsandbytes(weight: Nf4Weight, out: Tensor) -> Tensor:
    """Two kernels and a sum."""
    code, _ = tables(out.device)
    scale = bnb.dequantize_blockwise(
        weight.absmax, absmax=weight.absmax2, code=code, blocksize=256
    ).add_(weight.offset)
    rows = (out.numel() // 64, 64)
    dense = torch.ops.bitsandbytes.dequantize_4bit(
        weight.packed.view(-1, 1), scale, 64, "nf4", rows, out.dtype
    )
    return dense.view(out.shape)


def rows_of(shape: str, dtype: torch.dtype, options: argparse.Namespace) -> Iterator[Row]:
    """All implementations on one weight, and the copy."""
    (rows, columns), device = map(int, shape.split("x")), options.device
    generator = torch.Generator(device).manual_seed(0)
    weight = quantize_nf4(torch.randn(rows, columns, generator=generator, device=device) * 0.03)
    out = torch.empty(rows, columns, dtype=dtype, device=device)
    expected = bitsandbytes(weight, out).clone()
    moved = weight.nbytes + out.nbytes
    count = min(INNER, -(-ROUND_BYTES // moved)) if out.is_cuda else 1
    weights = [copy.deepcopy(weight) for _ in range(count)]
    outs = [torch.empty_like(out) for _ in range(count)]
    sources = torch.zeros(count, moved // 2, dtype=torch.uint8, device=device)
    targets = torch.empty_like(sources)
    actions: dict[str, Callable[[int], Tensor]] = {
        "ours": lambda i: ours(weights[i % count], outs[i % count]),
        "bitsandbytes": lambda i: bitsandbytes(weights[i % count], outs[i % count]),
        "copy": lambda i: (targets[i % count].copy_(sources[i % count]), expected)[1],
    }
    for name, action in actions.items():
        row = measure(
            name,
            dtype,
            lambda action=action: ({}, torch.equal(action(0), expected)),
            lambda action=action: [action(i) for i in range(INNER)],
            options,
        )
        if row["ms"] is not None:
            row["ms"] /= INNER
        yield row | {"gb_per_s": None if row["ms"] is None else moved / row["ms"] / 1e6}


def main(arguments: list[str] | None = None) -> int:
    """Run every implementation on every shape."""
    form = "OUTxIN, such as 14336x4096"
    options = parse_options(arguments, __doc__, SHAPES, form, r"\d+x\d+", repeats=5)
    return run_table(
        "nf4",
        ("ms", "gb_per_s"),
        options,
        options.dtypes or ["bfloat16"],
        lambda shape, dtype: rows_of(shape, dtype, options),
    )


if __name__ == "__main__":
    sys.exit(main())

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
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from _common import (
    add_memory_limit,
    attempt,
    commit,
    device_name,
    exit_code,
    hold_memory,
    write_record,
)
from benchmark_token_logps import median_ms
from bitsandbytes import functional as bnb
from torch import Tensor

from lowmem_dpo.model.nf4 import Nf4Weight, quantize_nf4
from lowmem_dpo_kernels import twins

SHAPES = {"quick": ["64x128"], "cpu": ["2048x2048"], "cuda": ["4096x4096", "14336x4096"]}
INNER = 20  # launches a measurement, so that the clock's own pauses do not count
ROUND_BYTES = 512 * 2**20  # beyond any card's L2
COLUMNS = "{:<6} {:<14} {:<14} {:<9} {:>9} {:>8}  {:<24} {}"


@dataclass(frozen=True)
class Result:
    """One line of the table; ms and gb_per_s are None where bits differ, and failure says why."""

    op: str
    impl: str
    shape: str
    dtype: str
    ms: float | None
    gb_per_s: float | None
    device: str
    commit: str
    failure: str


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


def measure(
    name: str,
    action: Callable[[int], Tensor],
    shape: str,
    expected: Tensor,
    moved: int,
    repeats: int,
) -> Result:
    """Compare bits, then time; the action is told which launch it is."""
    device, ms = expected.device, None

    def check_and_time() -> None:
        nonlocal ms
        if torch.equal(action(0), expected):
            ms = median_ms(lambda: [action(i) for i in range(INNER)], device, repeats) / INNER

    failure = attempt(check_and_time) or ("wrong" if ms is None else "")
    rate = None if ms is None else moved / ms / 1e6
    dtype = str(expected.dtype).removeprefix("torch.")
    return Result("nf4", name, shape, dtype, ms, rate, device_name(device), commit(), failure)


def run(shape: str, dtype: torch.dtype, device: torch.device, repeats: int) -> list[Result]:
    """All implementations on one weight, and the copy."""
    rows, columns = map(int, shape.split("x"))
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
    return [
        measure(name, action, shape, expected, moved, repeats) for name, action in actions.items()
    ]


def main(arguments: list[str] | None = None) -> int:
    """Run every implementation on every shape."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", metavar="OUTxIN")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a toy shape: does it run?")
    add_memory_limit(parser)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    shapes = options.shapes or SHAPES["quick" if options.quick else device.type]
    for shape in shapes:
        if not re.fullmatch(r"\d+x\d+", shape):
            parser.error(f"a shape must be OUTxIN, such as 14336x4096, got {shape}")
    hold_memory(parser, options, device)
    print(COLUMNS.format("op", "impl", "shape", "dtype", "ms", "gb_per_s", "device", "commit"))
    results = []
    for shape in shapes:
        for result in run(shape, torch.bfloat16, device, 1 if options.quick else options.repeats):
            results.append(result)
            ms = result.failure.split(":")[0] if result.ms is None else f"{result.ms:.3f}"
            rate = "-" if result.gb_per_s is None else f"{result.gb_per_s:.1f}"
            where = (result.device, result.commit)
            line = (result.op, result.impl, result.shape, result.dtype, ms, rate, *where)
            print(COLUMNS.format(*line), flush=True)
            if result.failure.startswith("failed"):
                print(f"  {result.failure}")
    if options.output:
        rows = [asdict(result) for result in results]
        settings = {"shapes": shapes, "memory_limit": options.memory_limit}
        write_record(options.output, "nf4", device, settings, rows)
    return exit_code([result.failure for result in results])


if __name__ == "__main__":
    sys.exit(main())

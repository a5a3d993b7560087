"""Whether a row of a matrix product keeps its bits wherever it stands: what step zero rests on.

    python benchmarks/row_invariance.py
    python benchmarks/row_invariance.py --shapes 2048x4096x14336 --output rows.json
    CUBLAS_WORKSPACE_CONFIG=:4096:8 CUBLASLT_WORKSPACE_SIZE=8192 python benchmarks/row_invariance.py

A shape is MxKxN: M rows of K numbers times a weight [N, K]. The rows are multiplied in order, in
another order, and once more with every other row drawn anew. The table counts rows whose bits
changed; exit code 1 if there is one. Products are those of a run: `linear` of the layers, `mm` with
an fp32 result of the head (on CUDA). The environment's two workspace settings of cuBLAS decide
whether it may split the sum over K; where they are not set, they are those of a run. ms is the
median of a `linear`'s time: what the settings cost.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from _common import attempt, device_name, exit_code, write_record
from _operations import DTYPES, Row, median_ms
from torch import Tensor

from lowmem_dpo.machine.device import WORKSPACES, pin_workspaces

SHAPES = {
    "cpu": ["128x64x192", "128x64x16"],
    "cuda": [  # of Llama 3.1 8B in packs of 2,048 and 2,304 tokens: layers, LoRA's A and B, head
        f"{rows}x{sides}"
        for rows in (2048, 1152, 1024)
        for sides in (
            "4096x4096",
            "4096x1024",
            "4096x14336",
            "14336x4096",
            "4096x16",
            "16x4096",
            "4096x8192",
        )
    ],
}
COLUMNS = "{:<10} {:<18} {:<9} {:>9} {:>9} {:>9}  {}"


def changed_rows(product: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor) -> Row:
    """How many rows of a product change when rows move, and when every second row is another."""
    generator = torch.Generator(x.device).manual_seed(1)
    whole = product(x, weight)
    order = torch.randperm(len(x), generator=generator, device=x.device)
    moved = (product(x[order], weight) != whole[order]).any(1).sum().item()
    others = x.clone()
    others[1::2] = torch.randn(others[1::2].shape, generator=generator, device=x.device).to(x.dtype)
    beside = (product(others, weight) != whole)[::2].any(1).sum().item()
    return {"moved": moved, "beside": beside}


def rows_of(shape: str, dtype: torch.dtype, device: torch.device) -> list[Row]:
    """Both products of one shape."""
    num_rows, inner, outer = map(int, shape.split("x"))
    generator = torch.Generator(device).manual_seed(0)
    x, weight = (
        torch.randn(n, inner, generator=generator, device=device).to(dtype)
        for n in (num_rows, outer)
    )
    products: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"linear": F.linear}
    if device.type == "cuda" and dtype != torch.float32:
        products["mm, fp32"] = lambda x, w: torch.mm(x, w.T, out_dtype=torch.float32)
    found = []
    for name, product in products.items():
        row: Row = {"product": name, "shape": shape, "dtype": str(dtype).removeprefix("torch.")}
        row |= {"moved": None, "beside": None, "ms": None}
        row["failure"] = attempt(
            lambda row=row, product=product: row.update(
                changed_rows(product, x, weight),
                ms=median_ms(lambda: product(x, weight), device, 5),
            )
        )
        if row["moved"] or row["beside"]:
            row["failure"] = "rows changed"
        found.append(row)
    return found


def main(arguments: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", metavar="MxKxN")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    pin_workspaces()
    settings = {name: os.environ[name] for name in WORKSPACES}
    print(f"{device_name(device)}, {' '.join(f'{k}={v}' for k, v in settings.items())}")
    print(COLUMNS.format("product", "shape", "dtype", "moved", "beside", "ms", ""))
    usual = ["bfloat16", "float16"] if device.type == "cuda" else ["float32", "bfloat16"]
    rows = []
    for shape in options.shapes or SHAPES[device.type]:
        for dtype in options.dtypes or usual:
            for row in rows_of(shape, DTYPES[dtype], device):
                rows.append(row)
                numbers = [row["moved"], row["beside"], row["ms"] and f"{row['ms']:.3f}"]
                texts = ["-" if number is None else number for number in numbers]
                names = (row["product"], row["shape"], row["dtype"])
                print(COLUMNS.format(*names, *texts, row["failure"]), flush=True)
    if options.output:
        write_record(options.output, "row_invariance", device, settings, rows)
    return exit_code([row["failure"] for row in rows])


if __name__ == "__main__":
    sys.exit(main())

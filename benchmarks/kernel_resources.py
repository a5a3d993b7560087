"""Registers, shared memory and occupancy of every Triton kernel, for cards that need not be there.

    python benchmarks/kernel_resources.py
    python benchmarks/kernel_resources.py --ops tree_attention --capabilities 8.6 9.0

Every configuration is compiled for every compute capability. The last column is the share of a
multiprocessor's warps that are resident. Exit code 1 if a kernel does not fit or spills more than
the bound. It says nothing of speed.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from _ahead_of_time import CAPABILITIES, Resources, compiling_for, resources
from _common import write_record
from _launches import LAUNCHES

MAX_SPILLED_BYTES = 128
COLUMNS = "{:<14} {:<28} {:<40} {:>4} {:>9} {:>7} {:>10} {:>6} {:>9} {:>9}"
HEADER = ("op", "case", "kernel", "cc", "registers", "spilled", "shared_kib", "warps", "programs")


def rows(op: str, capability: tuple[int, int]) -> Iterator[tuple[str, str, Resources]]:
    """Compile an operation's launches; case, kernel, and what it takes."""
    for case in LAUNCHES[op](capability):
        with compiling_for(capability) as launches:
            case.launch()
        for kernel, launch in zip(case.kernels, launches, strict=True):
            yield case.label, kernel, resources(launch, capability)


def fits(found: Resources) -> bool:
    """Whether the card can run it, without moving registers to memory more than a little."""
    return found.programs > 0 and found.spilled_bytes <= MAX_SPILLED_BYTES


def main(arguments: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    names = [f"{major}.{minor}" for major, minor in CAPABILITIES]
    parser.add_argument("--ops", nargs="+", choices=LAUNCHES, default=list(LAUNCHES))
    parser.add_argument("--capabilities", nargs="+", choices=names, default=names, metavar="X.Y")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)

    print(COLUMNS.format(*HEADER, "occupancy"))
    records, all_fit = [], True
    for op in options.ops:
        for capability in options.capabilities:
            major, minor = map(int, capability.split("."))
            for case, kernel, found in rows(op, (major, minor)):
                shared_kib = f"{found.shared_bytes / 1024:.1f}"
                numbers = (found.registers, found.spilled_bytes, shared_kib, found.num_warps)
                share = (found.programs, f"{found.occupancy:.0%}")
                line = COLUMNS.format(op, case, kernel, capability, *numbers, *share)
                print(line if fits(found) else f"{line}  DOES NOT FIT", flush=True)
                all_fit &= fits(found)
                where = {"op": op, "case": case, "kernel": kernel, "capability": capability}
                records.append(where | asdict(found))
    if options.output:
        write_record(options.output, "kernel_resources", torch.device("cpu"), {}, records)
    return 0 if all_fit else 1


if __name__ == "__main__":
    sys.exit(main())

"""How long a pair may be, and what large models need: `python benchmarks/max_context.py`.

    python benchmarks/max_context.py --parts lengths,shapes,speed --output lengths.json

Rehearsed, not measured: our step of two micro-batches of one pair (rank 16 on all linears,
adamw_8bit, prompt as long as each completion) for cards that need not be here. What torch may
reserve is the limit less CUDA's context, which is assumed. `resident` keeps the layers' weights on
the card, `streamed` takes them from host memory too; embedding, head and layer inputs are on the
host in both. Seconds are those of one pair, on the card named, at its nominal rates.

Beside them what peers say of Llama-3.1-8B, in tokens of the longest sequence. Unsloth: supervised
training of one sequence at rank 32, from the table of its README (unsloth_zoo), which is a fitted
line. TRL: an estimate from what its 1.16 keeps (a fused head, layer inputs on the host, both
sequences apart): 6.77 GiB and 228 kB a token of either sequence.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _common import commit, write_record
from _rehearsals import (
    CONTEXT_BYTES,
    GIB,
    RESIDENT,
    STREAMED,
    USUAL,
    Rehearsal,
    TreeShape,
    fit_tokens,
    model_config,
    rehearsed,
    trace_ours,
    tree_of_shape,
)
from transformers import PretrainedConfig

from lowmem_dpo.machine.card_table import Card, find_card
from lowmem_dpo.memory.levers import Levers

OP = "max_context"
LENGTH_MULTIPLE = 128
LEVERS = {"resident": RESIDENT, "streamed": STREAMED}


class Peers(NamedTuple):
    """Longest sequences in tokens, and what ours was wanted to reach; None where nobody says."""

    unsloth: int | None
    trl: int | None
    wanted: int | None


PEERS = {
    4: Peers(None, None, 10_000),
    8: Peers(2_972, 2_890, 28_000),
    12: Peers(21_848, 12_300, 48_000),
    16: Peers(40_724, 21_800, 66_000),
    24: Peers(78_475, 40_600, 100_000),
}
"""By the card's GiB."""


class Shape(NamedTuple):
    """A model, a length and what it was wanted to need.

    Attributes:
        model: Of configs/.
        length: Tokens of each of two sequences, half of them prompt.
        wanted_gib: Of the card, by the name of the levers.
    """

    model: str
    length: int
    wanted_gib: dict[str, float]


SHAPES = (
    Shape("llama-3.1-8b", 512, {"streamed": 1.6}),
    Shape("llama-3.1-8b", 2048, {"resident": 6.2, "streamed": 2.3}),
    Shape("qwen2.5-32b", 2048, {"streamed": 8.0}),
    Shape("llama-3.1-70b", 1024, {"streamed": 6.0}),
)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--parts", default="lengths,shapes,speed", help="some of these")
    parser.add_argument("--model", default="llama-3.1-8b", help="whose longest pairs are sought")
    parser.add_argument("--limits", default="4,8,12,16,24", help="GiB of cards")
    parser.add_argument("--levers", default="resident,streamed", help="one or both")
    parser.add_argument("--card", default="RTX 3090", help="whose rates count")
    parser.add_argument("--large", default="llama-3.1-70b", help="whose speed is compared")
    parser.add_argument("--tokens", type=int, default=4096, help="of a micro-batch there")
    parser.add_argument("--first", type=int, default=4096, help="shortest length tried")
    parser.add_argument("--most", type=int, default=131072, help="longest length tried")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    return parser.parse_args(arguments)


def pair_of(length: int) -> TreeShape:
    """Two sequences of that length, half prompt."""
    return TreeShape(length // 2, length - length // 2, length - length // 2)


def of_pairs(
    config: PretrainedConfig,
    card: Card,
    shape: TreeShape,
    levers: Levers,
    *,
    pairs: int = 1,
) -> Rehearsal:
    """Two micro-batches of so many pairs each; the second finds the gradients of the first."""
    trees = [tree_of_shape(shape)] * pairs
    n = fit_tokens(trees)
    return rehearsed(trace_ours(config, card, [trees] * 2, pack_tokens=n, levers=levers), card)


def row_of(found: Rehearsal, pairs: int) -> dict[str, Any]:
    """What is printed of a rehearsal, seconds by the pair."""
    return {
        "reserved_bytes": found.peak_reserved_bytes,
        "allocated_bytes": found.peak_allocated_bytes,
        "host_bytes": found.host_bytes,
        "flops": found.flops,
        "link_bytes": found.link_bytes,
        "seconds_per_pair": [each / pairs for each in found.seconds],
    }


def longest_pairs(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """For every limit, the longest prompt and completion that fit, both of one length."""
    config, card = model_config(options.model), find_card(options.card)
    for name in options.levers.split(","):
        known: dict[int, Rehearsal] = {}  # of no use to one limit alone

        def follow(
            length: int, known: dict[int, Rehearsal] = known, levers: Levers = LEVERS[name]
        ) -> int:
            known[length] = of_pairs(config, card, pair_of(length), levers)
            return known[length].peak_reserved_bytes

        for gib in map(int, options.limits.split(",")):
            limit = gib * GIB - CONTEXT_BYTES
            reserved = {length: found.peak_reserved_bytes for length, found in known.items()}
            longest = longest_within(limit, reserved, follow, options.first, options.most)
            yield {
                "part": "lengths",
                "levers": name,
                "gib": gib,
                "longest": longest,
                "is_most": longest == options.most,
                **PEERS.get(gib, Peers(None, None, None))._asdict(),
                **(row_of(known[longest], 2) if longest else {}),
            }


def longest_within(
    limit_bytes: int, known: dict[int, int], follow: Callable[[int], int], first: int, most: int
) -> int | None:
    """The longest length in the limit, within 4 %, by few rehearsals; None if none fits.

    Args:
        limit_bytes: What may be reserved.
        known: Bytes by length; about a line from length to length.
        follow: Rehearses a length, in minutes where it is long.
        first: The shortest of use.
        most: The longest of use.
    """
    for length in (first, min(4 * first, most)):
        if length not in known:
            known[length] = follow(length)
    for _ in range(4):
        fitting = max((n for n, nbytes in known.items() if nbytes <= limit_bytes), default=0)
        above = min((n for n, nbytes in known.items() if nbytes > limit_bytes), default=most + 1)
        if fitting == most or above == first:
            break
        # The two lengths around the limit, or the last two below it.
        a, b = sorted(known, key=lambda n: abs(known[n] - limit_bytes))[:2]
        guess = a + (limit_bytes - known[a]) * (a - b) / (known[a] - known[b])
        guess = min(int(0.985 * guess), above - 1, most) // LENGTH_MULTIPLE * LENGTH_MULTIPLE
        if guess <= 1.025 * fitting:
            break
        known[guess] = follow(guess)
    return max((n for n, nbytes in known.items() if nbytes <= limit_bytes), default=None)


def needed(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Memory of given shapes."""
    card = find_card(options.card)
    for shape in SHAPES:
        for name in options.levers.split(","):
            found = of_pairs(model_config(shape.model), card, pair_of(shape.length), LEVERS[name])
            yield {
                "part": "shapes",
                "model": shape.model,
                "length": shape.length,
                "levers": name,
                "in_all_gib": (found.peak_reserved_bytes + CONTEXT_BYTES) / GIB,
                "wanted_gib": shape.wanted_gib.get(name),
            } | row_of(found, 2)


def streamed_speed(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A step with the layers' weights on the host, over the same one with all on a larger card."""
    config, card = model_config(options.large), find_card(options.card)
    larger = dataclasses.replace(card, name=f"{card.name} with 80 GB", memory_bytes=80 * GIB)
    shape = pair_of(1024)
    pairs = options.tokens // fit_tokens([tree_of_shape(shape)])
    resident = of_pairs(config, larger, shape, USUAL, pairs=pairs)
    for name, levers, on in (("all on the card", USUAL, larger), ("streamed", STREAMED, card)):
        found = of_pairs(config, on, shape, levers, pairs=pairs)
        rates = [a / b for a, b in zip(resident.seconds, found.seconds, strict=True)]
        yield {
            "part": "speed",
            "model": options.large,
            "card": on.name,
            "levers": name,
            "pairs": pairs,
            "fits": found.fits,
            "rate": rates,
        } | row_of(found, 2 * pairs)


def say(row: dict[str, Any]) -> None:
    """Print a line."""
    if row["part"] == "lengths":
        what = f"{row['gib']} GiB, {row['levers']}"
        beside = ", ".join(f"{name} {row[name] or '-'}" for name in ("wanted", "unsloth", "trl"))
        least = "at least " if row["is_most"] else ""
        found = f"{least}{row['longest'] or 'none'} tokens ({beside})"
    elif row["part"] == "shapes":
        what = f"{row['model']}, 2x{row['length']}, {row['levers']}"
        wanted = f" (wanted {row['wanted_gib']})" if row["wanted_gib"] else ""
        found = f"{row['in_all_gib']:.2f} GiB in all{wanted}"
    else:
        what = f"{row['model']}, 2x1024 on {row['card']}, {row['levers']}"
        found = "{:.2f} to {:.2f} of the resident rate".format(*sorted(row["rate"]))
    print(f"{what:58}{found}")
    if "reserved_bytes" in row:
        low, high = row["seconds_per_pair"]
        print(
            f"{'':58}reserved {row['reserved_bytes'] / GIB:.2f} GiB, host "
            f"{row['host_bytes'] / GIB:.1f} GiB, {low:.2f} to {high:.2f} s a pair",
            flush=True,
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Rehearse, print, record."""
    options = parse(arguments)
    print(f"rehearsed, not measured; rates of {options.card}; commit {commit()}")
    parts = {"lengths": longest_pairs, "shapes": needed, "speed": streamed_speed}
    rows = []
    for part in options.parts.split(","):
        for row in parts[part](options):
            rows.append(row)
            say(row)
            if options.output:
                names = ("model", "limits", "levers", "card", "large", "tokens")
                settings = {name: getattr(options, name) for name in names}
                write_record(options.output, OP, torch.device("cpu"), settings, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""A step of 16 pairs, TRL's beside ours, rehearsed for cards that need not be here.

    python benchmarks/rehearsed_peers.py --data preferences.jsonl --tokenizer FOLDER

TRL with PEFT (rank 16 on all linears) and bitsandbytes (NF4, double quantisation, bf16), gradient
checkpointing and adamw_8bit, and ours, on the same pairs: the real functions of both, on tensors
without memory, under one follower, one model of the allocator and one of the card
(`_peer_steps` says what has a stand-in). Steps are drawn from the file with a seed and the median
one is printed; a pair of 2x512 is two sequences of 512 tokens, half of them prompt. TRL takes
`--batches` pairs a micro-batch and accumulates; `most` is the largest of these that fits. Ours
packs a step into micro-batches of one N; `keeps` is the most layers that keep all for the backward
pass in the same memory. Ratios are over the fastest of ours that fits.

Below each table: what each lever of ours does, by turning it off. Two have no switch, because
nothing is saved by it: head (logits a second time) and token-wise half (its last product a second
time); their FLOPs are counted, at the card's rates. Nothing here is measured.

TRL with Liger's loss is left out: 1.16 refuses it for its own fused head, which is in use here.
"""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from _common import commit, versions, write_record
from _peer_steps import PeerStep, peer_work, shortest, totals_of_peer, trace_peer
from _peer_workloads import (
    Workload,
    micro_batches,
    of_file,
    of_length,
    padded_tokens,
    shape_of,
    unshared,
)
from _rehearsals import (
    GIB,
    Trace,
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
from lowmem_dpo.memory.rehearsal import BEST, CONTEXT_BYTES, OTHER, Rehearsal, Totals
from lowmem_dpo.packs.packing import CARD_TOKEN_MULTIPLE, choose_pack_tokens, pack_trees
from lowmem_dpo.tokens.trees import Tree

OP = "rehearsed_peers"
PACK_TOKENS_LIMIT = 4096
Row = dict[str, Any]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="llama-3.1-8b", help="of configs/, or a folder")
    parser.add_argument("--data", help="preference file, for its lengths")
    parser.add_argument("--tokenizer", help="folder of a tokenizer")
    parser.add_argument("--cards", default="RTX 3090,RTX 4090")
    parser.add_argument("--lengths", default="512,2048", help="of pairs of one length; or none")
    parser.add_argument("--max_length", type=int, default=1024, help="of the file's pairs")
    parser.add_argument("--pairs", type=int, default=16, help="of a step")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batches", default="1,2,4,8,16", help="pairs of a micro-batch of TRL's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    if bool(options.data) != bool(options.tokenizer):
        parser.error("data and tokenizer go together; give both or none")
    options.batches = [int(size) for size in options.batches.split(",")]
    if len({find_card(name).has_bfloat16 for name in options.cards.split(",")}) > 1:
        parser.error("cards must run the same kernels; name those of Turing apart")
    if any(options.pairs % size for size in options.batches):
        parser.error(f"batches must divide the {options.pairs} pairs of a step")
    return options


def workloads(options: argparse.Namespace) -> list[Workload]:
    """What the command line asks for."""
    lengths = [] if options.lengths == "none" else options.lengths.split(",")
    found = [of_length(int(length), options.pairs) for length in lengths]
    if options.data:
        drawn = {"num_pairs": options.pairs, "num_steps": options.steps, "seed": options.seed}
        file = of_file(options.data, options.tokenizer, max_length=options.max_length, **drawn)
        found.insert(0, file)
    return found


@dataclasses.dataclass(frozen=True)
class Bench:
    """A model on a card.

    Attributes:
        config: The model's config.json.
        card: The card.
        work_of: What a peer's micro-batch computes; no card matters to it.
        trace_of: A peer's micro-batch with all layers.
        ours_of: Our step, by the pairs of its micro-batches, N and other arguments.
    """

    config: PretrainedConfig
    card: Card
    work_of: Callable[[PeerStep], Any]
    trace_of: Callable[[PeerStep], Trace]
    ours_of: Callable[..., Trace]

    def totals_of(self, step: PeerStep) -> tuple[Totals, Totals]:
        """Of a peer's micro-batch, and of the update."""
        return totals_of_peer(self.config.num_hidden_layers, self.card, self.work_of(step))

    def ours(self, packs: Sequence[Sequence[Tree]], n: int, **options: Any) -> Rehearsal:
        """Our step in micro-batches of n tokens."""
        return rehearsed(self.ours_of(packs, n, **options), self.card)


def peer_rows(bench: Bench, work: Workload, sizes: Sequence[int]) -> list[Row]:
    """TRL's rows: micro-batches of one and two pairs, and the largest that fits."""

    def peak(size: int) -> Rehearsal:
        # The reference in the step needs no more: nothing of it is kept.
        batches = (batch for step in work.steps for batch in micro_batches(step, size))
        return rehearsed(bench.trace_of(PeerStep(max(batches, key=padded_tokens))), bench.card)

    fitting = [size for size in sizes if has_room(bench, peak(size).peak_reserved_bytes)]
    rows = []
    for size in dict.fromkeys([*[s for s in sizes if s <= 2], *fitting[-1:]]):
        for with_reference in (False, True):
            steps = []
            for pairs in work.steps:
                batches = micro_batches(pairs, size)
                parts = [bench.totals_of(PeerStep(b, with_reference)) for b in batches]
                totals = added([*(each for each, _ in parts), parts[0][1]])
                steps.append((totals, len(batches), sum(map(padded_tokens, batches))))
            when = "in the step" if with_reference else "before"
            name = f"TRL, {size} a micro-batch, reference {when}"
            rows.append(row_of(name, *middle(steps), peak(size).peak_reserved_bytes))
    return rows


def our_rows(bench: Bench, work: Workload, num_pairs: int) -> tuple[list[Row], list[Tree], int]:
    """Ours with layers that run again, and with as many as fit that keep all; the step and N."""
    least = max(fit_tokens([tree]) for tree in work.trees)
    n = chosen_tokens(work.trees, num_pairs)
    steps = []
    for trees in work.steps:
        packs = packed(trees, n)
        found = bench.ours(packs, n)
        steps.append((totals_from(found), len(packs), n * len(packs), found, trees))
    *figures, found, trees = middle(steps)
    rows = [row_of(f"ours, N {n}", *figures, found.peak_reserved_bytes)]
    for tokens in sorted({least, n}):
        packs = packed(trees, tokens)
        num_kept, kept = most_kept(bench, packs, tokens)
        if kept:
            name = f"ours, N {tokens}, {num_kept} layers keep all"
            figures = [totals_from(kept), len(packs), tokens * len(packs)]
            rows.append(row_of(name, *figures, kept.peak_reserved_bytes))
    return rows, trees, n


def most_kept(
    bench: Bench, packs: Sequence[Sequence[Tree]], n: int
) -> tuple[int, Rehearsal | None]:
    """The most layers that keep all in the card's memory, and that step."""
    num_layers = bench.config.num_hidden_layers
    usual = bench.ours(packs, n)
    found = bench.ours(packs, n, levers=Levers(num_keep_all=num_layers))
    growth = (found.peak_reserved_bytes - usual.peak_reserved_bytes) / num_layers
    num_kept = num_layers
    while num_kept > 0 and not has_room(bench, found.peak_reserved_bytes):
        room = bench.card.memory_bytes - CONTEXT_BYTES - usual.peak_reserved_bytes
        num_kept = min(num_kept - 1, int(room / growth))
        if num_kept > 0:
            found = bench.ours(packs, n, levers=Levers(num_keep_all=num_kept))
    return max(num_kept, 0), found if num_kept > 0 else None


def levers_of(bench: Bench, trees: list[Tree], n: int) -> dict[str, Any]:
    """Seconds of a step over ours, best and other case, with one lever off at a time."""
    usual = totals_from(bench.ours(packed(trees, n), n))
    apart = [unshared(tree) for tree in trees]
    n_apart = chosen_tokens(apart, len(apart))

    @functools.cache
    def alone(shape: TreeShape, num_packs: int) -> Totals:
        tree = tree_of_shape(shape)
        return totals_from(bench.ours([[tree]] * num_packs, fit_tokens([tree])))

    shapes = [shape_of(tree) for tree in trees]
    # A step of two micro-batches less one of one is a micro-batch; the rest of this is an update.
    one, two = alone(shapes[0], 1), alone(shapes[0], 2)
    update = sub(one, sub(two, one))
    singly = added([alone(shape, 1) for shape in shapes])
    packs = packed(trees, n)
    config = bench.config
    num_scored = sum(shape.chosen + shape.rejected for shape in shapes)
    head = 2.0 * num_scored * config.hidden_size * config.vocab_size
    last = 2.0 * n * len(packs) * config.hidden_size * config.intermediate_size
    off = {
        "prompts apart": totals_from(bench.ours(packed(apart, n_apart), n_apart)),
        "a pair a micro-batch": sub(singly, added([update] * (len(shapes) - 1))),
        "logits a second time": added([usual, products(bench.card, head)]),
        "down product a second time": added(
            [usual, products(bench.card, last * config.num_hidden_layers)]
        ),
        "reference in the step": added([usual, totals_from(bench.ours(packs, n, trains=False))]),
    }
    return {
        name: [each.best_seconds / usual.best_seconds, each.other_seconds / usual.other_seconds]
        for name, each in off.items()
    }


def chosen_tokens(trees: list[Tree], num_pairs: int) -> int:
    """N, as a run chooses it."""
    limit = max(PACK_TOKENS_LIMIT, *(fit_tokens([tree]) for tree in trees))
    return choose_pack_tokens(trees, num_pairs, limit=limit, multiple=CARD_TOKEN_MULTIPLE)


def products(card: Card, flops: float) -> Totals:
    """Products of 16 bits alone, at the card's rates."""
    seconds = [flops / (card.flops * case.products) for case in (BEST, OTHER)]
    low, high = seconds
    return Totals(flops, 0.0, 0.0, 0.0, low, 0.0, high)


def packed(trees: Sequence[Tree], n: int) -> list[Sequence[Tree]]:
    """The pairs of each micro-batch."""
    return [pack.trees for pack in pack_trees(trees, n)]


def has_room(bench: Bench, reserved_bytes: int) -> bool:
    """Whether that and the context fit on the card."""
    return reserved_bytes + CONTEXT_BYTES <= bench.card.memory_bytes


def totals_from(found: Rehearsal) -> Totals:
    """What a rehearsed step computes."""
    numbers = (found.flops, found.bytes_moved, found.link_bytes, found.launches)
    low, high = found.seconds
    return Totals(*numbers, low, 0.0, high)


def added(parts: Sequence[Totals]) -> Totals:
    """The sum."""
    return Totals(*map(sum, zip(*parts, strict=True)))


def sub(whole: Totals, part: Totals) -> Totals:
    """The difference."""
    return Totals(*(a - b for a, b in zip(whole, part, strict=True)))


def middle(steps: list[Any]) -> Any:
    """The median step by the seconds of its totals."""
    return sorted(steps, key=lambda step: step[0].best_seconds)[(len(steps) - 1) // 2]


def row_of(impl: str, totals: Totals, num_batches: int, tokens: int, reserved_bytes: int) -> Row:
    """A line of the table."""
    return {
        "impl": impl,
        "micro_batches": num_batches,
        "tokens": tokens,
        "peak_reserved_bytes": reserved_bytes,
        "flops": totals.flops,
        "bytes_moved": totals.nbytes,
        "launches": round(totals.launches),
        "seconds": [totals.best_seconds, totals.other_seconds],
    }


def rows_of(bench: Bench, work: Workload, options: argparse.Namespace) -> list[Row]:
    """Print and give all rows of a card and some steps."""
    ours, trees, n = our_rows(bench, work, options.pairs)
    rows = [*ours, *peer_rows(bench, work, options.batches)]
    best = min(ours, key=lambda row: row["seconds"][0])
    print(f"\n{bench.card.name}, a step of {options.pairs} pairs, {work.name} (rehearsed)")
    print(
        f"{'':47}{'batches':>8}{'tokens':>8}{'reserved':>10}{'TFLOP':>8}{'GB':>8}"
        f"{'launches':>10}{'seconds':>16}{'over ours':>14}"
    )
    for row in rows:
        row["ratio"] = [a / b for a, b in zip(row["seconds"], best["seconds"], strict=True)]
        row["fits"] = has_room(bench, row["peak_reserved_bytes"])
        reserved = f"{row['peak_reserved_bytes'] / GIB:.2f}" + " " * row["fits"]
        low, high = row["seconds"]
        print(
            f"{row['impl']:47}{row['micro_batches']:8}{row['tokens']:8}"
            f"{reserved + '!' * (not row['fits']):>10}{row['flops'] / 1e12:8.0f}"
            f"{row['bytes_moved'] / 1e9:8.0f}{row['launches']:10}{f'{low:.1f} to {high:.1f}':>16}"
            f"{'{:.2f} to {:.2f}'.format(*row['ratio']):>14}",
            flush=True,
        )
    levers = levers_of(bench, trees, n) | {"layers run again": ours[0]["ratio"]}
    print("levers of ours off, seconds over ours:")
    for name, (low, high) in levers.items():
        print(f"  {name:45}{f'{low:.2f} to {high:.2f}':>14}", flush=True)
    return [{"card": bench.card.name, "shape": work.name, "levers_off": levers, "rows": rows}]


def main(arguments: Sequence[str] | None = None) -> int:
    """Rehearse, print, record."""
    options = parse(arguments)
    config = model_config(options.model)
    work_of = functools.cache(functools.partial(peer_work, shortest(config)))
    trace_of = functools.cache(functools.partial(trace_peer, config))
    cards = [find_card(name) for name in options.cards.split(",")]

    traces: dict[Any, Trace] = {}

    def ours_of(packs: Sequence[Sequence[Tree]], n: int, **others: Any) -> Trace:
        key = (*(tuple(tree.digest for tree in pack) for pack in packs), n, *others.items())
        if key not in traces:
            traces[key] = trace_ours(config, cards[0], packs, pack_tokens=n, **others)
        return traces[key]

    known = versions()
    peers = ", ".join(f"{name} {known[name]}" for name in ("trl", "peft", "bitsandbytes"))
    print(f"{options.model}; rehearsed, not measured; {peers}; commit {commit()}")
    print("a ! behind reserved (GiB): does not fit beside the context")
    results: list[Row] = []
    for work in workloads(options):
        for card in cards:
            bench = Bench(config, card, work_of, trace_of, ours_of)
            results += rows_of(bench, work, options)
            if options.output:
                names = ("model", "lengths", "max_length", "pairs", "steps", "batches", "seed")
                settings = {name: getattr(options, name) for name in names}
                write_record(options.output, OP, torch.device("cpu"), settings, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())

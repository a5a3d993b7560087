"""`plan`: whether training fits on a card, what needs the memory, and about how long a step takes.

Nothing but config.json is read, and the card need not be here: the training step itself is
rehearsed on tensors without memory. So what is printed is rehearsed, never measured.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.table import Table
from transformers import PretrainedConfig

from lowmem_dpo.console import duration, note, say, size
from lowmem_dpo.machine.card_table import CARDS, Card, find_card
from lowmem_dpo.machine.cards import this_machine
from lowmem_dpo.memory.levers import Levers
from lowmem_dpo.memory.rehearsal import CONTEXT_BYTES, Rehearsal
from lowmem_dpo.model.head import check_tied_head
from lowmem_dpo.model.language_model import rope_limit
from lowmem_dpo.packs.packing import CARD_TOKEN_MULTIPLE, choose_pack_tokens, round_up_tokens
from lowmem_dpo.settings.configs import PlanConfig
from lowmem_dpo.settings.groups import LossSettings, OptimizerSettings, parse_bytes
from lowmem_dpo.steps.rehearsed import StepSettings, TreeShape, rehearse, tree_of_shape
from lowmem_dpo.training.policy import adapter_spec
from lowmem_dpo.training.run import PACK_TOKENS_LIMIT
from lowmem_dpo.weights.bitsandbytes_files import check_kept_quantised
from lowmem_dpo.weights.folders import load_config, resolve_source

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
LENGTH_MULTIPLE = 64
MAX_REHEARSALS = 9
# What is tried where a step does not fit: what costs the least time first.
LEAST: dict[str, Any] = {
    "keep_activations": "nothing",
    "optim": "adamw_8bit",
    "embedding_weight": "host",
    "head_weight": "host",
    "layer_inputs": "host",
    "layer_weights": "host",
}
REMEDIES: tuple[dict[str, Any], ...] = (
    *({name: value} for name, value in LEAST.items()),
    {name: value for name, value in LEAST.items() if name != "layer_weights"},
    LEAST,
)


@dataclass(frozen=True)
class Planned:
    """A rehearsed step, and what it is a step of.

    Attributes:
        rehearsal: Of one or two of its micro-batches.
        pack_tokens: Tokens of a micro-batch.
        num_packs: Micro-batches of a step.
        seconds: Of a step: at best, and under less favourable assumptions.
    """

    rehearsal: Rehearsal
    pack_tokens: int
    num_packs: int
    seconds: tuple[float, float]


def plan(config: PlanConfig) -> None:
    """Print what a training step needs on a card.

    Raises:
        ValueError: If no model or card is given, or it is not known.
    """
    if config.model is None:
        raise ValueError("no model given; set --model to a folder or a Hugging Face id")
    card = None
    if not config.all_cards:
        card = find_card(config.card) if config.card else _card_here()
    base, init_adapter, _ = resolve_source(config.model, config.init_adapter)
    model = load_config(base, config.max_length)
    if model.tie_word_embeddings:
        check_tied_head(config.head_quantization, config.head_weight, config.embedding_weight)
    if getattr(model, "quantization_config", None):
        check_kept_quantised(base, config.quantization)
    config = replace(config, init_adapter=init_adapter)
    if config.smallest:
        config = replace(config, **_that_can_be(LEAST, model, config))
    if card is None:
        note(f"rehearsing steps of {base} for every card; this takes a few minutes")
        say_cards(cards_and_lengths(model, config), base, as_json=config.json)
        return
    note(f"rehearsing steps of {base} for {card.name}; this may take a minute")
    planned = plan_step(model, card, config)
    remedy = None
    if not planned.rehearsal.fits:
        remedy = next(_remedies_that_fit(model, card, config), None)
    longest = longest_length(model, card, config, planned.rehearsal)
    if config.json:
        print(json.dumps(_as_json(planned, config, longest, remedy)))
        return
    say(_heading(planned, config, base))
    say(_table(planned.rehearsal))
    for line in _findings(planned, config, longest, remedy):
        say(line)


def _card_here() -> Card:
    """The card of this machine, with the memory that its driver tells."""
    cards = this_machine().cards
    if not cards:
        raise ValueError("there is no card here; name one, such as --card 'RTX 3060'")
    try:
        known = find_card(cards[0].name)
    except ValueError as error:
        raise ValueError(f"{error}; or name one with --card") from None
    properties = torch.cuda.get_device_properties(0)
    return replace(known, name=cards[0].name, memory_bytes=properties.total_memory)


def plan_step(model: PretrainedConfig, card: Card, config: PlanConfig) -> Planned:
    """Rehearse a step of pairs of the longest length.

    Raises:
        ValueError: If pack_tokens is less than a pair.
    """
    prompt = config.max_length // 2
    shape = TreeShape(prompt, config.max_length - prompt, config.max_length - prompt)
    tree = tree_of_shape(shape)
    pack_tokens = config.pack_tokens and round_up_tokens(config.pack_tokens, CARD_TOKEN_MULTIPLE)
    if pack_tokens is None:
        least = round_up_tokens(tree.num_tokens, CARD_TOKEN_MULTIPLE)
        pack_tokens = choose_pack_tokens(
            [tree] * config.batch_size,
            config.batch_size,
            limit=max(PACK_TOKENS_LIMIT, least),
            multiple=CARD_TOKEN_MULTIPLE,
        )
    if pack_tokens < tree.num_tokens:
        raise ValueError(
            f"pack_tokens {config.pack_tokens} is less than the longest pair ({tree.num_tokens} "
            "tokens); raise it, leave it out, or lower max_length"
        )
    pairs_a_pack = pack_tokens // tree.num_tokens
    num_packs = math.ceil(config.batch_size / pairs_a_pack)
    num_rehearsed = min(num_packs, 2)  # the second finds the gradients of the first
    adapter = adapter_spec(config, config.init_adapter)
    assert adapter is not None
    found = rehearse(
        model,
        card,
        StepSettings(
            config,
            adapter,
            OptimizerSettings(optim=config.optim),
            LossSettings(),
            config.head_kernel,
        ),
        Levers.of(config, model.num_hidden_layers),
        [[tree] * min(config.batch_size, pairs_a_pack)] * num_rehearsed,
        pack_tokens=pack_tokens,
        limit_bytes=_limit_bytes(card, config),
    )
    low, high = (seconds * num_packs / num_rehearsed for seconds in found.seconds)
    return Planned(found, pack_tokens, num_packs, (low, high))


def _limit_bytes(card: Card, config: PlanConfig) -> int:
    """What torch may reserve: what the context leaves of the card, or the limit if that is less."""
    limit = card.memory_bytes - CONTEXT_BYTES
    return limit if config.memory_limit is None else min(limit, parse_bytes(config.memory_limit))


def _remedies_that_fit(
    model: PretrainedConfig, card: Card, config: PlanConfig
) -> Iterator[dict[str, Any]]:
    for remedy in REMEDIES:
        changed = _that_can_be(remedy, model, config)
        if changed and plan_step(model, card, replace(config, **changed)).rehearsal.fits:
            yield changed


def _that_can_be(
    wanted: dict[str, Any], model: PretrainedConfig, config: PlanConfig
) -> dict[str, Any]:
    """Of some settings, those that change something and that this model can have."""
    unfit = {"head_weight"} if config.head_quantization != "none" else set()
    if model.tie_word_embeddings:
        unfit |= {"head_weight", "embedding_weight"}
    if config.quantization == "none":
        unfit.add("layer_weights")
    return {n: v for n, v in wanted.items() if n not in unfit and getattr(config, n) != v}


def cards_and_lengths(
    model: PretrainedConfig, config: PlanConfig
) -> list[tuple[Card, dict[int, str]]]:
    """Of every known card, which lengths fit.

    A trace depends on a card only in whether our kernels run there, so two are rehearsed.

    Returns:
        Cards, each with lengths in tokens to yes, host (in the least memory) or no.
    """
    lengths = [n for n in LENGTHS if n <= model.max_position_embeddings]
    config = replace(config, all_cards=False)
    least = replace(config, **_that_can_be(LEAST, model, config))
    needed: dict[tuple[bool, int, str], int] = {}
    for card in (find_card("T4"), find_card("4090")):
        for length in lengths:
            for name, each in (("yes", config), ("host", least)):
                found = plan_step(model, card, replace(each, max_length=length, batch_size=1))
                key = card.has_bfloat16, length, name
                needed[key] = found.rehearsal.peak_reserved_bytes

    def answer(card: Card, length: int) -> str:
        room = card.memory_bytes - CONTEXT_BYTES
        fitting = (n for n in ("yes", "host") if needed[card.has_bfloat16, length, n] <= room)
        return next(fitting, "no")

    return [(card, {n: answer(card, n) for n in lengths}) for card in CARDS]


def say_cards(found: list[tuple[Card, dict[int, str]]], base: str, *, as_json: bool) -> None:
    """Print which lengths fit on which card."""
    if as_json:
        print(json.dumps({card.name: answers for card, answers in found}))
        return
    lengths = list(found[0][1])
    say(f"{base}: max_length that fits, one pair a micro-batch; rehearsed, not measured\n")
    table = Table("card", *map(str, lengths))
    for card, answers in found:
        table.add_row(card.name, *answers.values())
    say(table)
    say("host: with --smallest true, which keeps on the host what can be there; slower")


def longest_length(
    model: PretrainedConfig, card: Card, config: PlanConfig, first: Rehearsal
) -> int | None:
    """The longest max_length that fits; None if none does.

    Memory grows about linearly with it, so each next length to rehearse is where a line through
    the last two meets the limit.

    Args:
        model: Its config.json.
        card: The card.
        config: All else.
        first: Of `config.max_length`.
    """
    bound = model.max_position_embeddings
    bound = min(bound, rope_limit(model) or bound)
    config = replace(config, pack_tokens=None)  # as many as each length needs

    def needs(length: int) -> tuple[int, bool]:
        found = plan_step(model, card, replace(config, max_length=length)).rehearsal
        return found.peak_reserved_bytes, found.fits

    known = config.max_length, (first.peak_reserved_bytes, first.fits)
    return find_longest(needs, known, bound, _limit_bytes(card, config))


def find_longest(
    needs: Callable[[int], tuple[int, bool]],
    known: tuple[int, tuple[int, bool]],
    bound: int,
    limit_bytes: int,
) -> int | None:
    """The longest length that fits, within 64 tokens or 3 %; None if none does.

    Args:
        needs: The bytes that a length needs, and whether it fits.
        known: A length and its answer.
        bound: The longest that is of use.
        limit_bytes: About what fits.
    """
    points = {known[0]: known[1]}
    highest = bound // LENGTH_MULTIPLE
    for _ in range(MAX_REHEARSALS):
        low = max((n // LENGTH_MULTIPLE for n, (_, fits) in points.items() if fits), default=0)
        high = min(
            (-(-n // LENGTH_MULTIPLE) for n, (_, fits) in points.items() if not fits),
            default=highest + 1,
        )
        meets = _where_a_line_meets(points, limit_bytes)
        no_more = high if meets is None else min(high, meets // LENGTH_MULTIPLE)
        if high - low <= 1 or (low and no_more - low <= low // 32):
            break
        if meets is None:
            guess = max(2 * low, 1) if low or known[1][1] else high // 2
        else:  # a little below, since what is a little above says less
            guess = no_more - no_more // 64
        guess = min(max(guess, low + 1), high - 1)
        points[guess * LENGTH_MULTIPLE] = needs(guess * LENGTH_MULTIPLE)
    longest = max(low * LENGTH_MULTIPLE, known[0] if known[1][1] else 0)
    return longest or None


def _where_a_line_meets(points: dict[int, tuple[int, bool]], limit_bytes: int) -> int | None:
    """The length at which the line through the last points needs so many bytes, if it rises."""
    (a, (bytes_a, _)), *others = list(points.items())[::-1]
    for b, (bytes_b, _) in others:
        if (bytes_a - bytes_b) * (a - b) > 0:
            return int(a + (limit_bytes - bytes_a) * (a - b) / (bytes_a - bytes_b))
    return None


def _heading(planned: Planned, config: PlanConfig, base: str) -> str:
    card, prompt = planned.rehearsal.card, config.max_length // 2
    limit = f", limited to {config.memory_limit}" if config.memory_limit else ""
    verdict = "fits" if planned.rehearsal.fits else "does not fit"
    return (
        f"{base} on {card.name} ({size(card.memory_bytes)}{limit}): {verdict}\n"
        f"pairs of {config.max_length} tokens a sequence (prompt {prompt}), {config.batch_size} a "
        f"step, in {planned.num_packs} micro-batches of {planned.pack_tokens} tokens\n"
        "rehearsed on tensors without memory, not measured\n"
    )


def _table(found: Rehearsal) -> Table:
    """Bytes by what they are for, largest first."""
    table = Table("at the peak", "on the card", "on the host")
    here, there = found.components, found.host_components
    names = sorted(here.keys() | there.keys(), key=lambda n: -max(here.get(n, 0), there.get(n, 0)))
    for name in names:
        if max(here.get(name, 0), there.get(name, 0)) >= 2**20:
            table.add_row(name, _cell(here.get(name, 0)), _cell(there.get(name, 0)))
    rest = found.peak_reserved_bytes - sum(nbytes for nbytes in here.values() if nbytes >= 2**20)
    table.add_row("small tensors, gaps of the allocator", _cell(rest), "")
    table.add_row("CUDA's context (assumed)", _cell(CONTEXT_BYTES), "")
    total = found.peak_reserved_bytes + CONTEXT_BYTES
    table.add_row("all", _cell(total), _cell(found.host_bytes), style="bold")
    return table


def _cell(nbytes: int) -> str:
    return size(nbytes) if nbytes >= 2**20 else ""


def _findings(
    planned: Planned, config: PlanConfig, longest: int | None, remedy: dict[str, Any] | None
) -> Iterator[str]:
    low, high = planned.seconds
    yield f"a step takes {duration(low)} to {duration(high)}, by the card's nominal rates"
    if longest is None:
        found, weights = planned.rehearsal.components, ("NF4 weights", "dense weights")
        held = sum(found.get(name, 0) for name in (*weights, "embedding", "head"))
        yield f"no max_length fits: the weights that stay on the card are {size(held)}"
    else:
        yield f"longest max_length that fits: {longest}"
    if remedy:
        flags = " ".join(f"--{name} {value}" for name, value in remedy.items())
        yield f"what would make it fit: {flags}"
    elif not planned.rehearsal.fits and longest is not None:
        yield f"what would make it fit: --max_length {longest}"


def _as_json(
    planned: Planned, config: PlanConfig, longest: int | None, remedy: dict[str, Any] | None
) -> dict[str, Any]:
    found = planned.rehearsal
    levers = ("quantization", "head_quantization", *LEAST)
    return {
        "card": found.card.name,
        "fits": found.fits,
        "plan": {name: getattr(config, name) for name in levers}
        | {
            "max_length": config.max_length,
            "pack_tokens": planned.pack_tokens,
            "micro_batches_per_step": planned.num_packs,
        },
        "peak_allocated_bytes": found.peak_allocated_bytes,
        "peak_reserved_bytes": found.peak_reserved_bytes,
        "context_bytes_assumed": CONTEXT_BYTES,
        "host_bytes": found.host_bytes,
        "longest_max_length": longest,
        "seconds_per_step": list(planned.seconds),
        "components": found.components,
        "host_components": found.host_components,
        "remedy": remedy,
        "is_measured": False,
    }

"""`plan`: whether training fits on a card, what needs the memory, and about how long a run takes.

Without data nothing but config.json is read, and the card need not be here: the training step
itself is rehearsed on tensors without memory, and planned as `train` would plan it. So what is
printed is rehearsed, never measured.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext, redirect_stdout, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch
from rich.table import Table
from transformers import PretrainedConfig

from lowmem_dpo.console import duration, note, say, size
from lowmem_dpo.files import cache_folder
from lowmem_dpo.losses.objective import Objective
from lowmem_dpo.machine.card_here import available_host_bytes, card_of, free_bytes
from lowmem_dpo.machine.card_table import CARDS, Card, find_card
from lowmem_dpo.machine.cards import this_machine
from lowmem_dpo.memory.limits import check_limit
from lowmem_dpo.memory.rehearsal import CONTEXT_BYTES, Rehearsal
from lowmem_dpo.model.head import check_tied_head
from lowmem_dpo.model.language_model import rope_limit
from lowmem_dpo.pipeline.plan_picture import check_place, draw_memory
from lowmem_dpo.settings.configs import PlanConfig
from lowmem_dpo.settings.groups import MemorySettings, parse_bytes
from lowmem_dpo.steps.planner import Plan, Planner, Room, Workload
from lowmem_dpo.steps.rehearsed import StepSettings, TreeShape, tree_of_shape
from lowmem_dpo.tokens.templates import choose_template
from lowmem_dpo.tokens.trees import Tree
from lowmem_dpo.training.memory_plan import limited, plan_lines, wanted_pack_tokens
from lowmem_dpo.training.pairs import Pairs, check_token_ids, load_pairs
from lowmem_dpo.training.policy import adapter_spec, check_quantised_files, stored_config
from lowmem_dpo.training.run import Batches
from lowmem_dpo.weights.folders import load_config, load_tokenizer, resolve_source

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
LENGTH_MULTIPLE = 64
MAX_REHEARSALS = 9
LONGEST_IN_SECONDS = 4096
# What a person may have set that a plan would choose otherwise.
PLACES = (
    *("keep_activations", "layer_inputs", "layer_weights", "embedding_weight", "head_weight"),
    "optimizer_state",
)
CHOICES = (*PLACES, "pack_tokens")
# Token ids that are made up lie in memory: far more than any model has positions for.
LONGEST_MADE_UP = 2**20


class Longest(NamedTuple):
    """The longest max_length that fits, as far as was looked.

    Attributes:
        length: In tokens; None if none fits.
        is_bound: Whether longer ones were not tried, which would take minutes.
    """

    length: int | None
    is_bound: bool


@dataclass(frozen=True)
class Forecast:
    """What is said of a run.

    Attributes:
        plan: Of its memory.
        base: The model's name.
        trees: Its pairs.
        num_steps: Of the run; None without data.
        reference_seconds: For scoring once the pairs that need it; None without data or reference.
        longest: The longest max_length that fits.
        remedy: Words of what would make it fit; empty where it does, or nothing would.
    """

    plan: Plan
    base: str
    trees: list[Tree]
    num_steps: int | None
    reference_seconds: tuple[float, float] | None
    longest: Longest
    remedy: str


def plan(config: PlanConfig) -> None:
    """Print what training needs on a card.

    Raises:
        ValueError: If no model or card is given, or it is not known.
        OSError: If the picture cannot be written.
    """
    output = sys.stdout
    # Whatever is said on the way to the object is no part of it.
    with redirect_stdout(sys.stderr) if config.json else nullcontext():
        _plan(config, output)


def _plan(config: PlanConfig, output: TextIO) -> None:
    """As `plan`, with the object printed to `output`."""
    if config.model is None:
        raise ValueError("no model given; set --model to a folder or a Hugging Face id")
    if config.data is None and config.max_length > LONGEST_MADE_UP:
        raise ValueError(
            f"max_length {config.max_length} is more than the {LONGEST_MADE_UP} tokens that are "
            "planned without data; lower it, or give --data"
        )
    if config.picture:
        check_place(Path(config.picture))
    card = room = None
    if not config.all_cards:
        card, room = _card_and_room(config)
    base, init_adapter, _ = resolve_source(config.model, config.init_adapter)
    model = load_config(base, config.max_length)
    with suppress(ValueError):  # of weights, which need not be here
        model = stored_config(base, model)
    if model.tie_word_embeddings:
        check_tied_head(config.head_quantization, config.head_weight, config.embedding_weight)
    check_quantised_files(base, model, config, config)
    config = replace(config, init_adapter=init_adapter)
    if config.smallest:
        config = replace(config, optim="adamw_8bit" if config.optim == "adamw" else config.optim)
    if card is None or room is None:
        note(f"rehearsing steps of {base} for every card; this takes a few minutes")
        found = cards_and_lengths(model, config)
        if config.json:
            print(json.dumps({each.name: answers for each, answers in found}), file=output)
        else:
            say_cards(found, base)
        return
    note(f"rehearsing steps of {base} for {card.name}; this may take a minute")
    forecast = forecast_of(model, card, room, config, base)
    if config.json:
        print(json.dumps(_as_json(forecast, config)), file=output)
    else:
        say(_heading(forecast, config))
        say(_table(forecast.plan.rehearsal))
        for line in _findings(forecast, model, config):
            say(line)
    if config.picture:
        draw_memory(forecast.plan.rehearsal, room.card_bytes, Path(config.picture))
        note(f"the picture is in {config.picture}")


def _card_and_room(config: PlanConfig) -> tuple[Card, Room]:
    """The card that is named, or the one here with what is free of it."""
    if config.card:
        card = find_card(config.card)
        if config.memory_limit:
            check_limit(parse_bytes(config.memory_limit), card.memory_bytes)
        return card, limited(Room(card.memory_bytes - CONTEXT_BYTES), config)
    if not this_machine().cards:
        raise ValueError("there is no card here; name one, such as --card 'RTX 3060'")
    device = torch.device("cuda", 0)
    torch.zeros(1, device=device)  # so that the context has its memory
    return card_of(device), limited(Room(free_bytes(device), available_host_bytes()), config)


def planner_of(
    model: PretrainedConfig, card: Card, room: Room, config: PlanConfig, trees: list[Tree]
) -> Planner:
    """What plans steps of some pairs."""
    adapter = adapter_spec(config, config.init_adapter, warns=False)
    pack_tokens = config.pack_tokens
    if pack_tokens is not None:
        pack_tokens = wanted_pack_tokens(pack_tokens, trees, torch.device("cuda"))
    return Planner(
        model,
        card,
        StepSettings(config, adapter, config, config, config.head_kernel),
        Workload(trees, config.batch_size, config.seed),
        replace(config, pack_tokens=pack_tokens),
        room,
    )


def forecast_of(
    model: PretrainedConfig, card: Card, room: Room, config: PlanConfig, base: str
) -> Forecast:
    """Plan a run, and look how far it could go.

    Raises:
        ValueError: If the data cannot be read, or pack_tokens is less than a pair.
    """
    pairs = Pairs([_tree_of_length(config.max_length)] * config.batch_size, [], "", {})
    num_steps, num_scored = None, 0
    if config.data is not None:
        tokenizer = load_tokenizer(base, config.init_adapter, model)
        template = choose_template(tokenizer, config)
        folder = cache_folder(config.cache_dir)
        pairs = load_pairs(config, config, template, folder, seed=config.seed)
        batches = Batches.of(config, len(pairs.train))
        num_steps, num_scored = batches.num_steps, len(batches.used()) + len(pairs.evaluation)
    check_token_ids(pairs, model)
    trees = pairs.train + pairs.evaluation
    planner = planner_of(model, card, room, config, trees)
    found = planner.smallest() if config.smallest else planner.best()
    remedy = "" if found.fits else _remedy(planner)
    reference = None
    if num_steps is not None and Objective.of(config).needs_reference:
        scoring = replace(planner, trains=False).take(found.levers, found.pack_tokens)
        low, high = (seconds * num_scored / config.batch_size for seconds in scoring.seconds)
        reference = (low, high)
    longest = longest_length(model, card, room, config)
    return Forecast(found, base, trees, num_steps, reference, longest, remedy)


def _tree_of_length(max_length: int) -> Tree:
    """A pair whose sequences have that length: half of it prompt, half completion."""
    prompt = max_length // 2
    return tree_of_shape(TreeShape(prompt, max_length - prompt, max_length - prompt))


def _remedy(planner: Planner) -> str:
    """What to set otherwise, of memory and optimizer, so that it fits; empty if nothing helps."""
    settings, memory = planner.settings, planner.memory
    usual = {field.name: field.default for field in fields(MemorySettings)}
    chosen = [name for name in CHOICES if getattr(memory, name) != usual[name]]
    changes: dict[str, Any] = {name: usual[name] for name in chosen}
    free = replace(memory, **changes)
    small = replace(settings, optimizer=replace(settings.optimizer, optim="adamw_8bit"))
    words = [f"leave {', '.join(chosen)} out"] if chosen else []
    tries = []
    if settings.optimizer.optim == "adamw" and memory.optimizer_state != "host":
        tries.append((small, memory, ["--optim adamw_8bit"]))
    if chosen:
        tries.append((settings, free, words))
        tries.append((small, free, [*words, "--optim adamw_8bit"]))
    for each, its_memory, said in tries:
        if replace(planner, settings=each, memory=its_memory).least().fits:
            return " and ".join(said)
    return ""


def cards_and_lengths(
    model: PretrainedConfig, config: PlanConfig
) -> list[tuple[Card, dict[int, str]]]:
    """Of every known card, which lengths fit.

    A trace depends on a card only in whether our kernels run there, so two are rehearsed.

    Returns:
        Cards, each with lengths in tokens to yes, host (in the least memory) or no.
    """
    lengths = [n for n in LENGTHS if n <= model.max_position_embeddings]
    config = replace(config, all_cards=False, batch_size=1)
    needed: dict[tuple[bool, int, str], int] = {}
    for card in (find_card("T4"), find_card("4090")):
        for length in lengths:
            room = Room(card.memory_bytes)
            planner = planner_of(model, card, room, config, [_tree_of_length(length)])
            for name, found in (("yes", planner.usual()), ("host", planner.smallest())):
                key = card.has_bfloat16, length, name
                needed[key] = found.rehearsal.peak_reserved_bytes

    def answer(card: Card, length: int) -> str:
        room = card.memory_bytes - CONTEXT_BYTES
        fitting = (n for n in ("yes", "host") if needed[card.has_bfloat16, length, n] <= room)
        return next(fitting, "no")

    return [(card, {n: answer(card, n) for n in lengths}) for card in CARDS]


def say_cards(found: list[tuple[Card, dict[int, str]]], base: str) -> None:
    """Print which lengths fit on which card."""
    lengths = list(found[0][1])
    say(f"{base}: max_length that fits, one pair a micro-batch; rehearsed, not measured\n")
    table = Table("card", *map(str, lengths))
    for card, answers in found:
        table.add_row(card.name, *answers.values())
    say(table)
    say("host: with weights and layer inputs on the host, as far as they can be; slower")


def longest_length(model: PretrainedConfig, card: Card, room: Room, config: PlanConfig) -> Longest:
    """The longest max_length that fits in the least memory.

    Memory grows about linearly with it, so each next length to rehearse is where a line through
    the last two meets the limit.
    """
    bound = model.max_position_embeddings
    bound = min(bound, rope_limit(model) or bound)
    start = min(config.max_length, bound)
    highest = bound if config.longest else min(bound, max(start, LONGEST_IN_SECONDS))
    config = replace(config, pack_tokens=None)  # as many as each length needs

    def needs(length: int) -> tuple[int, bool]:
        planner = planner_of(model, card, room, config, [_tree_of_length(length)])
        found = planner.smallest() if config.smallest else planner.least()
        return found.rehearsal.peak_reserved_bytes, found.fits

    length = find_longest(needs, (start, needs(start)), highest, room.card_bytes)
    reached = length is not None and length >= highest - highest // 32
    return Longest(length, is_bound=reached and highest < bound)


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
        elif meets // LENGTH_MULTIPLE >= high and high <= highest:  # the line is wrong there
            guess = (low + high) // 2
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


def _heading(forecast: Forecast, config: PlanConfig) -> str:
    found, card = forecast.plan, forecast.plan.rehearsal.card
    limit = f", limited to {config.memory_limit.strip()}" if config.memory_limit else ""
    longest = max(tree.num_tokens for tree in forecast.trees)
    pairs = f"pairs of {config.max_length} tokens a sequence (prompt {config.max_length // 2})"
    if config.data is not None:
        pairs = f"{len(forecast.trees)} pairs of {config.data}, the longest of {longest} tokens"
    return (
        f"{forecast.base} on {card.name} ({size(card.memory_bytes)}{limit}): "
        f"{'fits' if found.fits else 'does not fit'}\n"
        f"{pairs}, {config.batch_size} a step,\n"
        f"in {found.num_packs:.3g} micro-batches of {found.pack_tokens} tokens\n"
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


def _findings(forecast: Forecast, model: PretrainedConfig, config: PlanConfig) -> Iterator[str]:
    found = forecast.plan
    is_host_short = found.rehearsal.fits and not found.fits
    if is_host_short:
        yield (
            f"{size(found.rehearsal.host_bytes)} of host memory are needed, "
            f"and host_memory_limit is {config.host_memory_limit}"
        )
    yield from plan_lines(found, found.rehearsal.card, model.num_hidden_layers)[1:]
    if forecast.num_steps is not None:
        scoring = forecast.reference_seconds
        low, high = (
            each * forecast.num_steps + its_scoring
            for each, its_scoring in zip(found.seconds, scoring or (0.0, 0.0), strict=True)
        )
        included = ", the reference's pass included" if scoring else ""
        took = f"{duration(low)} to {duration(high)}"
        yield f"a run of {forecast.num_steps} steps takes {took}{included}"
    longest, is_bound = forecast.longest
    if longest is None and is_host_short:
        yield "no max_length fits in so little host memory"
    elif longest is None:
        held, weights = found.rehearsal.components, ("NF4 weights", "dense weights")
        stays = sum(held.get(name, 0) for name in (*weights, "embedding", "head"))
        yield f"no max_length fits: the weights that stay on the card are {size(stays)}"
    elif is_bound:
        yield f"longest max_length that fits: at least {longest}; --longest true looks how far"
    else:
        yield f"longest max_length that fits, with the least on the card: {longest}"
    if forecast.remedy:
        yield f"what would make it fit: {forecast.remedy}"
    elif not found.fits and longest is not None:
        yield f"what would make it fit: --max_length {longest}"


def _as_json(forecast: Forecast, config: PlanConfig) -> dict[str, Any]:
    found, rehearsal = forecast.plan, forecast.plan.rehearsal
    return {
        "card": rehearsal.card.name,
        "fits": found.fits,
        "plan": {name: getattr(config, name) for name in ("quantization", "head_quantization")}
        | {
            "optim": config.optim,
            "max_length": config.max_length,
            "pack_tokens": found.pack_tokens,
            "micro_batches_per_step": found.num_packs,
        }
        | asdict(found.levers),
        "peak_allocated_bytes": rehearsal.peak_allocated_bytes,
        "peak_reserved_bytes": rehearsal.peak_reserved_bytes,
        "context_bytes_assumed": CONTEXT_BYTES,
        "host_bytes": rehearsal.host_bytes,
        "longest_max_length": forecast.longest.length,
        "longest_is_bound": forecast.longest.is_bound,
        "seconds_per_step": list(found.seconds),
        "num_steps": forecast.num_steps,
        "reference_seconds": forecast.reference_seconds and list(forecast.reference_seconds),
        "components": rehearsal.components,
        "host_components": rehearsal.host_components,
        "remedy": forecast.remedy or None,
        "is_measured": False,
    }

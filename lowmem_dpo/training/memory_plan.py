"""The plan of a run's memory: on a card rehearsed for its pairs, on a CPU as the settings say."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lowmem_dpo.console import duration, note, say, size, warn
from lowmem_dpo.machine.card_here import available_host_bytes, card_of, free_bytes, spills
from lowmem_dpo.machine.card_table import Card
from lowmem_dpo.memory.levers import Levers
from lowmem_dpo.memory.limits import limit_memory
from lowmem_dpo.memory.rehearsal import Rehearsal
from lowmem_dpo.packs.packing import CARD_TOKEN_MULTIPLE, round_up_tokens
from lowmem_dpo.records.checkpoints import read_record
from lowmem_dpo.settings.groups import MemorySettings, parse_bytes
from lowmem_dpo.steps.planner import Plan, Planner, Room, Workload
from lowmem_dpo.steps.rehearsed import StepSettings
from lowmem_dpo.tokens.trees import Tree
from lowmem_dpo.training.policy import Source, stored_config


@dataclass(frozen=True)
class MemoryPlan:
    """What was decided of a run's memory before its model is loaded.

    Attributes:
        levers: Places in memory.
        pack_tokens: Tokens of a micro-batch, if they are wanted and not to be chosen.
        plan: As rehearsed for the card; None on a CPU.
        planner: What made it.
    """

    levers: Levers
    pack_tokens: int | None = None
    plan: Plan | None = None
    planner: Planner | None = None

    def holds(self, pack_tokens: int) -> bool:
        """Whether micro-batches of so many tokens fit too."""
        if self.plan is None or pack_tokens <= self.plan.pack_tokens:
            return True
        plan = self.plan_with(pack_tokens)
        return plan is None or plan.fits

    def plan_with(self, pack_tokens: int) -> Plan | None:
        """The plan with micro-batches of so many tokens, as rehearsed; None on a CPU."""
        if self.plan is None or self.planner is None or pack_tokens == self.plan.pack_tokens:
            return self.plan
        return self.planner.take(self.levers, pack_tokens)


def plan_memory(
    source: Source,
    settings: StepSettings,
    work: Workload,
    memory: MemorySettings,
    checkpoint: Path | None = None,
    *,
    trains: bool = True,
) -> MemoryPlan:
    """Decide what is where; on a card by rehearsals, which are said.

    Args:
        source: The model.
        settings: Of a step.
        work: All pairs.
        memory: What the user decided.
        checkpoint: What the run goes on from: with its micro-batches, since log-probs would differ
            in the last bits under others, and with its levers while they fit and the user has not
            decided otherwise.
        trains: Whether steps are taken.

    Raises:
        ValueError: If nothing fits, unless the user wants it tried all the same.
    """
    num_layers = source.config.num_hidden_layers
    wanted, before = memory.pack_tokens, None
    if wanted is not None:
        wanted = wanted_pack_tokens(wanted, work.trees, source.device)
    if checkpoint is not None:
        recorded = read_record(checkpoint)["facts"]
        wanted = recorded["planned_pack_tokens"]
        before = Levers(**recorded["levers"]) if "levers" in recorded else None
    levers, plan, planner = Levers.of(memory, num_layers), None, None
    if source.device.type == "cuda":
        memory = replace(memory, pack_tokens=wanted)
        planner = planner_here(source, settings, work, memory, trains=trains)
        is_allowed = before is not None and before.agree_with(memory, num_layers)
        plan = rehearsed_plan(planner, source.base, before if is_allowed else None)
        levers = plan.levers if plan else levers
    if before is not None and before != levers:
        warn(
            f"the run began with another plan ({before.words(num_layers)}); gradients may differ "
            "in their last bits"
        )
    return MemoryPlan(levers, wanted, plan, planner)


def wanted_pack_tokens(wanted: int, trees: Sequence[Tree], device: torch.device) -> int:
    """The setting pack_tokens; on a card a multiple.

    Raises:
        ValueError: If the longest pair does not fit.
    """
    longest = max(tree.num_tokens for tree in trees)
    if wanted < longest:
        raise ValueError(
            f"pack_tokens {wanted} is less than the longest pair ({longest} tokens); "
            "raise it, leave it out, or lower max_length"
        )
    if device.type != "cuda" or wanted % CARD_TOKEN_MULTIPLE == 0:
        return wanted
    rounded = round_up_tokens(wanted, CARD_TOKEN_MULTIPLE)
    say(f"pack_tokens {wanted}: {rounded}, on a card it is a multiple of {CARD_TOKEN_MULTIPLE}")
    return rounded


def planner_here(
    source: Source, settings: StepSettings, work: Workload, memory: MemorySettings, *, trains: bool
) -> Planner:
    """What plans a run on the card that is here; the arguments are those of `plan_memory`."""
    device = source.device
    room = limited(Room(free_bytes(device), available_host_bytes()), memory)
    if spills():
        limit_memory(room.card_bytes + torch.cuda.memory_allocated(device), device)
    return Planner(
        stored_config(source.base, source.config),
        card_of(device),
        settings,
        work,
        memory,
        room,
        trains=trains,
        say=note,
    )


def limited(room: Room, memory: MemorySettings) -> Room:
    """The room, or what the user gives of it."""
    card_bytes, host_bytes = room
    if memory.memory_limit is not None:
        card_bytes = min(card_bytes, parse_bytes(memory.memory_limit))
    if memory.host_memory_limit is not None:
        limit = parse_bytes(memory.host_memory_limit, "host_memory_limit")
        host_bytes = limit if host_bytes is None else min(host_bytes, limit)
    return Room(card_bytes, host_bytes)


def rehearsed_plan(planner: Planner, base: str, before: Levers | None = None) -> Plan | None:
    """Rehearse until something fits, and say what.

    Args:
        planner: Of this run.
        base: The model's name.
        before: The levers of the session that this one goes on from, kept while they fit.

    Returns:
        The plan; None if rehearsing failed, which is said.

    Raises:
        ValueError: If nothing fits, unless the user wants it tried all the same.
    """
    try:
        plan = None
        if before is not None and planner.memory.pack_tokens:
            plan = planner.take(before, planner.memory.pack_tokens)
        if plan is None or not plan.fits:
            plan = planner.best()
    except Exception as error:  # it stands on parts of torch that change; training does not
        warn_not_rehearsed("the step", error)
        return None
    if not plan.fits:
        text = _why_not(plan, planner, base)
        if planner.memory.memory_check == "error":
            raise ValueError(
                f"{text}; lower max_length, or free memory; memory_check warn tries it all the same"
            )
        warn(f"{text}; it is tried all the same")
    for line in plan_lines(plan, planner.card, planner.model.num_hidden_layers):
        say(line)
    return plan


def warn_not_rehearsed(what: str, error: Exception) -> None:
    """Say that places in memory are as the settings say, since a rehearsal failed."""
    warn(
        f"{what} could not be rehearsed ({type(error).__name__}: {error}), so nothing is planned: "
        "what the settings leave open stays on the card; please report it"
    )


def plan_lines(plan: Plan, card: Card, num_layers: int) -> list[str]:
    """A plan for the user."""
    found, (low, high) = plan.rehearsal, plan.seconds
    host = f", {size(found.host_bytes)} of host memory" if found.host_bytes >= 2**20 else ""
    return [
        f"plan: {size(found.peak_reserved_bytes)} at the peak on {card.name}{host} (rehearsed)",
        f"plan: {plan.levers.words(num_layers)}",
        f"plan: a step takes {duration(low)} to {duration(high)}, by the card's nominal rates",
    ]


def _why_not(plan: Plan, planner: Planner, base: str) -> str:
    """What is needed, and what there is."""
    found, room = plan.rehearsal, planner.room
    longest = max(tree.num_tokens for tree in planner.work.trees)
    if not found.fits:
        needed, there = found.peak_reserved_bytes, room.card_bytes
        where = planner.card.name
    else:
        assert room.host_bytes is not None
        needed, there, where = found.host_bytes, room.host_bytes, "the host"
    return (
        f"{base} does not fit with pairs of {longest} tokens: it needs {size(needed)} of {where}, "
        f"and {size(there)} are free ({plan.levers.words(planner.model.num_hidden_layers)})"
    )


def say_memory(rehearsed: Rehearsal, device: torch.device) -> dict[str, int]:
    """Say what a card was rehearsed to hold and what it held; gives both, in bytes."""
    measured, expected = torch.cuda.max_memory_reserved(device), rehearsed.peak_reserved_bytes
    difference = measured / expected - 1
    say(f"memory: {size(measured)} at the peak, {size(expected)} rehearsed ({difference:+.1%})")
    return {"peak_reserved_bytes": measured, "rehearsed_reserved_bytes": expected}

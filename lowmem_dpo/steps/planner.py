"""Which places in memory a run is given: the fastest that fit, found by rehearsing its step.

First it is tried with all on the card, then with more and more of it in host memory, what costs the
least time first, until a step fits; and where nothing does, with the smallest micro-batch. What
memory is left then is spent on layers that keep what they would otherwise compute again, or, where
layers are streamed, on more of them that stay.

Between two rehearsals numbers are estimated, but what is chosen has been rehearsed itself.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from transformers import PretrainedConfig

from lowmem_dpo.machine.card_table import Card
from lowmem_dpo.memory.levers import LEAST_SLOTS, Levers
from lowmem_dpo.memory.rehearsal import Rehearsal
from lowmem_dpo.memory.trace import Follower
from lowmem_dpo.packs.packing import (
    CARD_TOKEN_MULTIPLE,
    choose_pack_tokens,
    packs_per_step,
    round_up_tokens,
)
from lowmem_dpo.settings.groups import MemorySettings, ModelSettings, PlaceSettings
from lowmem_dpo.steps.rehearsed import StepSettings, rehearse
from lowmem_dpo.tokens.trees import Tree

# Activations of one layer at this size fit small cards; larger micro-batches gain little.
PACK_TOKENS_LIMIT = 4096
# Estimates of layers that keep more: as they are, then a little lower, before none do.
ESTIMATES = (1.0, 0.9, 0.7)
# Settings, what each changes, and of which component it rids the card.
_PARTS: dict[str, tuple[dict[str, Any], str]] = {
    "embedding_weight": ({"embedding_on_host": True}, "embedding"),
    "optimizer_state": ({"optimizer_on_host": True}, "optimizer state"),
    "head_weight": ({"head_on_host": True}, "head"),
    "layer_inputs": ({"inputs_on_host": True}, "layer inputs"),
    "layer_weights": ({"num_slots": LEAST_SLOTS}, "NF4 weights"),
}


class Room(NamedTuple):
    """Bytes that a run may take: on the card, as torch reserves them, and of host memory."""

    card_bytes: int
    host_bytes: int | None = None


@dataclass(frozen=True)
class Workload:
    """The pairs of a run.

    Attributes:
        trees: All of them, at least one.
        batch_size: Pairs of a step.
        seed: Of their order.
    """

    trees: Sequence[Tree]
    batch_size: int
    seed: int = 0

    @property
    def least_pack_tokens(self) -> int:
        """The smallest micro-batch that holds the longest pair."""
        return round_up_tokens(max(tree.num_tokens for tree in self.trees), CARD_TOKEN_MULTIPLE)

    def best_pack_tokens(self) -> int:
        """The micro-batch with the least padding, of usual size."""
        limit = max(PACK_TOKENS_LIMIT, self.least_pack_tokens)
        multiple = CARD_TOKEN_MULTIPLE
        return choose_pack_tokens(
            self.trees, self.batch_size, limit=limit, seed=self.seed, multiple=multiple
        )

    def fullest_pack(self, pack_tokens: int) -> list[Tree]:
        """The longest pair, and beside it those that score the most of their tokens.

        The layers of no micro-batch need more: their memory is of `pack_tokens` and the longest
        pair. The head's is of the tokens that are scored, of which others may have a few more.
        """
        longest = max(self.trees, key=lambda tree: tree.num_tokens)
        pack, room = [longest], pack_tokens - longest.num_tokens
        share = {id(tree): num_scored(tree) / tree.num_tokens for tree in self.trees}
        for tree in sorted(self.trees, key=lambda tree: share[id(tree)], reverse=True):
            if len(pack) == self.batch_size or room <= 0:
                break
            if tree is not longest and tree.num_tokens <= room:
                pack.append(tree)
                room -= tree.num_tokens
        return pack


def num_scored(tree: Tree) -> int:
    """Tokens of both completions."""
    return tree.num_chosen_tokens + tree.num_rejected_tokens


@dataclass(frozen=True)
class Plan:
    """Places in memory, and what a step takes with them.

    Attributes:
        levers: The places.
        pack_tokens: Tokens of a micro-batch.
        num_packs: Micro-batches of a step, the mean.
        rehearsal: Of a step of two micro-batches.
        fits: Whether it fits in what there is, on the card and on the host.
    """

    levers: Levers
    pack_tokens: int
    num_packs: float
    rehearsal: Rehearsal
    fits: bool

    @property
    def seconds(self) -> tuple[float, float]:
        """Of a step: at best, and under less favourable assumptions."""
        low, high = (seconds * self.num_packs / 2 for seconds in self.rehearsal.seconds)
        return low, high


def ladder_of(
    model: PretrainedConfig,
    settings: ModelSettings,
    places: PlaceSettings,
    optim: str | None = None,
) -> list[Levers]:
    """From all on the card to the least there, as far as the settings leave it open.

    Args:
        model: The model's config.json; its head is the embedding where that says so.
        settings: How it is stored.
        places: What the user decided; what has no setting here stays.
        optim: Which optimizer there is; None for none.
    """
    unfit = set() if optim == "adamw" else {"optimizer_state"}
    if model.tie_word_embeddings:
        unfit |= {"embedding_weight", "head_weight"}
    if settings.head_quantization != "none":
        unfit.add("head_weight")
    if settings.quantization != "nf4":
        unfit.add("layer_weights")
    if getattr(places, "keep_activations", "auto") in ("attention", "all"):
        unfit |= {"layer_inputs", "layer_weights"}
    ladder = [Levers.of(places, model.num_hidden_layers)]
    for name, (change, _) in _PARTS.items():
        if name not in unfit and getattr(places, name, None) == "auto":
            ladder.append(replace(ladder[-1], **change))
    return ladder


@dataclass(frozen=True)
class Planner:
    """Finds a plan.

    Args:
        model: The model's config.json.
        card: The card.
        settings: Of a step.
        work: The pairs.
        memory: What the user decided; auto is chosen here.
        room: What there is.
        trains: Whether steps are taken; False for scoring alone.
        say: Told what is tried, before it is.
    """

    model: PretrainedConfig
    card: Card
    settings: StepSettings
    work: Workload
    memory: MemorySettings
    room: Room
    trains: bool = True
    say: Callable[[str], Any] = lambda _: None
    # By tokens of a micro-batch; a planner that is changed begins with none.
    followed: dict[int, dict[Any, Follower]] = field(default_factory=dict, init=False)

    def best(self) -> Plan:
        """The fastest plan that fits; where none does, the one that needs least."""
        first = self.memory.pack_tokens or self.work.best_pack_tokens()
        least = self.memory.pack_tokens or self.work.least_pack_tokens
        for pack_tokens in sorted({first, least}, reverse=True):
            plan = self.take(self._ladder()[0], pack_tokens)
            for levers in self._rungs_below(plan):
                if plan.fits:
                    break
                plan = self.take(levers, pack_tokens)
            plan = self._from_the_disk(plan)
            if plan.fits:
                return self._with_the_rest_spent(plan)
        return plan

    def usual(self) -> Plan:
        """As the settings say, and with what they leave open on the card."""
        return self.take(self._ladder()[0], self.memory.pack_tokens or self.work.least_pack_tokens)

    def smallest(self) -> Plan:
        """The plan that needs the least memory on the card."""
        pack_tokens = self.memory.pack_tokens or self.work.least_pack_tokens
        return self._from_the_disk(self.take(self._ladder()[-1], pack_tokens))

    def least(self) -> Plan:
        """The smallest plan; where the host is short of memory for it, the best one."""
        plan = self.smallest()
        return self.best() if plan.rehearsal.fits and not plan.fits else plan

    def take(self, levers: Levers, pack_tokens: int) -> Plan:
        """Rehearse a step with certain places in memory."""
        self.say(f"rehearsing micro-batches of {pack_tokens} tokens: {self._words(levers)}")
        found = rehearse(
            self.model,
            self.card,
            self.settings,
            levers,
            [self.work.fullest_pack(pack_tokens)] * 2,
            pack_tokens=pack_tokens,
            trains=self.trains,
            limit_bytes=self.room.card_bytes,
            followed=self.followed.setdefault(pack_tokens, {}),
        )
        num_packs = packs_per_step(
            self.work.trees, self.work.batch_size, pack_tokens, seed=self.work.seed
        )
        host_fits = self.room.host_bytes is None or found.host_bytes <= self.room.host_bytes
        return Plan(levers, pack_tokens, num_packs, found, found.fits and host_fits)

    def _words(self, levers: Levers) -> str:
        return levers.words(self.model.num_hidden_layers)

    def _ladder(self) -> list[Levers]:
        optim = self.settings.optimizer.optim
        return ladder_of(self.model, self.settings.model, self.memory, optim)

    def _rungs_below(self, first: Plan) -> Iterator[Levers]:
        """The ladder below its first rung, without rungs that are hopeless by what that needed."""
        ladder, found = self._ladder(), first.rehearsal
        for levers in ladder[1:]:
            rid = [
                component
                for change, component in _PARTS.values()
                if all(getattr(levers, name) == value for name, value in change.items())
            ]
            least = found.peak_allocated_bytes - sum(found.components.get(name, 0) for name in rid)
            if least <= self.room.card_bytes or levers is ladder[-1]:
                yield levers

    def _from_the_disk(self, plan: Plan) -> Plan:
        """The same plan where host memory has room for it, else with the layers on the disk."""
        is_open = self.memory.layer_weights == "auto" and plan.levers.num_slots is not None
        if plan.fits or not plan.rehearsal.fits or not is_open:
            return plan
        if not self.settings.model.quantized_copy:
            return plan
        return self.take(replace(plan.levers, layers_on_disk=True), plan.pack_tokens)

    def _with_the_rest_spent(self, plan: Plan) -> Plan:
        """The same plan, with memory that is left put to use."""
        levers = plan.levers
        if levers.num_slots is not None:
            return self._with_more_slots(plan) if self.memory.layer_weights == "auto" else plan
        if self.trains and self.memory.keep_activations == "auto" and not levers.inputs_on_host:
            return self._with_more_kept(plan)
        return plan

    def _with_more_slots(self, plan: Plan) -> Plan:
        """More layers on the card at a time: those that a pass turns at are not uploaded again."""
        levers, num_layers = plan.levers, self.model.num_hidden_layers
        slot_bytes = plan.rehearsal.components["slots of NF4 layers"] / LEAST_SLOTS
        left = self.room.card_bytes - plan.rehearsal.peak_reserved_bytes
        for share in ESTIMATES:
            num_slots = min(num_layers - 1, LEAST_SLOTS + int(left * share / slot_bytes))
            if num_slots <= LEAST_SLOTS:
                break
            found = self.take(replace(levers, num_slots=num_slots), plan.pack_tokens)
            if found.fits:
                return found
        return plan

    def _with_more_kept(self, plan: Plan) -> Plan:
        """Layers that keep all, or what attention needs, as many as there is room for.

        Of both it is rehearsed what all layers would need and save; of some layers it is estimated
        to be their share, and what is chosen is rehearsed.
        """
        num_layers, levers = self.model.num_hidden_layers, plan.levers
        whole = self.take(replace(levers, num_keep_all=num_layers), plan.pack_tokens)
        if whole.fits:
            return whole
        half = self.take(replace(levers, num_keep_attention=num_layers), plan.pack_tokens)
        costs = [_of_a_layer(each, plan, num_layers) for each in (whole, half)]
        best = plan
        for places, freed_bytes in self._places_for_more(plan):
            left = self.room.card_bytes - plan.rehearsal.peak_reserved_bytes + freed_bytes
            for share in ESTIMATES:
                num_all, num_attention = _most_saved(costs, left * share, num_layers)
                if not num_all and not num_attention:
                    break
                kept = replace(places, num_keep_all=num_all, num_keep_attention=num_attention)
                found = self.take(kept, plan.pack_tokens)
                if found.fits:
                    best = min(best, found, key=lambda each: sum(each.seconds))
                    break
        return best

    def _places_for_more(self, plan: Plan) -> Iterator[tuple[Levers, int]]:
        """Where layers may keep more: as planned, and with the embedding's memory too."""
        yield plan.levers, 0
        moved = replace(plan.levers, embedding_on_host=True)
        if moved != plan.levers and moved in self._ladder():
            yield moved, plan.rehearsal.components.get("embedding", 0)


class _Cost(NamedTuple):
    """What a layer that keeps more needs, and what it saves."""

    nbytes: float
    seconds: float


def _of_a_layer(more: Plan, usual: Plan, num_layers: int) -> _Cost:
    nbytes = more.rehearsal.peak_reserved_bytes - usual.rehearsal.peak_reserved_bytes
    return _Cost(nbytes / num_layers, (sum(usual.seconds) - sum(more.seconds)) / num_layers)


def _most_saved(costs: Sequence[_Cost], left: float, num_layers: int) -> tuple[int, int]:
    """How many layers should keep all, and how many attention's, to save the most time."""
    (all_bytes, all_seconds), (some_bytes, some_seconds) = costs
    best, best_seconds = (0, 0), 0.0
    for num_all in range(num_layers + 1):
        room = left - num_all * all_bytes
        if room < 0:
            break
        rest = num_layers - num_all
        num_some = min(rest, int(room / some_bytes)) if some_bytes > 0 else rest
        if some_seconds <= 0:
            num_some = 0
        saved = num_all * all_seconds + num_some * some_seconds
        if saved > best_seconds:
            best, best_seconds = (num_all, num_some), saved
    return best

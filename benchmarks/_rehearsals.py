"""What benchmarks take from the program's rehearsals, in one place: our step, and what follows one.

`trace_ours` is our side of every comparison; `traced` does for a peer's step what `rehearse` does
for ours. All of it is rehearsed, never measured.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from _common import ROOT
from transformers import PretrainedConfig

from lowmem_dpo.machine.card_table import Card
from lowmem_dpo.memory.extension import LayersDiffer, extend, happenings, layers_to_rehearse
from lowmem_dpo.memory.levers import LEAST_SLOTS, Levers
from lowmem_dpo.memory.rehearsal import CONTEXT_BYTES, Rehearsal, rehearsal_of, totals_of
from lowmem_dpo.memory.trace import Follower, Work
from lowmem_dpo.packs.packing import CARD_TOKEN_MULTIPLE, round_up_tokens
from lowmem_dpo.settings.configs import TrainConfig
from lowmem_dpo.steps.rehearsed import (
    StepSettings,
    TreeShape,
    _collected_by_hand,
    _follow,
    _marked,
    _shortened,
    tree_of_shape,
)
from lowmem_dpo.tokens.trees import Tree
from lowmem_dpo.training.policy import adapter_spec
from lowmem_dpo.weights.folders import load_config

__all__ = [
    "CONTEXT_BYTES",
    "RESIDENT",
    "STREAMED",
    "USUAL",
    "TreeShape",
    "_collected_by_hand",
    "_marked",
    "fit_tokens",
    "model_config",
    "settings_of",
    "trace_ours",
    "traced",
    "tree_of_shape",
]

GIB = 2**30
USUAL = Levers()
"""All on the card, and layers run again in the backward pass."""
RESIDENT = Levers(inputs_on_host=True, embedding_on_host=True, head_on_host=True)
"""The layers' weights stay on the card; all else that can wait on the host does."""
STREAMED = Levers(
    inputs_on_host=True, embedding_on_host=True, head_on_host=True, num_slots=LEAST_SLOTS
)
"""The least memory: the layers' weights wait on the host too."""


def model_config(name: str) -> PretrainedConfig:
    """The config.json of a folder, or of a model of benchmarks/configs."""
    known = ROOT / "benchmarks" / "configs" / name
    return load_config(str(known if known.is_dir() else name))


def settings_of(optim: str = "adamw_8bit") -> StepSettings:
    """Rank 16 on every linear, NF4, bf16, DPO's own loss."""
    config = TrainConfig(optim=optim)
    return StepSettings(config, adapter_spec(config, None), config, config)


def fit_tokens(trees: Sequence[Tree]) -> int:
    """The fewest tokens of a micro-batch that takes all of these trees."""
    return round_up_tokens(sum(tree.num_tokens for tree in trees), CARD_TOKEN_MULTIPLE)


@dataclasses.dataclass(frozen=True)
class Traced:
    """A step that was followed; no card matters to it beside what kernels run there.

    Attributes:
        trace: Births and deaths, of all layers.
        works: What is computed: with all layers, or with few and with one more.
        times: How many layers more than few the model has; 0 with all layers.
    """

    trace: list[Any]
    works: list[list[Work]]
    times: int

    def on(self, card: Card, limit_bytes: int | None = None) -> Rehearsal:
        """That step on a card."""
        totals = [totals_of(work, card) for work in self.works]
        whole = totals[0].extended(totals[-1], self.times)
        return rehearsal_of(self.trace, whole, card, limit_bytes=limit_bytes)


def trace_ours(
    config: PretrainedConfig,
    card: Card,
    packs: Sequence[Sequence[Tree]],
    *,
    pack_tokens: int,
    levers: Levers = USUAL,
    trains: bool = True,
) -> Traced:
    """Our step, from the embedding to the optimizer; arguments as of `rehearse`.

    Where some layers keep more than others, all of them are followed.
    """

    def follow(few: PretrainedConfig) -> Follower:
        kept = {"num_keep_all": min(levers.num_keep_all, few.num_hidden_layers)}
        of_few = dataclasses.replace(levers, **kept)
        return _follow(few, card, settings_of(), of_few, packs, pack_tokens, trains)

    are_alike = levers.num_keep_all in (0, config.num_hidden_layers)
    return traced(config, follow, are_alike=are_alike)


def traced(
    config: PretrainedConfig,
    follow: Callable[[PretrainedConfig], Follower],
    *,
    are_alike: bool = True,
) -> Traced:
    """A step of all layers, from two of few layers, as `rehearse` has it.

    Args:
        config: The model's config.json.
        follow: Follows the step of a model with fewer layers.
        are_alike: Whether all layers do the same; if not, all are followed.
    """
    num_few = layers_to_rehearse(config.num_hidden_layers, 1)
    times = config.num_hidden_layers - num_few
    if are_alike and times > 1:
        few, more = (follow(_shortened(config, n)) for n in (num_few, num_few + 1))
        with contextlib.suppress(LayersDiffer):
            trace = extend(few.sections, more.sections, 1, times)
            return Traced(trace, [few.work, more.work], times)
    whole = follow(config)
    trace = [(each, each.storage.nbytes) for each in happenings(whole.sections)]
    return Traced(trace, [whole.work], 0)

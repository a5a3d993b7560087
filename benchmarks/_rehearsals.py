"""What benchmarks take from the program's rehearsals, in one place: our step, and what follows one.

`trace_ours` is our side of every comparison; `trace_of_peer` does for a peer's step what `rehearse`
does for ours. All of it is rehearsed, never measured.
"""

from collections.abc import Callable, Sequence
from typing import Any

from _common import ROOT
from transformers import PretrainedConfig

from lowmem_dpo.machine.card_table import Card
from lowmem_dpo.memory.extension import Trace, trace_of
from lowmem_dpo.memory.levers import LEAST_SLOTS, Levers
from lowmem_dpo.memory.rehearsal import CONTEXT_BYTES, Rehearsal, rehearsal_of, totals_of
from lowmem_dpo.memory.trace import Follower
from lowmem_dpo.packs.packing import CARD_TOKEN_MULTIPLE, round_up_tokens
from lowmem_dpo.settings.configs import TrainConfig
from lowmem_dpo.steps.rehearsed import (
    StepSettings,
    TreeShape,
    followed,
    shortened_config,
    trace_step,
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
    "fit_tokens",
    "followed",
    "model_config",
    "rehearsed",
    "settings_of",
    "trace_of_peer",
    "trace_ours",
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


def rehearsed(trace: Trace, card: Card, limit_bytes: int | None = None) -> Rehearsal:
    """A step that was followed, on a card: none matters to it beside what kernels run there."""
    totals = totals_of(trace.work_of(), card)
    return rehearsal_of(trace.events, totals, card, limit_bytes=limit_bytes)


def trace_ours(
    config: PretrainedConfig,
    card: Card,
    packs: Sequence[Sequence[Tree]],
    *,
    levers: Levers = USUAL,
    **how: Any,
) -> Trace:
    """Our step, from the embedding to the optimizer; arguments as of `trace_step`."""
    return trace_step(config, card, settings_of(), levers, packs, **how)


def trace_of_peer(
    config: PretrainedConfig, follow: Callable[[PretrainedConfig], Follower]
) -> Trace:
    """A peer's step of all layers, from two of few layers, as `rehearse` has it.

    Args:
        config: The model's config.json.
        follow: Follows the step of a model with fewer layers.
    """
    alike = ["alike"] * config.num_hidden_layers
    return trace_of(alike, alike, lambda layers: follow(shortened_config(config, layers)).sections)

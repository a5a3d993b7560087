"""Generation rehearsed on tensors without memory, and the places in memory by which it fits.

Two moments can need most. The prefill has the activations of all tokens of the prompt; the last
decoding step reads the keys and values of all tokens. So these two are run, by the functions that
answer prompts, and the cache is filled between them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import DynamicCache, PretrainedConfig

from lowmem_dpo.console import size
from lowmem_dpo.linears.lora import AdapterSpec
from lowmem_dpo.machine.card_table import Card
from lowmem_dpo.memory.allocator import MIDDLE_SEGMENT
from lowmem_dpo.memory.extension import trace_of
from lowmem_dpo.memory.fake_card import CARD
from lowmem_dpo.memory.levers import Levers
from lowmem_dpo.memory.rehearsal import Rehearsal, Totals, rehearsal_of, totals_of
from lowmem_dpo.memory.trace import Follower, Section
from lowmem_dpo.model.generation import answer_cache, continue_ids
from lowmem_dpo.model.language_model import LanguageModel
from lowmem_dpo.settings.groups import ModelSettings, PlaceSettings, SamplingSettings, parse_bytes
from lowmem_dpo.steps.planner import ladder_of
from lowmem_dpo.steps.rehearsed import (
    PLACES,
    followed,
    note_residents,
    shortened_config,
    unfilled,
)

PREFILL = ("prompt", "forward 1", "head 1")
LAST_TOKEN = ("answer", "forward 2", "head 2")


@dataclass(frozen=True)
class RehearsedGeneration:
    """What answering needs.

    Attributes:
        rehearsal: Of the prefill and the last decoding step, after which answers are longest.
        prefill: What is computed of a prompt.
        token: What is computed in that step; earlier ones read fewer keys and values.
    """

    rehearsal: Rehearsal
    prefill: Totals
    token: Totals


@dataclass(frozen=True)
class GenerationPlan:
    """Places in memory, and what answering needs then.

    Attributes:
        levers: The places.
        reserved_bytes: What torch holds on the card at the peak.
        allocated_bytes: What of it is in use then.
        token: As in `RehearsedGeneration`.
        fits: Whether the card or the limit has room for that.
    """

    levers: Levers
    reserved_bytes: int
    allocated_bytes: int
    token: Totals
    fits: bool


def choose_generation_levers(
    config: PretrainedConfig,
    card: Card,
    free_bytes: int,
    settings: ModelSettings,
    places: PlaceSettings,
    adapter: AdapterSpec | None,
    sampling: SamplingSettings,
    *,
    prompt_tokens: int,
) -> GenerationPlan:
    """The fastest places in memory by which the longest prompt can be answered.

    What the settings leave open goes to the host in this order, as far as is needed: the embedding,
    the head, the layers' NF4 weights, of which as many as fit are on the card at a time.

    Args:
        config: The model's config.json; its head is the embedding where that says so.
        card: The card.
        free_bytes: What torch may reserve of it.
        settings: As for `generate`.
        places: What the user decided.
        adapter: What kind of adapter the model has; None for none.
        sampling: How answers are drawn, and how long they get.
        prompt_tokens: Of the longest prompt.

    Raises:
        ValueError: If nothing fits.
    """
    limit_bytes = free_bytes
    if places.memory_limit is not None:
        limit_bytes = min(limit_bytes, parse_bytes(places.memory_limit))

    def plan(levers: Levers) -> GenerationPlan:
        what = config, card, settings, adapter, sampling, levers
        found = rehearse_generation(*what, prompt_tokens=prompt_tokens, limit_bytes=limit_bytes)
        needed = found.rehearsal
        reserved_bytes = needed.peak_reserved_bytes
        if needed.fits:  # what is free in it is given back where the limit is reached
            reserved_bytes = min(reserved_bytes, limit_bytes)
        allocated_bytes = needed.peak_allocated_bytes
        return GenerationPlan(levers, reserved_bytes, allocated_bytes, found.token, needed.fits)

    for levers in ladder_of(config, settings, places):
        found = plan(levers)
        if found.fits:
            break
    if not found.fits:
        names = ("embedding_weight", "head_weight", "layer_weights")
        held = [f"{name} device" for name in names if getattr(places, name) == "device"]
        raise ValueError(
            f"an answer of {sampling.max_new_tokens} tokens to a prompt of {prompt_tokens} needs "
            f"at least {size(found.reserved_bytes)}, and {card.name} has {size(limit_bytes)} for "
            "it; lower max_new_tokens, or shorten the prompt"
            + (f", or leave {' and '.join(held)} out" if held else "")
        )
    if found.levers.num_slots is None:
        return found
    return _with_more_slots(found, plan, card, config.num_hidden_layers, limit_bytes)


def _with_more_slots(
    least: GenerationPlan,
    plan: Callable[[Levers], GenerationPlan],
    card: Card,
    num_layers: int,
    limit_bytes: int,
) -> GenerationPlan:
    """The same with as many slots as fit: each takes as much memory, and saves an upload a token.

    How much that is, a rehearsal with one slot more says; what else there is to do, one with all
    layers on the card.
    """
    num_slots = least.levers.num_slots
    assert num_slots is not None
    if num_slots >= num_layers - 1:
        return least
    more = plan(replace(least.levers, num_slots=num_slots + 1))
    token = plan(replace(least.levers, num_slots=None)).token
    slot_bytes = max(
        more.reserved_bytes - least.reserved_bytes, more.allocated_bytes - least.allocated_bytes
    )
    # Small slots may fill a segment of the allocator or not.
    num_more = (limit_bytes - least.reserved_bytes - MIDDLE_SEGMENT) // slot_bytes
    num_more = max(0, min(num_more, num_layers - 1 - num_slots))
    num_uploads = uploads_a_token(num_layers, num_slots + num_more)
    return GenerationPlan(
        replace(least.levers, num_slots=num_slots + num_more),
        least.reserved_bytes + num_more * slot_bytes,
        least.allocated_bytes + num_more * slot_bytes,
        token.with_uploads(num_uploads * slot_bytes, card),
        fits=True,
    )


def uploads_a_token(num_layers: int, num_slots: int) -> float:
    """Layers that come from the host in a pass, on average, where one follows another.

    Of what stays, the layer that computes and the one uploaded beside it have no choice.
    """
    return num_layers * (num_layers - num_slots) / max(1, num_layers - 2)


def rehearse_generation(
    config: PretrainedConfig,
    card: Card,
    settings: ModelSettings,
    adapter: AdapterSpec | None,
    sampling: SamplingSettings,
    levers: Levers,
    *,
    prompt_tokens: int,
    limit_bytes: int | None = None,
) -> RehearsedGeneration:
    """Rehearse the answer to one prompt; several are answered one by one.

    Args:
        config: The model's config.json.
        card: The card, which need not be present.
        settings: As for `generate`.
        adapter: What kind of adapter the model has; None for none.
        sampling: How the answer is drawn, and how long it gets.
        levers: Places in memory.
        prompt_tokens: Of the prompt.
        limit_bytes: What may be reserved; by default what the card has.
    """
    num_layers = config.num_hidden_layers

    def follow(layers: Sequence[int]) -> Sequence[Section]:
        follower, few = Follower(CARD.type, PLACES), shortened_config(config, layers)
        with unfilled(few, card, follower, settings, adapter, levers, "torch") as model:
            follow_generation(model, follower, sampling, prompt_tokens)
        return follower.sections

    trace = trace_of(
        getattr(config, "layer_types", None) or ["alike"] * num_layers,
        levers.keeps(num_layers),
        follow,
        may_extend=levers.few_tell_of_all,
    )
    prefill, token = (totals_of(trace.work_of(*phases), card) for phases in (PREFILL, LAST_TOKEN))
    both = Totals(*map(sum, zip(prefill, token, strict=True)))
    found = rehearsal_of(trace.events, both, card, limit_bytes=limit_bytes)
    return RehearsedGeneration(found, prefill, token)


def follow_generation(
    model: LanguageModel,
    follower: Follower,
    sampling: SamplingSettings,
    prompt_tokens: int,
) -> None:
    """Take the first and the last token of an answer, and follow that.

    Args:
        model: As `prepare_model` gives it.
        follower: Has followed nothing yet.
        sampling: How the answer is drawn, and how long it gets.
        prompt_tokens: Of the prompt.
    """
    note_residents(follower, model)
    model.network.generation_config.eos_token_id = None  # whose value would be read
    one_token, num_more = replace(sampling, max_new_tokens=1), sampling.max_new_tokens - 1
    with followed(follower, model):
        follower.enter_section("prompt")
        cache = answer_cache(model, 1, prompt_tokens + sampling.max_new_tokens)
        ids = torch.zeros(1, prompt_tokens, dtype=torch.long, device=model.device)
        ids = continue_ids(model, ids, torch.ones_like(ids), cache, one_token, [])
        if num_more == 0:
            return
        _fill(follower, cache, num_more - 1)
        follower.enter_section("answer")
        ids = torch.cat([ids, ids.new_zeros(1, num_more - 1)], 1)
        continue_ids(model, ids, torch.ones_like(ids), cache, one_token, [])


def _fill(follower: Follower, cache: DynamicCache, num_tokens: int) -> None:
    """Let a cache have the keys and values of so many tokens more, layer by layer."""
    layers: list[Any] = cache.layers
    for i, layer in enumerate(layers):
        follower.enter_section("cache", i)
        num_kept = min(num_tokens, layer.sliding_window) if layer.is_sliding else num_tokens
        # One with a window keeps the memory of all that it got last, until it gets the next token.
        for part in [num_kept - 1, 1] if num_kept > 1 else [1] * num_kept:
            more = layer.keys[:, :, :1].expand(-1, -1, part, -1)
            layer.update(more, more)
        if layer.is_sliding:
            layer.cumulative_length += num_tokens - num_kept

"""A training step with its memory followed: on a model's own tensors, or rehearsed without any.

A rehearsal runs the functions of this program, from the embedding to the optimizer, on tensors
without memory (`memory.fake_card`), for a card that need not be present and from config.json alone.
No formula says what a step needs, so none can be wrong of it: with real tensors the same follower
sees the same bytes.
"""

import copy
import gc
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from lowmem_dpo.linears.lora import AdapterSpec, LoraLinear, cast_matrices, lora_parameters
from lowmem_dpo.linears.nf4 import Nf4Weight
from lowmem_dpo.losses.objective import Objective
from lowmem_dpo.losses.types import LossChoice
from lowmem_dpo.machine.card_table import Card
from lowmem_dpo.machine.device import resolve_dtype, workspace_bytes
from lowmem_dpo.memory.extension import Trace, trace_of
from lowmem_dpo.memory.fake_card import CARD, FakeCard
from lowmem_dpo.memory.levers import Levers
from lowmem_dpo.memory.rehearsal import Rehearsal, rehearsal_of, totals_of
from lowmem_dpo.memory.trace import Follower, Section
from lowmem_dpo.model import layer as decoder_layer
from lowmem_dpo.model.embedding import HostEmbedding
from lowmem_dpo.model.head import HostHead
from lowmem_dpo.model.language_model import LanguageModel
from lowmem_dpo.model.scoring import head_logps, score
from lowmem_dpo.model.surgery import prepare_model
from lowmem_dpo.packs.packing import pack_trees, scored_tokens
from lowmem_dpo.records.checkpoints import TrainingState
from lowmem_dpo.reference.fill import Reference
from lowmem_dpo.settings.groups import (
    ModelSettings,
    OptimizerSettings,
)
from lowmem_dpo.steps.gradients import accumulate
from lowmem_dpo.steps.update import HostAdamW, allocate_moments, clip_gradients, new_state
from lowmem_dpo.tokens.trees import TokenPair, Tree, build_tree
from lowmem_dpo.weights.loading import unfilled_model
from lowmem_dpo_kernels.token_logps import _TokenLogpsFunction
from lowmem_dpo_kernels.triton_support import RehearsedCard, is_rehearsing, rehearsing

_COMPONENTS: dict[Any, str] = {
    decoder_layer.AttentionHalf.forward: "attention half",
    decoder_layer._LayerFunction.backward: "attention half",
    decoder_layer._TokenWiseFunction.backward: "token-wise half",
    decoder_layer._to_host: "layer inputs",
    decoder_layer.TokenWiseHalf.forward: "token-wise half",
    decoder_layer.TokenWiseHalf.input_gradient: "token-wise half",
    Nf4Weight.dequantize: "dense copies of NF4 weights",
    cast_matrices: "casts of the adapter",
    head_logps: "head pass",
    _TokenLogpsFunction.backward: "head pass",
    pack_trees: "data",
}
PLACES = {inspect.unwrap(place).__code__: name for place, name in _COMPONENTS.items()}
"""What births in these functions, and in what they call, are for."""


class TreeShape(NamedTuple):
    """Lengths of a pair, in tokens."""

    prompt: int
    chosen: int
    rejected: int


@dataclass(frozen=True)
class StepSettings:
    """What a step's memory and time depend on, the model, the pairs and the levers aside."""

    model: ModelSettings
    adapter: AdapterSpec
    optimizer: OptimizerSettings
    loss: LossChoice
    head_kernel: str = "auto"


def rehearse(
    config: PretrainedConfig,
    card: Card,
    settings: StepSettings,
    levers: Levers,
    packs: Sequence[Sequence[Tree]],
    *,
    limit_bytes: int | None = None,
    **how: Any,
) -> Rehearsal:
    """Rehearse an optimizer step.

    Args:
        config: The model's config.json.
        card: The card, which need not be present.
        settings: As for `train`.
        levers: Places in memory.
        packs: The pairs of each micro-batch; two of these are like any number of them.
        limit_bytes: What may be reserved; by default what the card has.
        **how: As for `trace_step`.
    """
    trace = trace_step(config, card, settings, levers, packs, **how)
    totals = totals_of(trace.work_of(), card)
    return rehearsal_of(trace.events, totals, card, limit_bytes=limit_bytes)


def trace_step(
    config: PretrainedConfig,
    card: Card,
    settings: StepSettings,
    levers: Levers,
    packs: Sequence[Sequence[Tree]],
    *,
    pack_tokens: int,
    trains: bool = True,
    followed: dict[Any, Follower] | None = None,
) -> Trace:
    """Follow an optimizer step on tensors without memory.

    Args:
        config: As for `rehearse`.
        card: As for `rehearse`.
        settings: As for `rehearse`.
        levers: As for `rehearse`.
        packs: As for `rehearse`.
        pack_tokens: Tokens of a micro-batch.
        trains: Whether a step is taken; False for scoring alone, as the reference is made.
        followed: Steps that were followed for other levers and limits, all else being the same;
            those that are followed now are added. Of how many layers keep what, they are mostly
            the same.
    """
    steps = {} if followed is None else followed
    num_layers = config.num_hidden_layers
    types = getattr(config, "layer_types", None) or ["alike"] * num_layers

    def follow(layers: Sequence[int]) -> list[Section]:
        shortened, fewer = _shortened(config, levers, layers)
        name = (*(types[layer] for layer in layers), fewer)
        if name not in steps:
            steps[name] = _follow(shortened, fewer, card, settings, packs, pack_tokens, trains)
        return steps[name].sections

    return trace_of(
        types,
        levers.keeps(num_layers),
        follow,
        may_extend=levers.few_tell_of_all,
    )


def _shortened(
    config: PretrainedConfig, levers: Levers, layers: Sequence[int]
) -> tuple[PretrainedConfig, Levers]:
    """The same model, and its levers, with some of its layers alone."""
    kept = [levers.keeps(config.num_hidden_layers)[layer] for layer in layers]
    fewer = replace(
        levers, num_keep_all=kept.count("all"), num_keep_attention=kept.count("attention")
    )
    return shortened_config(config, layers), fewer


def shortened_config(config: PretrainedConfig, layers: Sequence[int]) -> PretrainedConfig:
    """The config.json of a model with some of its layers alone."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = len(layers)
    if types := getattr(config, "layer_types", None):
        config.layer_types = [types[layer] for layer in layers]
    return config


def _follow(
    config: PretrainedConfig,
    levers: Levers,
    card: Card,
    settings: StepSettings,
    packs: Sequence[Sequence[Tree]],
    pack_tokens: int,
    trains: bool,
) -> Follower:
    """Follow a step of a whole model on tensors without memory."""
    follower, adapter = Follower(CARD.type, PLACES), settings.adapter
    how = levers, settings.head_kernel
    with unfilled(config, card, follower, settings.model, adapter, *how) as model:
        follow_step(
            model,
            follower,
            packs,
            pack_tokens=pack_tokens,
            objective=Objective.of(settings.loss),
            optimizer=settings.optimizer,
            optimizer_on_host=levers.optimizer_on_host,
            trains=trains,
        )
    return follower


@contextmanager
def unfilled(
    config: PretrainedConfig,
    card: Card,
    follower: Follower,
    settings: ModelSettings,
    adapter: AdapterSpec | None,
    levers: Levers,
    head_kernel: str,
) -> Iterator[LanguageModel]:
    """A prepared model on tensors without memory; inside, all tensors are such.

    Args:
        config: Its config.json.
        card: The card, which need not be present.
        follower: Is told of the kernels' launches.
        settings: How it is stored, and by what it computes.
        adapter: What kind of adapter it gets; None for none.
        levers: Places in memory.
        head_kernel: As for `prepare_model`.
    """
    mode = FakeCard()
    with rehearsing(RehearsedCard(card.capability, follower.note_launch)):
        model = unfilled_model(
            config,
            quantization=settings.quantization,
            dtype=resolve_dtype(settings.dtype, CARD),
            device=CARD,
            mode=mode,
            levers=levers,
        )
        with mode:
            yield prepare_model(
                model,
                adapter,
                levers,
                head_quantization=settings.head_quantization,
                head_kernel=head_kernel,
                kernels=settings.allowed_kernels,
            )


def tree_of_shape(shape: TreeShape) -> Tree:
    """A pair of that shape, whose answers differ from their first token on."""
    prompt = [0] * shape.prompt
    return build_tree(
        TokenPair(
            row=0,
            chosen_ids=prompt + [1] * shape.chosen,
            rejected_ids=prompt + [2] * shape.rejected,
            chosen_start=shape.prompt,
            rejected_start=shape.prompt,
        )
    )


def follow_step(
    model: LanguageModel,
    follower: Follower,
    packs: Sequence[Sequence[Tree]],
    *,
    pack_tokens: int,
    objective: Objective,
    optimizer: OptimizerSettings,
    optimizer_on_host: bool = False,
    trains: bool = True,
) -> None:
    """Take one optimizer step and follow it.

    Args:
        model: With an adapter, as `prepare_model` gives it.
        follower: Has followed nothing yet.
        packs: The pairs of each micro-batch.
        pack_tokens: Tokens of a micro-batch.
        objective: What is minimised.
        optimizer: Its settings.
        optimizer_on_host: Whether it works in host memory.
        trains: As for `trace_step`.
    """
    if optimizer.optim == "paged_adamw_8bit":  # whose pages stay on the card while they fit
        optimizer = replace(optimizer, optim="adamw_8bit")
    parameters = lora_parameters(model.network)
    values = list(parameters.values())
    state = new_state(optimizer, values, num_steps=1, on_host=optimizer_on_host)
    allocate_moments(state.optimizer)
    note_residents(follower, model, state)
    with followed(follower, model):
        follower.enter_section("data")
        trees = [tree for pack in packs for tree in pack]
        in_tensors = [pack for trees in packs for pack in pack_trees(trees, pack_tokens)]
        reference = _reference_of(trees) if objective.needs_reference else None
        if not trains:
            with torch.no_grad():
                for pack in in_tensors:
                    score(model, pack)
            return
        stats = accumulate(model, objective, reference, in_tensors, state.scaler)
        follower.enter_section("update")
        clip_gradients(state, parameters, optimizer.max_grad_norm)
        _step_optimizer(state)
        state.optimizer.zero_grad(set_to_none=True)
        del stats, in_tensors, reference


def _reference_of(trees: Sequence[Tree]) -> Reference:
    logps = {tree.digest: torch.zeros(len(scored_tokens(tree).rows)) for tree in trees}
    return Reference(logps, same_fingerprint=True, num_scored=0, recheck_rms=None)


def _step_optimizer(state: TrainingState) -> None:
    """Step it; bitsandbytes' own loop over the parameters would wait for a card after each."""
    update: Any = getattr(state.optimizer, "update_step", None)
    if update is None or not is_rehearsing():
        state.scaler.step(state.optimizer)
        return
    with torch.no_grad():
        for group_index, group in enumerate(state.optimizer.param_groups):
            for index, parameter in enumerate(group["params"]):
                update(group, parameter, group_index, index)


@contextmanager
def followed(follower: Follower, model: LanguageModel) -> Iterator[None]:
    """Inside, the follower follows, and the model's layers tell it where it is.

    Nothing dies at a moment that Python's collector of cycles happens to choose.
    """
    gc.disable()
    try:
        with follower, _marked(follower, model):
            if model.device.type == "cuda":
                follower.note_storage(workspace_bytes(), "other", "workspaces of cuBLAS")
            yield
    finally:
        gc.enable()


def note_residents(
    follower: Follower, model: LanguageModel, state: TrainingState | None = None
) -> None:
    """What is there before a step: weights, adapter, the optimizer's moments if there is one."""
    if model.slots is not None:  # before the layers' views of them
        for slot in model.slots.slots:
            follower.note_resident(slot.memory, "slots of NF4 layers", None)
    layers = {id(module): i for i, layer in enumerate(model.layers) for module in layer.modules()}
    embedding, head = model.backbone.get_input_embeddings(), model.network.lm_head
    adapter: list[tuple[nn.Parameter, int | None]] = []
    for module in model.network.modules():
        component = "norms and tables"
        if isinstance(module, Nf4Weight):
            component = "NF4 weights"
        elif isinstance(module, LoraLinear):
            component = "dense weights"
        elif module is embedding or module is head:
            component = "embedding" if module is embedding else "head"
        place = layers.get(id(module))
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if isinstance(tensor, nn.Parameter) and tensor.requires_grad:
                adapter.append((tensor, place))
            elif tensor is not None:
                follower.note_resident(tensor, component, place)
    if isinstance(embedding, HostEmbedding):
        follower.note_resident(embedding.host, "embedding", None)
    if model.slots is not None:
        for i, blob in enumerate(model.slots.blobs):
            if isinstance(blob, Tensor):  # or else it is on the disk
                follower.note_resident(blob, "NF4 weights", i)
        for piece in model.slots.staging:
            follower.note_resident(piece, "pieces from the disk", None, is_pinned=True)
    if isinstance(head, HostHead):
        follower.note_resident(head.host, "head", None, is_pinned=follower.device_type == "cuda")
    for parameter, place in adapter:
        follower.note_resident(parameter, "adapter", place)
    if state is None:
        return
    for parameter, place in adapter:
        for value in state.optimizer.state[parameter].values():
            if isinstance(value, Tensor):
                follower.note_resident(value, "optimizer state", place)
        if isinstance(state.optimizer, HostAdamW):
            is_pinned = follower.device_type == "cuda"
            for buffer in state.optimizer.buffers[parameter]:
                follower.note_resident(buffer, "optimizer state", place, is_pinned=is_pinned)


@contextmanager
def _marked(follower: Follower, model: LanguageModel) -> Iterator[None]:
    """Inside, a model's layers tell the follower where it is, and what their inputs are."""
    num_passes = 0
    last = len(model.layers) - 1
    handles = []

    def mark(module: nn.Module, index: int) -> None:
        def before(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            nonlocal num_passes
            num_passes += index == 0
            follower.enter_section(f"forward {num_passes}", index)
            follower.say_what_for(arguments[:1], "layer inputs")
            if index == 0 and arguments[0].requires_grad:
                # What is let go of behind the last backward pass is of all layers, not of this one.
                end = f"end {num_passes}"
                arguments[0].register_hook(lambda _: follower.enter_section(end))

        def after(_: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
            phase = f"backward {num_passes}"
            if output.requires_grad:
                output.register_hook(lambda _: follower.enter_section(phase, index))
            if index == last:
                follower.enter_section(f"head {num_passes}")

        handles.append(module.register_forward_pre_hook(before))
        handles.append(module.register_forward_hook(after))

    for index, module in enumerate(model.layers):
        mark(module, index)

    def is_gradient(parameter: nn.Parameter) -> None:
        if parameter.grad is not None:
            follower.say_what_for([parameter.grad], "gradients")

    for parameter in lora_parameters(model.network).values():
        handles.append(parameter.register_post_accumulate_grad_hook(is_gradient))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

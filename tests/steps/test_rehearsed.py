"""Rehearsals against the same step on real tensors: the same bytes, to the byte."""

import dataclasses

import pytest
import torch

from lowmem_dpo.linears.lora import AdapterSpec
from lowmem_dpo.linears.nf4 import dynamic_code, nf4_levels
from lowmem_dpo.losses.objective import Objective
from lowmem_dpo.memory.fake_card import FakeCard
from lowmem_dpo.memory.levers import Levers
from lowmem_dpo.memory.trace import Follower
from lowmem_dpo.model.surgery import prepare_model
from lowmem_dpo.settings.configs import TrainConfig
from lowmem_dpo.steps.rehearsed import PLACES, TreeShape, follow_step, tree_of_shape
from lowmem_dpo.weights.folders import load_config
from lowmem_dpo.weights.loading import load_model, unfilled_model
from lowmem_dpo_kernels.triton_support import RehearsedCard, rehearsing

CPU = torch.device("cpu")
USUAL = Levers()
SHAPES = [TreeShape(9, 14, 11), TreeShape(20, 6, 17), TreeShape(3, 30, 1)]


def follow(model, mode=None, *, dropout=0.0, optim="adamw", trains=True, head="none", levers=USUAL):
    """Every birth and death of a step, and what was computed."""
    settings = dataclasses.replace(TrainConfig(), optim=optim)
    follower = Follower("cpu", PLACES)
    spec = AdapterSpec(8, 16, dropout, "all", False)

    def step(model):
        model = prepare_model(model, spec, levers, head_quantization=head)
        follow_step(
            model,
            follower,
            [[tree] for tree in map(tree_of_shape, SHAPES)],
            pack_tokens=64,
            objective=Objective.of(settings),
            optimizer=settings,
            optimizer_on_host=levers.optimizer_on_host,
            trains=trains,
        )

    if mode is None:
        for remembered in (dynamic_code, nf4_levels):
            remembered.cache_clear()
        step(model)
    else:
        with rehearsing(RehearsedCard((8, 6), follower.note_launch)), mode:
            step(model)
    return follower


def events(follower):
    return [
        (event.storage.key, event.storage.nbytes, event.is_birth, event.storage.maker)
        for section in follower.sections
        for event in section.events
    ]


def both(folder, quantization="nf4", dtype=torch.float32, **changes):
    config = load_config(str(folder))
    levers = changes.get("levers", USUAL)
    how = {"quantization": quantization, "dtype": dtype, "levers": levers}
    real = load_model(str(folder), config=config, device=CPU, cache_dir=folder / "cache", **how)
    mode = FakeCard()
    with rehearsing(RehearsedCard((8, 6), lambda *_: None)):
        fake = unfilled_model(config, device=CPU, mode=mode, **how)
    return follow(real, **changes), follow(fake, mode, **changes)


FAMILIES = ["llama", "qwen2", "qwen3", "mistral-window", "gemma2", "gemma3", "phi3"]
QUICK = [
    ("llama", "nf4", torch.bfloat16),
    ("gemma2", "nf4", torch.bfloat16),
    ("phi3", "none", torch.float32),
]
CASES = [
    pytest.param(
        family,
        quantization,
        dtype,
        marks=() if (family, quantization, dtype) in QUICK else pytest.mark.slow,
    )
    for family in FAMILIES
    for quantization in ("nf4", "none")
    for dtype in (torch.bfloat16, torch.float32)
]


@pytest.mark.parametrize("family, quantization, dtype", CASES, ids=str)
def test_a_rehearsal_has_the_bytes_of_the_real_step(tiny_checkpoint, family, quantization, dtype):
    folder, _ = tiny_checkpoint(family)
    real, rehearsed = both(folder, quantization, dtype)
    assert len(events(real)) > 1000
    assert events(rehearsed) == events(real)
    assert rehearsed.work == real.work


@pytest.mark.parametrize(
    "changes",
    [
        {"dropout": 0.1},
        pytest.param({"optim": "adamw_8bit"}, marks=pytest.mark.slow),
        pytest.param({"optim": "sgd"}, marks=pytest.mark.slow),
        pytest.param({"head": "int8"}, marks=pytest.mark.slow),
        {"trains": False},
        {"levers": Levers(num_keep_all=2)},
        {"levers": Levers(num_keep_all=1, num_keep_attention=1)},
        {"levers": Levers(num_keep_attention=2), "dropout": 0.1},
        {"levers": Levers(optimizer_on_host=True)},
        {"levers": Levers(num_slots=2)},
        {"levers": Levers(num_slots=2, layers_on_disk=True)},
    ],
    ids=str,
)
def test_a_rehearsal_has_the_bytes_of_the_real_step_with(tiny_checkpoint, changes):
    folder, _ = tiny_checkpoint()
    real, rehearsed = both(folder, **changes)
    assert events(rehearsed) == events(real)
    assert rehearsed.work == real.work

"""A step that runs out of memory, wherever that is, gives the gradient of an undisturbed one."""

import functools
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lowmem_dpo.linears.lora import lora_parameters
from lowmem_dpo.linears.nf4 import Nf4Weight
from lowmem_dpo.memory.levers import Levers
from lowmem_dpo.memory.weight_slots import Lanes, WeightSlots
from lowmem_dpo.packs.packing import pack_trees
from lowmem_dpo.steps.recovery import accumulate_in_memory
from lowmem_dpo.stopping import RunStopped
from lowmem_dpo.training import fit
from lowmem_dpo.training.loop import evaluate
from tests.conftest import random_pairs
from tests.tiny import save_tiny_model
from tests.training.conftest import write_rows
from tests.training.test_identities import (
    SMALL_PACKS,
    adapter,  # noqa: F401 - prepare is made of it
    config_for,
    prepare,  # noqa: F401 - a fixture
)

pytestmark = pytest.mark.usefixtures("without_plots")


class Full(TorchDispatchMode):
    """Memory is out at some operations, counted from 0."""

    def __init__(self, places=(), error=None):
        super().__init__()
        self.count, self.places = 0, set(places)
        self.error = error or torch.OutOfMemoryError("CUDA out of memory")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        if self.count - 1 in self.places:
            raise self.error
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def _masks(monkeypatch):
    """A mode of operations cannot see torch's own kind of mask, a subclass, being made."""
    monkeypatch.setattr(
        "lowmem_dpo.model.attention.causal_lower_right",
        lambda rows, columns: torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows),
    )


@pytest.fixture
def run(prepare):  # noqa: F811 - the fixture
    return prepare(random_pairs(4), pack_tokens=SMALL_PACKS, lora_dropout=0.2)


@pytest.fixture
def deep_run(tmp_path):
    """Of four layers in NF4, of which two are on the device where they are streamed."""
    folder = save_tiny_model(tmp_path / "deep", num_hidden_layers=4)
    data = write_rows(tmp_path / "deep.jsonl", random_pairs(4))
    config = config_for(
        folder,
        tmp_path / "deep-out",
        data=str(data),
        batch_size=4,
        quantization="nf4",
        pack_tokens=SMALL_PACKS,
        lora_dropout=0.2,
    )
    run = fit.prepare(config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in lora_parameters(run.policy.model.network).items():
        if name.endswith("lora_b"):
            torch.nn.init.normal_(parameter, std=0.05, generator=generator)
    return run


def follow_plan(run, levers, monkeypatch):
    """Let the layers be as a plan has them, without a card."""
    layers = run.policy.model.layers
    for layer, keeps in zip(layers, levers.keeps(len(layers)), strict=True):
        layer.keeps, layer.inputs_on_host = keeps, levers.inputs_on_host
    monkeypatch.setattr("lowmem_dpo.model.layer._to_host", lambda x: x.detach().clone())
    if levers.num_slots is not None:
        weights = [[m for m in layer.modules() if isinstance(m, Nf4Weight)] for layer in layers]
        slots = WeightSlots(weights, torch.device("cpu"), levers.num_slots, PoisoningLanes())
        for i, layer in enumerate(layers):
            layer.hold = functools.partial(slots.hold, i)


class PoisoningLanes(Lanes):
    """What a slot held before is gone when the next upload begins."""

    def upload(self, slot, blob):
        slot.fill_(0xFF)
        slot.copy_(blob)


def keep(run, keeps):
    for layer in run.policy.model.layers:
        layer.keeps = keeps


def step(run, places=(), error=None):
    """The step's numbers and gradients, the state of the generator after it, and operations."""
    packs = pack_trees(run.pairs.train, run.pack_tokens)
    assert len(packs) > 1
    parameters = lora_parameters(run.policy.model.network)
    for parameter in parameters.values():
        parameter.grad = None
    torch.manual_seed(3)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    with Full(places, error) as mode:
        stats = accumulate_in_memory(
            run.policy.model, run.objective, run.reference, packs, scaler, compares=True
        )
    found = [block[name] for block in stats.blocks for name in block]
    found += [parameter.grad for parameter in parameters.values()] + [torch.get_rng_state()]
    return found, mode.count


def same(found, expected):
    return all(torch.equal(got, want) for got, want in zip(found, expected, strict=True))


def check_every(run, stride):
    expected, count = step(run)
    assert count > 500
    for place in range(0, count, stride):
        found, _ = step(run, [place])
        assert same(found, expected), place


def test_a_failure_at_some_operations_changes_no_bit(run, capsys):
    check_every(run, 127)
    assert "out of memory; the step is taken again: the same again" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("keeps", ["nothing", "attention", "all"])
def test_a_failure_at_any_operation_changes_no_bit(run, keeps):
    keep(run, keeps)
    check_every(run, 43)


MIXED = Levers(num_keep_all=1, num_keep_attention=1, inputs_on_host=True)
STREAMED = Levers(num_slots=2)


@pytest.mark.parametrize("levers", [MIXED, STREAMED], ids=str)
def test_a_failure_under_a_plan_changes_no_bit(deep_run, levers, monkeypatch):
    check_plan(deep_run, levers, 2503, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize(
    "levers",
    [MIXED, STREAMED, Levers(num_slots=3, inputs_on_host=True), Levers(num_keep_all=2)],
    ids=str,
)
def test_a_failure_at_many_operations_of_a_plan_changes_no_bit(deep_run, levers, monkeypatch):
    check_plan(deep_run, levers, 307, monkeypatch)


def check_plan(run, levers, stride, monkeypatch):
    """The bits of a resident model, and layers that are as the plan has them to the end."""
    resident, _ = step(run)
    follow_plan(run, levers, monkeypatch)
    assert same(step(run)[0], resident)
    check_every(run, stride)
    layers = run.policy.model.layers
    assert [layer.keeps for layer in layers] == levers.keeps(len(layers))


def test_layers_of_a_mixed_plan_keep_less_rung_by_rung(deep_run, capsys, monkeypatch):
    follow_plan(deep_run, Levers(num_keep_all=1, num_keep_attention=1), monkeypatch)
    expected, count = step(deep_run)
    layers = deep_run.policy.model.layers
    twice = [count // 2, count // 2 + count // 3]  # the attempts count on from each other
    rungs = [
        (twice[:1], ["nothing", "nothing", "attention", "all"], "the same again"),
        (twice, ["nothing"] * 2 + ["attention"] * 2, "1 layer that kept all keeps attention"),
        (twice, ["nothing"] * 4, "2 layers that kept attention keep nothing"),
    ]
    for places, kept, said in rungs:
        found, _ = step(deep_run, places)
        assert same(found, expected)
        assert [layer.keeps for layer in layers] == kept
        assert f"the step is taken again: {said}" in capsys.readouterr().out


def test_layers_keep_less_where_it_fails_again(run, capsys):
    expected, _ = step(run)
    keep(run, "all")
    whole, count = step(run)
    assert same(whole, expected)
    places = [count // 2, count // 2 + count // 3, 2 * count]
    found, _ = step(run, places)
    assert same(found, expected)
    said = capsys.readouterr().out
    assert said.index("the same again") < said.index("2 layers that kept all keep attention")
    assert {layer.keeps for layer in run.policy.model.layers} == {"attention"}


def test_a_step_that_never_fits_stops_the_run_in_one_line(run):
    keep(run, "all")
    with pytest.raises(RunStopped, match=r"out of memory.*--resume auto"):
        step(run, range(100, 10**6))
    assert {layer.keeps for layer in run.policy.model.layers} == {"nothing"}
    assert evaluate(run, run.pairs.train)["eval_loss"] > 0  # nothing is left half done


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        MemoryError(),
    ],
    ids=str,
)
def test_memory_is_out_in_several_words(run, error):
    expected, _ = step(run)
    assert same(step(run, [300], error)[0], expected)


def test_other_errors_are_not_taken_for_it(run):
    with pytest.raises(RuntimeError, match="shape"):
        step(run, [300], RuntimeError("shape mismatch"))


def test_on_a_card_memory_is_given_back_and_dropout_drawn_again(run, monkeypatch):
    """Of a card that is not here: what it is told, in order, and the last rung."""
    told, attempts = [], []

    def fail(*_, **__):
        attempts.append(len(told))
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("lowmem_dpo.steps.recovery.accumulate", fail)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: f"state of {device}")
    for name in ("synchronize", "empty_cache", "set_rng_state"):
        monkeypatch.setattr(torch.cuda, name, lambda *words, name=name: told.append((name, *words)))
    card = torch.device("cuda", 0)
    model = replace(run.policy.model, device=card)
    with pytest.raises(RunStopped, match="out of memory"):
        accumulate_in_memory(model, run.objective, None, [], torch.amp.GradScaler("cpu"))
    once = [("synchronize", card), ("empty_cache",), ("set_rng_state", "state of cuda:0", card)]
    assert told == once * 3
    # As it was, the same again, and with layers whose inputs wait on the host.
    assert attempts == [0, 3, 6]
    assert all(layer.inputs_on_host for layer in model.layers)

"""What a run does with plans; the card is a record, and nothing is computed on it."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig

from lowmem_dpo.linears.lora import AdapterSpec
from lowmem_dpo.machine.card_table import find_card
from lowmem_dpo.memory.levers import Levers
from lowmem_dpo.settings.configs import TrainConfig
from lowmem_dpo.steps import planner as planning
from lowmem_dpo.steps.planner import Room, Workload
from lowmem_dpo.steps.rehearsed import StepSettings, TreeShape, tree_of_shape
from lowmem_dpo.training import memory_plan
from lowmem_dpo.training.memory_plan import plan_memory, say_memory, wanted_pack_tokens
from tests.tiny import FAMILIES, SIZES

TREE = tree_of_shape(TreeShape(30, 20, 20))
MUCH = 2**40
MODEL = AutoConfig.for_model(**SIZES | {"vocab_size": 4096} | FAMILIES["llama"])
NUM_LAYERS = MODEL.num_hidden_layers


@pytest.fixture
def machine(monkeypatch):
    """A card and a host whose free memory a test may set; steps are followed once."""
    found = SimpleNamespace(card=MUCH, host=MUCH, limited=None, system="linux")
    monkeypatch.setattr(memory_plan, "card_of", lambda device: find_card("3060"))
    monkeypatch.setattr(memory_plan, "free_bytes", lambda device: found.card)
    monkeypatch.setattr(memory_plan, "available_host_bytes", lambda: found.host)
    monkeypatch.setattr(memory_plan, "spills", lambda: found.system != "linux")
    monkeypatch.setattr(
        memory_plan, "limit_memory", lambda limit, device: vars(found).update(limited=limit)
    )
    rehearse = planning.rehearse

    def quickly(*arguments, followed, **how):
        return rehearse(
            *arguments, **how, followed=FOLLOWED.setdefault((how["trains"], how["pack_tokens"]), {})
        )

    monkeypatch.setattr(planning, "rehearse", quickly)
    return found


FOLLOWED: dict = {}


def planned(device="cuda", checkpoint=None, trains=True, **settings):
    config = TrainConfig(**settings)
    source = SimpleNamespace(device=torch.device(device), config=MODEL, base="some/model")
    adapter = AdapterSpec(4, 4.0, 0.0, "all", rank_stabilised=False)
    step = StepSettings(config, adapter, config, config)
    work = Workload([TREE] * 2, batch_size=2)
    return plan_memory(source, step, work, config, checkpoint, trains=trains)


def test_a_cpu_has_no_plan_and_keeps_to_the_settings():
    memory = planned("cpu", keep_activations="attention")
    assert memory.plan is None and memory.levers == Levers(num_keep_attention=NUM_LAYERS)
    assert memory.holds(10**6)


def test_the_plan_is_said_before_the_model_is_loaded(machine, capsys):
    memory = planned()
    assert memory.levers == Levers(num_keep_all=NUM_LAYERS) and memory.pack_tokens is None
    printed = capsys.readouterr()
    assert "at the peak on RTX 3060 12 GB (rehearsed)" in printed.out
    assert f"plan: {NUM_LAYERS} of {NUM_LAYERS} layers keep all" in printed.out
    assert "plan: a step takes" in printed.out and "nominal rates" in printed.out
    assert "rehearsing micro-batches of" in printed.err
    assert memory.holds(memory.plan.pack_tokens) and memory.holds(memory.plan.pack_tokens + 128)


def test_what_does_not_fit_is_refused_with_what_is_needed_and_what_there_is(machine, capsys):
    machine.card = 2**18
    with pytest.raises(
        ValueError, match=r"some/model does not fit with pairs of 70 tokens: it"
    ) as e:
        planned()
    for part in ("RTX 3060 12 GB", "256 KiB are free", "lower max_length", "memory_check warn"):
        assert part in str(e.value)
    assert "\n" not in str(e.value)
    assert planned(memory_check="warn").levers.inputs_on_host
    assert "it is tried all the same" in capsys.readouterr().out


def test_limits_of_the_user_and_of_the_host_count(machine):
    with pytest.raises(ValueError, match="100 KiB are free"):
        planned(memory_limit="100KiB")
    settings = {"layer_weights": "host", "keep_activations": "nothing", "pack_tokens": 256}
    need = planned(**settings).plan.rehearsal
    machine.host = need.host_bytes - 1
    with pytest.raises(ValueError, match=r"of the host, and .* are free"):
        planned(**settings)
    machine.host = MUCH
    with pytest.raises(ValueError, match=r"of the host, and 10 KiB are free"):
        planned(**settings, host_memory_limit="10KiB")


def test_a_resumed_run_keeps_its_micro_batches_and_its_levers_while_they_fit(
    machine, monkeypatch, capsys
):
    before = {"num_keep_attention": 1, "embedding_on_host": True}
    facts = {"planned_pack_tokens": 384, "levers": before}
    monkeypatch.setattr(memory_plan, "read_record", lambda checkpoint: {"facts": facts})
    memory = planned(checkpoint="some checkpoint")
    assert memory.pack_tokens == memory.plan.pack_tokens == 384
    assert memory.levers == Levers(**before)
    assert "another plan" not in capsys.readouterr().out
    machine.card = 2**18
    memory = planned(checkpoint="some checkpoint", memory_check="warn")
    assert memory.levers != Levers(**before)
    assert "the run began with another plan (1 of" in capsys.readouterr().out


@pytest.mark.usefixtures("machine")
def test_a_resumed_run_does_what_the_user_decided_since(monkeypatch, capsys):
    before = {"num_keep_attention": 1, "embedding_on_host": True}
    facts = {"planned_pack_tokens": 384, "levers": before}
    monkeypatch.setattr(memory_plan, "read_record", lambda checkpoint: {"facts": facts})
    memory = planned(checkpoint="some checkpoint", keep_activations="nothing")
    assert memory.levers == Levers() and memory.plan.pack_tokens == 384
    assert "the run began with another plan (1 of" in capsys.readouterr().out


@pytest.mark.usefixtures("machine")
def test_what_is_planned_has_the_micro_batches_of_the_run():
    """Those of a cached reference may be others than were chosen."""
    memory = planned(keep_activations="nothing")
    chosen = memory.plan.pack_tokens
    assert memory.plan_with(chosen) is memory.plan
    other = memory.plan_with(chosen + 128)
    assert (other.pack_tokens, other.levers) == (chosen + 128, memory.levers)
    assert planned("cpu").plan_with(chosen) is None
    room = Room(memory.plan.rehearsal.peak_reserved_bytes)
    full = replace(memory, planner=replace(memory.planner, room=room))
    held = {number: full.holds(chosen + number) for number in (-128, 0, 512)}
    assert held == {-128: True, 0: True, 512: False}


def test_a_micro_batch_holds_the_longest_pair_and_is_a_multiple_on_a_card(capsys):
    cpu, card = torch.device("cpu"), torch.device("cuda")
    assert wanted_pack_tokens(70, [TREE], cpu) == 70
    with pytest.raises(ValueError, match=r"69 is less than the longest pair \(70 tokens\)"):
        wanted_pack_tokens(69, [TREE], card)
    assert wanted_pack_tokens(128, [TREE], card) == 128 and not capsys.readouterr().out
    assert wanted_pack_tokens(129, [TREE], card) == 256
    assert "pack_tokens 129: 256" in capsys.readouterr().out


def test_a_head_that_config_json_does_not_tell_of_is_planned_for(machine, monkeypatch):
    told = []
    own = AutoConfig.for_model(**SIZES | {"vocab_size": 4096} | FAMILIES["llama"])
    stored = lambda base, config: told.append((base, config)) or own  # noqa: E731
    monkeypatch.setattr(memory_plan, "stored_config", stored)
    machine.card = MUCH
    memory = planned(keep_activations="nothing")
    assert memory.planner.model is own and told == [("some/model", MODEL)]


def test_scoring_alone_keeps_nothing(machine):
    assert planned(trains=False).levers == Levers()


def test_a_rehearsal_that_fails_is_said_and_leaves_the_usual_places(machine, capsys, monkeypatch):
    def fail(*arguments, **how):
        raise TypeError("of another torch")

    monkeypatch.setattr(planning, "rehearse", fail)
    memory = planned(head_weight="host")
    assert memory.levers == Levers(head_on_host=True) and memory.plan is None
    printed = " ".join(capsys.readouterr().out.split())
    assert "could not be rehearsed (TypeError: of another torch)" in printed


def test_under_windows_what_is_too_much_fails_in_place_of_being_slow(machine):
    planned()
    assert machine.limited is None
    machine.system = "wsl"
    planned()
    assert machine.limited == machine.card
    planned(memory_limit="4GiB")
    assert machine.limited == 2**32
    machine.card = 2**31  # of these, others have the rest
    planned(memory_limit="4GiB")
    assert machine.limited == 2**31


def test_what_was_rehearsed_is_held_against_what_was_measured(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 1050 * 2**20)
    found = say_memory(SimpleNamespace(peak_reserved_bytes=1000 * 2**20), torch.device("cuda"))
    assert capsys.readouterr().out == "memory: 1.0 GiB at the peak, 1000 MiB rehearsed (+5.0%)\n"
    assert found == {
        "peak_reserved_bytes": 1050 * 2**20,
        "rehearsed_reserved_bytes": 1000 * 2**20,
    }

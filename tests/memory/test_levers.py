"""What a plan decides, as each layer sees it."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowmem_dpo.memory.levers import Levers
from lowmem_dpo.settings.configs import GenerateConfig, TrainConfig


@given(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9))
def test_keeps_has_an_entry_a_layer_and_what_keeps_most_comes_last(nothing, attention, all_):
    levers = Levers(num_keep_all=all_, num_keep_attention=attention)
    kept = levers.keeps(nothing + attention + all_)
    assert kept == ["nothing"] * nothing + ["attention"] * attention + ["all"] * all_


@given(st.integers(0, 9), st.integers(0, 9), st.integers(1, 9))
def test_keeps_refuses_more_layers_than_there_are(attention, all_, missing):
    with pytest.raises(AssertionError):
        Levers(num_keep_all=all_, num_keep_attention=attention).keeps(attention + all_ - missing)


@pytest.mark.parametrize("keeps", ["nothing", "attention", "all"])
@given(num_layers=st.integers(1, 100))
def test_settings_are_of_all_layers(keeps, num_layers):
    config = dataclasses.replace(TrainConfig(), keep_activations=keeps)
    assert Levers.of(config, num_layers).keeps(num_layers) == [keeps] * num_layers


def test_a_plan_says_what_is_on_the_host():
    levers = Levers(head_on_host=True, optimizer_on_host=True)
    assert levers.words(4).endswith("; on the host: head, optimizer's states")
    config = dataclasses.replace(TrainConfig(), optimizer_state="host")
    assert Levers.of(config, 4) == Levers(optimizer_on_host=True)


def test_levers_agree_with_settings_that_decide_what_they_have():
    levers = Levers(1, 1, True, 2, False, True, False)
    assert levers.agree_with(TrainConfig(), 3) and levers.agree_with(GenerateConfig(), 3)
    same = {"layer_inputs": "host", "layer_weights": "host", "embedding_weight": "host"}
    assert levers.agree_with(TrainConfig(**same, head_weight="device"), 3)
    for name, value in (
        ("keep_activations", "nothing"),
        ("layer_inputs", "device"),
        ("layer_weights", "disk"),
        ("layer_weights", "device"),
        ("embedding_weight", "device"),
        ("head_weight", "host"),
    ):
        assert not levers.agree_with(TrainConfig(**{name: value}), 3), name

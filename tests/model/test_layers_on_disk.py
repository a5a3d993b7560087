"""Layers that are read from the disk in their turn compute what resident ones do, to the bit."""

from itertools import chain

import pytest
import torch

from lowmem_dpo.demo.byte_tokenizer import byte_tokenizer
from lowmem_dpo.linears.lora import (
    lora_layers,
)
from lowmem_dpo.memory.levers import Levers
from lowmem_dpo.memory.weight_files import LayerOnDisk, WeightFile
from lowmem_dpo.model.generation import generate_text
from lowmem_dpo.settings.groups import SamplingSettings
from lowmem_dpo.stopping import RunStopped
from tests.model.nf4_models import nf4_model, poison_slots, step


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """What a slot held before is gone when the next layer comes, from memory or from files."""
    poison_slots(monkeypatch)
    read = LayerOnDisk.read_into

    def read_into(layer, target, first=0):
        target[:] = b"\xff" * len(target)
        read(layer, target, first)

    monkeypatch.setattr(LayerOnDisk, "read_into", read_into)


def leave_on_disk(weight, path):
    """Let a file hold a weight's large tensors."""
    places, content = {}, b""
    for name in ("packed", "absmax", "absmax2"):
        places[name] = len(content)
        content += weight.get_buffer(name).view(torch.uint8).numpy().tobytes()
    path.write_bytes(content)
    opened = WeightFile(path)
    weight.leave_on_disk({name: (opened, place) for name, place in places.items()})


def build(family, num_slots, *, dropout=0.0, embedding_on_host=False, folder=None):
    """A model, its layers in files if there is a folder."""

    def on_quantised(linear):
        if folder is not None:
            leave_on_disk(linear.weight, folder / linear.name)

    levers = Levers(num_slots=num_slots, embedding_on_host=embedding_on_host)
    return nf4_model(family, levers, dropout=dropout, on_quantised=on_quantised)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("num_slots", [2, 3])
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
def test_layers_on_the_disk_have_the_bits_of_resident_ones(family, num_slots, dropout, tmp_path):
    expected = [*chain(*step(build(family, None, dropout=dropout)))]
    found = [*chain(*step(build(family, num_slots, dropout=dropout, folder=tmp_path)))]
    assert len(found) == len(expected) > 10
    for got, want in zip(found, expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_model_on_the_host_or_the_disk_answers_as_a_resident_one(family, tmp_path):
    sampling = SamplingSettings(max_new_tokens=6, temperature=1.0)
    models = [build(family, None), build(family, 2, embedding_on_host=True)]
    models.append(build(family, 2, folder=tmp_path))
    prompts = [[*range(30, 42)], [50, 51]]
    texts = [generate_text(each, byte_tokenizer(), prompts, sampling) for each in models]
    assert texts[0] == texts[1] == texts[2] and any(texts[0])
    assert models[1].slots.num_uploads > 6 * (5 - 2)


def test_a_layer_that_cannot_be_read_any_more_stops_the_step_and_no_other_weights_are_used(
    tmp_path,
):
    model = build("llama", 2, folder=tmp_path)
    step(model)
    weight = lora_layers(model.network)["model.layers.2.mlp.up_proj"].weight
    path = weight.on_disk["absmax"].file.path
    with path.open("r+b") as file:
        file.truncate(weight.on_disk["absmax"].start + 1)
    with pytest.raises(RunStopped, match=f"{path} was changed or cut off"):
        step(model)


def test_streaming_is_said_in_the_table_of_storage(tmp_path):
    assert build("llama", None).storage[0].format == "nf4"
    row = build("llama", 2).storage[0]
    assert row.format == "nf4, in host memory, 2 layers at a time on the device"
    row = build("llama", 2, folder=tmp_path).storage[0]
    assert row.format == "nf4, on the disk, 2 layers at a time in memory"

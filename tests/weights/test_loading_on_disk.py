"""Layers that stay on the disk: read from a copy that was judged, or from the model's own files."""

import gc
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowmem_dpo.files import is_in_use
from lowmem_dpo.linears.lora import linear_layers
from lowmem_dpo.linears.nf4 import Nf4Weight
from lowmem_dpo.memory.fake_card import CARD, FakeCard
from lowmem_dpo.memory.levers import Levers
from lowmem_dpo.model.surgery import prepare_model
from lowmem_dpo.weights import loading
from lowmem_dpo.weights.folders import load_config
from lowmem_dpo.weights.loading import unfilled_model
from lowmem_dpo_kernels.triton_support import RehearsedCard, rehearsing
from tests.weights.loading_lines import load_and_listen


@pytest.fixture
def base(tiny_checkpoint):
    folder, _ = tiny_checkpoint("qwen2", dtype=torch.bfloat16, vocab_size=97, num_hidden_layers=4)
    return folder


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def load(folder, cache, *, on_disk=True, **options):
    options = {"quantization": "nf4", "dtype": torch.float32, "cache_dir": cache} | options
    return load_and_listen(folder, levers=ON_DISK if on_disk else Levers(), **options)


def weights_of(model):
    """Every layer's weights made dense, in their turn if they have turns."""
    levers = Levers(num_slots=2) if linear_layers(model.network)[FIRST].weight.on_disk else Levers()
    model = prepare_model(model, levers=levers)
    dense = {}
    for i, layer in enumerate(model.layers):
        with layer.hold(returns=False):
            for name, module in layer.named_modules():
                if isinstance(module, Nf4Weight):
                    dense[f"{i}.{name}"] = module.dequantize(torch.float32)
    return dense


FIRST = "model.layers.0.mlp.up_proj"
ON_DISK = Levers(num_slots=2, layers_on_disk=True)


def assert_same(loaded, other):
    ours, theirs = weights_of(loaded), weights_of(other)
    assert len(ours) == 4 * 7 and ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert torch.equal(weight, theirs[name]), name
    assert loaded.identity == other.identity and loaded.storage == other.storage


def held_bytes(model):
    """Of NF4 weights, in memory."""
    layers = linear_layers(model.network).values()
    return sum(buffer.nbytes for layer in layers for buffer in layer.weight.buffers())


def only_copy(cache):
    (copy,) = (path for path in (cache / "models").iterdir() if path.is_dir())
    return copy


def test_first_and_later_starts_leave_the_layers_in_the_copy(base, cache, monkeypatch):
    resident = load(base, None, on_disk=False)
    first = load(base, cache)
    assert "the next start reads the copy" in first.notes[0]
    assert f"quantised copy {only_copy(cache)}" in first.notes[1] and len(first.notes) == 2
    assert first.notes[1].endswith("where its layers stay")
    assert held_bytes(first) == 4 * 7 * 4 < held_bytes(resident) / 100  # an offset each
    monkeypatch.setattr(loading, "quantize_nf4", lambda weight: pytest.fail("quantised again"))
    second = load(base, cache)
    assert held_bytes(second) == held_bytes(first)
    assert_same(second, resident)
    assert_same(first, load(base, cache, on_disk=False))


def test_no_more_than_a_layer_is_in_memory_while_the_copy_is_made(base, cache, monkeypatch):
    made, most = [], []
    quantize = loading.quantize_nf4

    def counted(weight):
        quantised = quantize(weight)
        gc.collect()
        alive = [
            o for o in gc.get_objects() if isinstance(o, torch.Tensor) and o.dtype == torch.uint8
        ]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in alive}
        made.append(quantised.packed.nbytes)
        most.append(sum(storages.values()))
        return quantised

    buffer_bytes = max(t.nbytes for t in load_file(base / "model.safetensors").values())
    monkeypatch.setattr(loading, "quantize_nf4", counted)
    gc.freeze()  # what other tests left is of no interest, and takes long to go through
    load(base, cache)
    gc.unfreeze()
    assert len(made) == 4 * 7
    before = most[0] - made[0]
    assert max(most) - before < sum(made) / 4 * 1.1 + buffer_bytes


def test_a_copy_is_in_use_as_long_as_there_is_a_model_that_reads_from_it(base, cache):
    load(base, cache, on_disk=False)
    copy = only_copy(cache)
    assert not is_in_use(copy)
    model = load(base, cache)
    assert is_in_use(copy)
    prepared = prepare_model(model, levers=Levers(num_slots=2))
    del model
    assert is_in_use(copy)
    del prepared
    assert not is_in_use(copy) and not list(copy.parent.glob(".*.lock"))


@pytest.mark.skipif(os.name == "nt", reason="an open file cannot be deleted there")
def test_a_copy_that_is_deleted_meanwhile_is_read_on(base, cache):
    model, resident = load(base, cache), load(base, None, on_disk=False)
    shutil.rmtree(cache)
    assert_same(model, resident)


@pytest.mark.parametrize("part", ["packed", "absmax", "absmax2"])
def test_a_damaged_copy_is_not_read_but_made_anew(base, cache, part):
    where = linear_layers(load(base, cache).network)[FIRST].weight.on_disk[part]
    content = bytearray(where.file.path.read_bytes())
    content[where.start + 1] ^= 1
    where.file.path.write_bytes(content)
    model = load(base, cache)
    assert "a tensor's digest is not the recorded one" in model.notes[0]
    assert_same(model, load(base, None, on_disk=False))


def test_a_model_that_comes_in_4_bits_stays_in_its_own_files(base, cache, tmp_path):
    load(base, cache)
    folder = tmp_path / "own"
    shutil.copytree(only_copy(cache), folder)
    (folder / "manifest.json").unlink()
    model = load(folder, None)
    files = {
        r.file.path
        for w in linear_layers(model.network).values()
        for r in w.weight.on_disk.values()
    }
    assert {path.parent for path in files} == {folder}
    assert_same(model, load(folder, None, on_disk=False))


def test_a_model_in_4_bits_without_the_second_level_stays_in_its_files(base, cache, tmp_path):
    load(base, cache)
    folder = tmp_path / "own"
    shutil.copytree(only_copy(cache), folder)
    resident = load(folder, None, on_disk=False)
    for name, layer in linear_layers(resident.network).items():
        path = folder / f"model.layers.{name.split('.')[2]}.safetensors"
        tensors = load_file(path)
        key = next(key for key in tensors if key.startswith(f"{name}.weight.quant_state"))
        state = json.loads(bytes(tensors[key].tolist()))
        state = {k: v for k, v in state.items() if not k.startswith("nested")}
        tensors[key] = torch.tensor([*json.dumps(state).encode()], dtype=torch.uint8)
        tensors[f"{name}.weight.absmax"] = layer.weight.scales().clone()
        del tensors[f"{name}.weight.nested_absmax"], tensors[f"{name}.weight.nested_quant_map"]
        save_file(tensors, path)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    names = {name: file for name, file in index["weight_map"].items() if "nested" not in name}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    model = load(folder, None)
    assert held_bytes(model) == 0
    assert_same(model, load(folder, None, on_disk=False))


def test_a_copy_that_cannot_be_made_is_one_error(base, cache, monkeypatch):
    usage = shutil.disk_usage(base)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2**20))
    with pytest.raises(ValueError, match=r"^layer_weights disk needs .* but no .* GiB free"):
        load(base, cache)
    assert not list((cache / "models").iterdir())


@pytest.mark.parametrize(
    "levers, waits",
    [
        (Levers(), set()),
        (Levers(num_slots=2), {"layers"}),
        (Levers(num_slots=3, embedding_on_host=True), {"layers", "embedding"}),
        (Levers(embedding_on_host=True), {"embedding"}),
    ],
)
def test_what_is_loaded_into_host_memory_is_what_the_levers_say(base, levers, waits):
    mode = FakeCard()
    how = {"quantization": "nf4", "dtype": torch.float32, "device": CARD, "mode": mode}
    with rehearsing(RehearsedCard((8, 6), lambda *_: None)):
        model = unfilled_model(load_config(str(base)), levers=levers, **how)
    embedding = model.backbone.get_input_embeddings().weight
    layers = [layer.weight for layer in linear_layers(model.network).values()]
    on_host = {"layers"} if all(x.packed.device.type == "cpu" for x in layers) else set()
    on_host |= {"embedding"} if embedding.device.type == "cpu" else set()
    assert on_host == waits
    assert {x.packed.device.type for x in layers} == {"cpu" if "layers" in waits else "cuda"}
    assert model.network.lm_head.weight.device.type == "cuda"

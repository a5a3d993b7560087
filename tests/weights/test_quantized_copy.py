import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
from contextlib import closing
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lowmem_dpo.files import lock_file, unlock_file
from lowmem_dpo.weights import loading, quantized_copy
from lowmem_dpo.weights.quantized_copy import CopyWriter
from lowmem_dpo.weights.safetensors_files import StoredTensor
from tests.tiny import FAMILIES
from tests.weights.loading_lines import load_and_listen

MADE = "the next start reads the copy"
USED = "read from its quantised copy"
AGAIN = "quantised again; its copy cannot be used and is removed"


@pytest.fixture
def base(tiny_checkpoint):
    """A bf16 source whose odd sizes would misalign the tensors of a careless writer."""
    folder, _ = tiny_checkpoint("qwen2", dtype=torch.bfloat16, vocab_size=97)
    return folder


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def load(folder, cache, dtype=torch.float32, **options):
    return load_and_listen(
        folder,
        quantization="nf4",
        dtype=dtype,
        cache_dir=cache,
        **options,
    )


def content(loaded):
    """Every number of a model."""
    tensors = [*loaded.network.named_parameters(), *loaded.network.named_buffers()]
    return {name: tensor.clone() for name, tensor in tensors}


def assert_same(loaded, other):
    ours, theirs = content(loaded), content(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name
    assert loaded.identity == other.identity and loaded.storage == other.storage


def only_copy(cache):
    (copy,) = (cache / "models").iterdir()
    return copy


def shards(copy):
    """The files of weights, in the order they were written."""
    return sorted(copy.glob("*.safetensors"))


def copied_tensors(copy):
    return {name: tensor for path in shards(copy) for name, tensor in load_file(path).items()}


def is_clean(cache):
    """Whether nothing unfinished is left."""
    return not list((cache / "models").glob(".*.part"))


def forbid_quantising(monkeypatch):
    monkeypatch.setattr(loading, "quantize_nf4", lambda weight: pytest.fail("quantised again"))


@torch.no_grad()
def logits(model):
    return model(input_ids=torch.arange(24).view(2, 12), use_cache=False).logits.float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_second_load_has_the_same_bits_and_neither_quantises_nor_reads_the_source(
    base, cache, dtype, monkeypatch
):
    plain = load(base, None, dtype)
    first = load(base, cache)  # the copy does not depend on what its maker computed in
    assert MADE in first.notes[0] and str(only_copy(cache)) in first.notes[0]
    read = StoredTensor.read

    def not_the_source(self, *arguments):
        assert self.path.parent != base
        return read(self, *arguments)

    monkeypatch.setattr(StoredTensor, "read", not_the_source)
    forbid_quantising(monkeypatch)
    second = load(base, cache, dtype)
    assert USED in second.notes[0] and len(second.notes) == 1
    assert_same(second, plain)
    assert is_clean(cache)


@pytest.mark.parametrize("family", FAMILIES)
def test_second_load_of_every_family_is_the_first_to_the_bit(tiny_checkpoint, cache, family):
    folder, _ = tiny_checkpoint(family)
    first, second = load(folder, cache), load(folder, cache)
    assert USED in second.notes[0]
    assert_same(second, first)
    assert torch.equal(logits(second.network), logits(first.network))


def test_a_source_that_is_replaced_while_it_is_read_leaves_no_copy(
    base, cache, tmp_path, monkeypatch
):
    whole = content(load(base, None))
    old, weights = tmp_path / "old.safetensors", base / "model.safetensors"
    shutil.copyfile(weights, old)
    empty = loading._empty_model

    def while_it_is_replaced(*arguments):
        tensors = {name: tensor * 2 for name, tensor in load_file(old).items()}
        save_file(tensors, weights, {"format": "pt"})
        return empty(*arguments)

    monkeypatch.setattr(loading, "_empty_model", while_it_is_replaced)
    with pytest.raises(ValueError, match="changed while they were read"):
        load(base, cache)
    assert is_clean(cache) and not list((cache / "models").iterdir())
    monkeypatch.undo()
    shutil.copyfile(old, weights)
    again = load(base, cache)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in content(again).items())


def test_a_source_that_is_only_linked_to_while_it_is_read_is_no_other(
    base, cache, tmp_path, monkeypatch
):
    empty = loading._empty_model

    def while_it_is_linked(*arguments):
        os.link(base / "model.safetensors", tmp_path / "link")  # another ctime
        return empty(*arguments)

    monkeypatch.setattr(loading, "_empty_model", while_it_is_linked)
    assert MADE in load(base, cache).notes[0]


def test_copy_holds_the_sources_own_numbers(base, cache):
    load(base, cache, torch.float16)
    source = load_file(base / "model.safetensors")
    copied = copied_tensors(only_copy(cache))
    for name, tensor in source.items():
        if name in copied and copied[name].dtype != torch.uint8:
            assert copied[name].dtype == torch.bfloat16 and torch.equal(copied[name], tensor)
    assert copied["model.embed_tokens.weight"].shape == (97, 64)


def test_copy_is_a_checkpoint_for_transformers(base, cache):
    ours = load(base, cache, torch.bfloat16)
    theirs = AutoModelForCausalLM.from_pretrained(only_copy(cache))
    for module in theirs.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    assert theirs.dtype == torch.bfloat16
    difference = logits(ours.network) - logits(theirs)
    assert difference.pow(2).mean().sqrt() < 0.01 * logits(theirs).std()


def test_copy_can_be_named_as_the_model(base, cache):
    first = load(base, cache)
    loaded = load(only_copy(cache), None)
    assert "taken as it is" in loaded.notes[0]
    assert torch.equal(logits(loaded.network), logits(first.network))


def test_copy_has_a_file_for_each_layer_and_tensor_outside_of_them(base, cache):
    load(base, cache)
    names = [set(load_file(path)) for path in shards(only_copy(cache))]
    layers = [{name.split(".")[2] for name in file if ".layers." in name} for file in names]
    assert sorted(map(len, layers)) == [0, 0, 0, 1, 1]
    outside = [file for file, numbers in zip(names, layers, strict=True) if not numbers]
    assert {"model.norm.weight"} in outside and {"lm_head.weight"} in outside
    index = json.loads((only_copy(cache) / "model.safetensors.index.json").read_text("utf-8"))
    assert index["weight_map"].keys() == set().union(*names)
    files = {path.name for path in shards(only_copy(cache))}
    assert files == {f"model.layers.{number}.safetensors" for number in range(2)} | {
        f"{name}.safetensors"
        for name in ("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight")
    }


def test_copy_of_a_source_in_any_order_is_the_same(base, cache, tmp_path):
    """Every layer's weights far apart, and in a number format that is not computed in."""
    plain = load(base, None)
    tensors = load_file(base / "model.safetensors")
    by_leaf = sorted(tensors, key=lambda name: name.split(".")[-2:])
    weight_map = {name: f"model-{i:05}.safetensors" for i, name in enumerate(by_leaf)}
    for name, file in weight_map.items():
        save_file({name: tensors[name]}, base / file)
    (base / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": weight_map}
    (base / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    load(base, cache)
    loaded = load(base, cache)
    assert USED in loaded.notes[0]
    ours, theirs = content(loaded), content(plain)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_copy_keeps_the_configs_of_the_source(base, cache):
    ends = {"eos_token_id": [3, 5]}
    (base / "generation_config.json").write_text(json.dumps(ends), encoding="utf-8")
    load(base, cache)
    copy = only_copy(cache)
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    assert config.pop("quantization_config")["bnb_4bit_quant_type"] == "nf4"
    assert config == json.loads((base / "config.json").read_text(encoding="utf-8"))
    assert json.loads((copy / "generation_config.json").read_text(encoding="utf-8")) == ends
    assert load(base, cache).network.generation_config.eos_token_id == [3, 5]


def test_copy_belongs_to_its_source_and_quantiser(base, cache, tiny_checkpoint, monkeypatch):
    load(base, cache)
    other, _ = tiny_checkpoint("qwen2", name="other", vocab_size=97)
    assert MADE in load(other, cache).notes[0]
    monkeypatch.setattr(loading, "QUANTISER_VERSION", 2)
    assert MADE in load(base, cache).notes[0]
    assert len([path for path in (cache / "models").iterdir() if path.is_dir()]) == 3


def test_quantized_copy_false_neither_makes_nor_reads_one(base, cache):
    assert load(base, cache, quantized_copy=False).notes == []
    assert not (cache / "models").exists()
    load(base, cache)
    shutil.rmtree(only_copy(cache))
    only = load(base, cache, quantized_copy=False)
    assert only.notes == [] and not [p for p in (cache / "models").iterdir() if p.is_dir()]


def test_flipped_bytes_are_found_said_and_mended(base, cache):
    plain = load(base, None)
    load(base, cache)
    copy = only_copy(cache)
    rng = random.Random(0)
    digests, index = copy / "manifest.json", copy / "model.safetensors.index.json"
    places = [(path, rng.randrange(path.stat().st_size)) for path in (digests, index) * 8]
    for weights in shards(copy):
        header_bytes = 8 + int.from_bytes(weights.read_bytes()[:8], "little")
        size = weights.stat().st_size
        places += [(weights, rng.randrange(header_bytes, size)) for _ in range(3)]
        places += [(weights, 0), (weights, 9), (weights, header_bytes), (weights, size - 1)]
        places += [(weights, rng.randrange(8, header_bytes)) for _ in range(3)]
    headers = {p: 8 + int.from_bytes(p.read_bytes()[:8], "little") for p in shards(copy)}
    for path, place in places:
        data = bytearray(path.read_bytes())
        data[place] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        loaded = load(base, cache)
        assert_same(loaded, plain)
        if path in headers and place >= headers[path]:
            assert AGAIN in loaded.notes[0] and MADE in loaded.notes[1]
            assert "\n" not in "".join(loaded.notes)
    assert load(base, cache).notes[0].count(USED) == 1


@pytest.mark.parametrize(
    "harm",
    [
        lambda copy: shards(copy)[1].unlink(),
        lambda copy: (copy / "model.safetensors.index.json").unlink(),
        lambda copy: (copy / "manifest.json").unlink(),
        lambda copy: (copy / "manifest.json").write_text("{}", encoding="utf-8"),
        lambda copy: os.truncate(shards(copy)[1], 2_000),
        lambda copy: [path.unlink() for path in copy.iterdir()],
    ],
    ids=["no layer", "no index", "no manifest", "empty manifest", "cut off", "empty folder"],
)
def test_incomplete_copy_is_replaced(base, cache, harm):
    first = load(base, cache)
    harm(only_copy(cache))
    loaded = load(base, cache)
    assert AGAIN in loaded.notes[0] and MADE in loaded.notes[1]
    assert_same(loaded, first)
    assert USED in load(base, cache).notes[0]


def test_disk_that_fills_up_costs_the_copy_and_not_the_load(base, cache):
    resource = pytest.importorskip("resource")
    plain = load(base, None)
    load(base, cache)
    sizes = [path.stat().st_size for path in shards(only_copy(cache))]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    rng = random.Random(1)
    limits_to_try = [rng.randrange(min(sizes) // 2, max(sizes)) for _ in range(8)]
    for limit in [*limits_to_try, max(sizes) - 1]:
        shutil.rmtree(only_copy(cache))
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))  # a write beyond it fails
        try:
            loaded = load(base, cache)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        (note,) = loaded.notes
        assert "no quantised copy is made: cannot write" in note and "\n" not in note
        assert_same(loaded, plain)
        assert is_clean(cache) and not [p for p in (cache / "models").iterdir() if p.is_dir()]
        assert MADE in load(base, cache).notes[0]


def test_cache_that_cannot_be_written_costs_the_copy_and_not_the_load(base, cache):
    cache.write_text("a file where a folder should be", encoding="utf-8")
    (note,) = load(base, cache).notes
    assert "no quantised copy is made: cannot write to" in note and str(cache) in note


def test_rename_that_fails_leaves_nothing(base, cache, monkeypatch):
    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(quantized_copy.os, "replace", full)
    (note,) = load(base, cache).notes
    assert note.endswith("No space left on device") and is_clean(cache)


def test_little_free_space_starts_no_copy(base, cache, monkeypatch):
    usage = shutil.disk_usage(base)
    monkeypatch.setattr(
        quantized_copy.shutil, "disk_usage", lambda path: usage._replace(free=2**30 + 1000)
    )
    monkeypatch.setattr(quantized_copy, "save_file", lambda *_: pytest.fail("a copy was begun"))
    (note,) = load(base, cache).notes
    assert "has 1.0 GiB free" in note and is_clean(cache)


def test_second_process_goes_without_a_copy_while_the_first_writes(base, cache):
    (cache / "models").mkdir(parents=True)
    unfinished = cache / "models" / ".abc.part"
    unfinished.mkdir()
    held = lock_file(cache / "models" / ".lock")
    loaded = load(base, cache)
    assert "another run is writing" in loaded.notes[0] and unfinished.exists()
    unlock_file(held)
    assert MADE in load(base, cache).notes[0] and not unfinished.exists()
    assert_same(load(base, cache), loaded)


def test_copy_that_another_process_finished_first_is_kept(base, cache):
    identity = load(base, cache).identity
    copy = only_copy(cache)
    before = {path.name: path.stat().st_ino for path in copy.iterdir()}
    with closing(CopyWriter(cache / "models", identity, ["a"], num_bytes=8)) as writer:
        writer.add("a", {"a": torch.zeros(2)})
        assert writer.finish(str(base), base) is None and writer.note is None
    assert {path.name: path.stat().st_ino for path in copy.iterdir()} == before
    assert USED in load(base, cache).notes[0]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError("damaged")])
def test_load_that_stops_half_way_leaves_nothing(base, cache, monkeypatch, error):
    quantised, calls = loading.quantize_nf4, []

    def stop_later(weight):
        calls.append(1)
        if len(calls) > 5:
            raise error
        return quantised(weight)

    monkeypatch.setattr(loading, "quantize_nf4", stop_later)
    with pytest.raises((KeyboardInterrupt, ValueError)):
        load(base, cache)
    assert is_clean(cache) and not [p for p in (cache / "models").iterdir() if p.is_dir()]


KILLED = """
    import os, signal, sys, torch
    from lowmem_dpo.weights.loading import load_model
    from lowmem_dpo.weights import quantized_copy
    from lowmem_dpo.weights.folders import load_config
    from pathlib import Path

    write, calls = quantized_copy.save_file, []

    def killed(*args):
        write(*args)
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    quantized_copy.save_file = killed
    load_model(sys.argv[1], config=load_config(sys.argv[1]), quantization="nf4",
               dtype=torch.float32, device="cpu", cache_dir=Path(sys.argv[2]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_killed_writer_leaves_what_the_next_one_cleans(base, cache):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(base), str(cache)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not is_clean(cache)
    loaded = load(base, cache)
    assert MADE in loaded.notes[0] and is_clean(cache)
    assert_same(loaded, load(base, None))
    assert USED in load(base, cache).notes[0]

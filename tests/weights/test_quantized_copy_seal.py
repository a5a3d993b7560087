"""What of a quantised copy is believed: its name seals the manifest, which holds the digests."""

import hashlib
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.weights.loading_lines import load_and_listen

AGAIN = "quantised again; its copy cannot be used and is removed"
MADE = "the next start reads the copy"


def load(folder, cache):
    return load_and_listen(folder, quantization="nf4", dtype=torch.float32, cache_dir=cache)


@pytest.fixture
def base(tiny_checkpoint):
    return tiny_checkpoint("llama", name="base")[0]


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def copies(cache):
    return {path for path in (cache / "models").iterdir() if path.is_dir()}


def assert_made_again(base, cache, harmed):
    """The changed copy is said and replaced, and the model is that of its source to the bit."""
    plain = load(base, None)
    loaded = load(base, cache)
    again, made = loaded.notes
    assert AGAIN in again and str(harmed) in again and MADE in made
    parameters = dict(plain.network.named_parameters())
    assert all(torch.equal(t, parameters[n]) for n, t in loaded.network.named_parameters())
    assert loaded.identity == plain.identity
    assert "read from its quantised copy" in load(base, cache).notes[0]


def edit(copy, digests_of):
    """Double the embedding, and write its digest where digests are."""
    path = copy / "model.embed_tokens.weight.safetensors"
    weight = load_file(path)["model.embed_tokens.weight"] * 2
    save_file({"model.embed_tokens.weight": weight}, path, {"format": "pt"})
    manifest = json.loads((copy / "manifest.json").read_text(encoding="utf-8"))
    digest = hashlib.sha256(weight.numpy().tobytes()).hexdigest()
    digests_of(manifest)["model.embed_tokens.weight"] = digest
    return manifest


def test_copy_edited_together_with_its_digests_is_not_believed(base, cache):
    load(base, cache)
    (copy,) = copies(cache)
    manifest = edit(copy, lambda manifest: manifest["tensors"])
    (copy / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    assert_made_again(base, cache, copy)


def test_content_of_another_bases_copy_is_not_believed(base, cache, tiny_checkpoint):
    other, _ = tiny_checkpoint("llama", name="other", initializer_range=0.1)
    load(other, cache)
    (of_other,) = copies(cache)
    load(base, cache)
    (copy,) = copies(cache) - {of_other}
    shutil.rmtree(copy)
    shutil.copytree(of_other, copy)
    assert_made_again(base, cache, copy)


def test_another_bases_copy_under_a_name_that_fits_its_seal_is_not_believed(
    base, cache, tiny_checkpoint
):
    other, _ = tiny_checkpoint("llama", name="other", initializer_range=0.1)
    load(other, cache)
    (of_other,) = copies(cache)
    identity = load(base, None).identity
    named = of_other.rename(of_other.with_name(identity[:32] + of_other.name[32:]))
    assert_made_again(base, cache, named)


def test_copy_of_an_earlier_release_without_a_seal_is_made_again(base, cache):
    identity = load(base, cache).identity
    (copy,) = copies(cache)
    tensors = json.loads((copy / "manifest.json").read_text(encoding="utf-8"))["tensors"]
    (copy / "manifest.json").unlink()
    (copy / "digests.json").write_text(json.dumps(tensors), encoding="utf-8")
    assert_made_again(base, cache, copy.rename(copy.with_name(identity)))
    assert len(copies(cache)) == 1


def test_whole_copy_carried_to_another_cache_is_read_there(base, cache, tmp_path):
    load(base, cache)
    shutil.copytree(cache, tmp_path / "elsewhere")
    assert "read from its quantised copy" in load(base, tmp_path / "elsewhere").notes[0]


def test_manifest_names_the_base(base, cache):
    identity = load(base, cache).identity
    (copy,) = copies(cache)
    manifest = json.loads((copy / "manifest.json").read_text(encoding="utf-8"))
    assert (manifest["source"], manifest["identity"]) == (str(base.resolve()), identity)


def test_files_named_digests_json_or_manifest_json_beside_a_model_count_for_nothing(base, cache):
    plain = load(base, None)
    for name in ("digests.json", "manifest.json"):
        forged = {str(path.resolve()): ["0" * 64] for path in base.iterdir()}
        (base / name).write_text(json.dumps(forged), encoding="utf-8")
    assert load(base, cache).identity == plain.identity

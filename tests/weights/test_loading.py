import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from lowmem_dpo.linears.lora import LoraLinear, linear_layers, lora_parameters
from lowmem_dpo.linears.nf4 import Nf4Weight, quantize_nf4
from lowmem_dpo.model.language_model import LanguageModel
from lowmem_dpo.weights import loading
from lowmem_dpo.weights.folders import load_config
from lowmem_dpo.weights.safetensors_files import StoredTensor
from lowmem_dpo.weights.size import storage_table
from tests.tiny import FAMILIES
from tests.weights.loading_lines import load_and_listen


def load(folder, quantization="none", dtype=torch.float32, cache_dir=None):
    return load_and_listen(
        folder,
        quantization=quantization,
        dtype=dtype,
        cache_dir=cache_dir,
    )


@torch.no_grad()
def logits(model):
    return model(input_ids=torch.arange(24).view(2, 12), use_cache=False).logits


def rewrite(folder, change):
    """Change the tensors of a checkpoint of one file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def refusal(call, *args, **kwargs):
    with pytest.raises(ValueError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_load_model_computes_what_transformers_does(tiny_checkpoint, family, tied):
    folder, model = tiny_checkpoint(family, tie_word_embeddings=tied, shards=tied)
    assert (folder / "model.safetensors.index.json").exists() == tied
    loaded = load(folder).network
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-6)


def test_load_model_of_an_id_downloads_it(tiny_checkpoint, monkeypatch):
    folder, model = tiny_checkpoint("llama")
    asked = []
    monkeypatch.setattr(loading, "download_model", lambda repo: asked.append(repo) or folder)
    config = load_config(str(folder))
    options = {"quantization": "none", "dtype": torch.float32, "device": "cpu"}
    loaded = loading.load_model("some/model", config=config, **options)
    assert asked == ["some/model"]
    torch.testing.assert_close(logits(loaded.network), logits(model), rtol=0, atol=1e-6)


@pytest.mark.parametrize("rope_type", ["linear", "llama3", "yarn"])
def test_load_model_rebuilds_the_rotary_tables(tiny_checkpoint, rope_type):
    scaling = {"rope_type": rope_type, "rope_theta": 500.0, "factor": 2.0}
    scaling["original_max_position_embeddings"] = 32
    if rope_type == "llama3":
        scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    folder, model = tiny_checkpoint("llama", rope_parameters=scaling)
    loaded = load(folder).network
    for name, table in model.model.rotary_emb.named_buffers():
        assert torch.equal(loaded.model.rotary_emb.get_buffer(name), table), name
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_load_model_in_nf4_computes_with_the_quantised_weights(tiny_checkpoint, family):
    folder, model = tiny_checkpoint(family)
    loaded = load(folder, "nf4").network
    exact = logits(model)
    for name, layer in linear_layers(loaded).items():
        assert isinstance(layer.weight, Nf4Weight)
        weight = model.get_submodule(name).weight
        weight.data = quantize_nf4(weight).dequantize(torch.float32)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-6)
    assert not torch.allclose(exact, logits(model), atol=1e-3)


def test_load_model_quantises_the_stored_numbers_and_casts_the_rest(tiny_checkpoint):
    folder, model = tiny_checkpoint("qwen2")
    loaded = load(folder, "nf4", torch.bfloat16).network
    for name, layer in linear_layers(loaded).items():
        weight = model.get_submodule(name).weight
        assert torch.equal(layer.weight.packed, quantize_nf4(weight).packed)
    floats = {p.dtype for p in loaded.parameters()}
    assert floats == {torch.bfloat16}
    assert loaded.model.rotary_emb.inv_freq.dtype == torch.float32
    assert logits(loaded).dtype == torch.bfloat16


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_load_model_is_frozen_in_eval_mode_and_named(tiny_checkpoint, quantization):
    folder, model = tiny_checkpoint("qwen3")
    loaded = load(folder, quantization).network
    assert not any(p.requires_grad for p in loaded.parameters())
    assert not any(module.training for module in loaded.modules())
    assert lora_parameters(loaded) == {}
    wanted = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "layers" in n}
    assert linear_layers(loaded).keys() == wanted
    assert not isinstance(loaded.lm_head, LoraLinear)
    for name, layer in linear_layers(loaded).items():
        assert loaded.get_submodule(name) is layer


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_load_model_rebuilds_the_scale_of_embeddings(tiny_checkpoint, family):
    folder, model = tiny_checkpoint(family)
    loaded = load(folder)
    embedding = loaded.network.model.embed_tokens
    assert embedding.embed_scale == model.model.embed_tokens.embed_scale == 64**0.5
    assert "embedding scale" in {row.kind for row in loaded.storage}
    ids = torch.arange(24).view(2, 12)
    from_embeddings = loaded.network(inputs_embeds=embedding(ids), use_cache=False).logits
    assert torch.equal(from_embeddings, logits(loaded.network))


def test_load_model_shares_a_tied_head(tiny_checkpoint):
    folder, _ = tiny_checkpoint("llama", tie_word_embeddings=True)
    loaded = load(folder).network
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    folder, _ = tiny_checkpoint("llama", tie_word_embeddings=False, name="untied")
    loaded = load(folder).network
    assert loaded.lm_head.weight is not loaded.model.embed_tokens.weight


def test_load_model_ignores_harmless_extras(tiny_checkpoint):
    folder, model = tiny_checkpoint("llama", tie_word_embeddings=True)

    def add(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    rewrite(folder, add)
    assert torch.equal(logits(load(folder).network), logits(model))


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_load_model_uses_a_head_of_its_own_whatever_the_config_says(
    tiny_checkpoint, tmp_path, quantization
):
    folder, _ = tiny_checkpoint("llama", tie_word_embeddings=True)
    head = torch.randn(96, 64, generator=torch.Generator().manual_seed(1)) * 0.2
    tied = load(folder, quantization, cache_dir=tmp_path / "cache")
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": head}))
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for _ in range(2):  # the second start reads the copy
        loaded = load(folder, quantization, cache_dir=tmp_path / "cache")
        assert torch.equal(loaded.network.lm_head.weight, theirs.lm_head.weight)
        assert "stores a head of its own" in loaded.notes[0]
        assert {row.format for row in loaded.storage if row.kind == "head"} == {"float32"}
        assert loaded.identity != tied.identity
    assert quantization == "none" or "quantised copy" in loaded.notes[1]
    if quantization == "none":
        torch.testing.assert_close(logits(loaded.network), logits(theirs), rtol=0, atol=1e-6)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_load_model_takes_a_tied_weight_under_the_heads_name_alone(
    tiny_checkpoint, tmp_path, quantization
):
    folder, _ = tiny_checkpoint("llama", tie_word_embeddings=True)
    rewrite(folder, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for _ in range(2):  # the second start reads the copy
        loaded = load(folder, quantization, cache_dir=tmp_path / "cache")
        assert loaded.network.lm_head.weight is loaded.network.model.embed_tokens.weight
        assert torch.equal(loaded.network.lm_head.weight, theirs.lm_head.weight)
    if quantization == "none":
        torch.testing.assert_close(logits(loaded.network), logits(theirs), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("model.norm.weight"), "lack model.norm.weight; "),
        (lambda t: t.pop("lm_head.weight"), "lack lm_head.weight; "),
        (lambda t: t.update(extra=torch.ones(1)), "hold unexpected extra; "),
        (
            lambda t: [t.pop(n) for n in list(t) if ".1.mlp." in n],
            "lack model.layers.1.mlp.down_proj.weight and 2 more; ",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(63)}),
            "has shape [63], config.json says [64]",
        ),
        (
            lambda t: t["model.layers.0.mlp.up_proj.weight"].fill_(float("nan")),
            "model.layers.0.mlp.up_proj.weight: the weight holds NaN",
        ),
    ],
)
def test_load_model_refuses_weights_that_do_not_fit(tiny_checkpoint, change, words):
    folder, _ = tiny_checkpoint("llama")
    rewrite(folder, change)
    assert words in refusal(load, folder, "nf4")


def test_load_model_checks_names_before_it_reads(tiny_checkpoint, monkeypatch):
    folder, _ = tiny_checkpoint("llama")
    rewrite(folder, lambda tensors: tensors.update(zzz=torch.ones(1)))
    monkeypatch.setattr(StoredTensor, "read", lambda *args: pytest.fail("a tensor was read"))
    assert "zzz" in refusal(load, folder)


def test_load_model_refuses_a_truncated_file(tiny_checkpoint):
    folder, _ = tiny_checkpoint("llama")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    message = refusal(load, folder)
    assert str(path) in message and "cut off" in message


def test_load_model_refuses_what_is_left_empty(tiny_checkpoint, monkeypatch):
    folder, _ = tiny_checkpoint("llama")
    empty_model = loading._empty_model

    def with_a_table(*args):
        model = empty_model(*args)
        model.model.register_buffer("table", torch.empty(2, device="meta"), persistent=False)
        return model

    monkeypatch.setattr(loading, "_empty_model", with_a_table)
    assert "model.table is not filled" in refusal(load, folder)


def test_identity_follows_content_and_quantisation(tiny_checkpoint, monkeypatch, tmp_path):
    folder, _ = tiny_checkpoint("llama", shards=True)
    cache = tmp_path / "cache"
    first = load(folder, cache_dir=cache).identity
    assert first == load(folder, cache_dir=cache).identity == load(folder).identity
    twin, _ = tiny_checkpoint("llama", shards=True, name="twin")
    assert load(twin).identity == first
    quantised = load(folder, "nf4").identity
    assert quantised != first
    monkeypatch.setattr(loading, "QUANTISER_VERSION", 2)
    assert load(folder, "nf4").identity != quantised
    assert load(folder).identity == first
    config = json.loads((twin / "config.json").read_text(encoding="utf-8"))
    (twin / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}), encoding="utf-8")
    assert load(twin).identity != first


def test_storage_adds_up_and_says_what_is_quantised(tiny_checkpoint):
    folder, _ = tiny_checkpoint("qwen2", tie_word_embeddings=True)
    loaded = load(folder, "nf4", torch.bfloat16)
    tensors = {
        t.data_ptr(): t.nbytes for t in [*loaded.network.parameters(), *loaded.network.buffers()]
    }
    assert sum(row.nbytes for row in loaded.storage) == sum(tensors.values())
    rows = {row.kind: row for row in loaded.storage}
    assert rows["attention linears"].format == rows["mlp linears"].format == "nf4, double quantised"
    assert (rows["attention linears"].count, rows["mlp linears"].count) == (8, 6)
    assert (rows["biases"].count, rows["norms"].count) == (6, 5)
    assert rows["embedding"].format == "bfloat16"
    assert rows["head"].format == "tied to the embedding" and rows["head"].nbytes == 0
    console = Console(width=100, file=None, record=True, quiet=False)
    with console.capture() as capture:
        console.print(storage_table(loaded.storage))
    assert "mlp linears" in capture.get() and "total" in capture.get()


@pytest.mark.parametrize("family", FAMILIES)
def test_language_model_names_the_parts_of_the_network(tiny_checkpoint, family):
    _, model = tiny_checkpoint(family)
    language_model = LanguageModel.of(model, "identity")
    ids = torch.arange(12)[None]
    hidden = language_model.backbone(input_ids=ids, use_cache=False).last_hidden_state
    products = hidden @ language_model.head_weight.T
    scaled = products * language_model.logit_scale
    if language_model.logit_softcap is not None:
        scaled = language_model.logit_softcap * torch.tanh(scaled / language_model.logit_softcap)
    torch.testing.assert_close(scaled, model(input_ids=ids).logits)
    plain_logits = family not in ("gemma2", "gemma3", "granite", "cohere", "cohere2")
    assert torch.equal(scaled, products) == plain_logits
    assert len(language_model.layers) == 2 and language_model.head_bias is None


def test_language_model_leaves_out_what_a_type_does_not_read(tiny_checkpoint):
    _, model = tiny_checkpoint("llama", logit_scale=3.0, final_logit_softcapping=1.0)
    language_model = LanguageModel.of(model, "identity")
    assert model.config.logit_scale == 3.0
    assert (language_model.logit_scale, language_model.logit_softcap) == (1.0, None)


LARGE = {
    "vocab_size": 8_000,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


def write_large_checkpoint(folder):
    """About 200 MB in bf16, written tensor by tensor: one block of noise, over and over."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(**LARGE)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tensors = {name: p for name, p in model.state_dict().items() if name != "lm_head.weight"}
    header, place = {}, 0
    for name, tensor in tensors.items():
        end = place + tensor.numel() * 2
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header).encode()
    noise = memoryview(torch.randn(2**20).bfloat16().view(torch.uint8).numpy())
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for left in (tensor.numel() * 2 for tensor in tensors.values()):
            while left:
                left -= file.write(noise[: min(left, len(noise))])
    return place, max(tensor.numel() * 2 for tensor in tensors.values())


MEASURE = """
    import sys, torch
    from pathlib import Path
    from lowmem_dpo.weights.loading import load_model
    from lowmem_dpo.weights.folders import load_config
    from lowmem_dpo.linears.nf4 import quantize_nf4

    def status(key):
        line = next(line for line in open("/proc/self/status") if line.startswith(key))
        return int(line.split()[1]) * 1024

    torch.set_num_threads(1)
    quantize_nf4(torch.randn(64, 64)).dequantize(torch.bfloat16)  # what is loaded on first use
    config = load_config(sys.argv[1])
    torch.device("meta"), load_model.__globals__["_empty_model"](config, torch.bfloat16)
    before = status("VmRSS")
    loaded = load_model(
        sys.argv[1], config=config, quantization="nf4", dtype=torch.bfloat16, device="cpu",
        cache_dir=Path(sys.argv[2]),
    )
    print(status("VmHWM") - before, sum(row.nbytes for row in loaded.storage))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to measure memory")
def test_load_model_needs_the_stored_model_and_two_tensors(tmp_path):
    num_bytes, largest = write_large_checkpoint(tmp_path)
    assert num_bytes > 190 * 10**6
    for line in ("the next start reads the copy", "read from its quantised copy"):
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                textwrap.dedent(MEASURE),
                str(tmp_path),
                str(tmp_path / "cache"),
            ],
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        peak, stored = map(int, done.stdout.split()[-2:])
        assert line in done.stdout
        assert stored < 0.35 * num_bytes
        assert peak < stored + 2 * largest, (peak, stored, largest)
    shutil.rmtree(tmp_path)

import json

import pytest
import torch
from bitsandbytes import functional as bnb
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lowmem_dpo.linears.lora import AdapterSpec, add_lora, linear_layers
from lowmem_dpo.linears.nf4 import Nf4Weight
from lowmem_dpo.weights import loading
from lowmem_dpo.weights.bitsandbytes_files import check_quantization_config, group_nf4
from lowmem_dpo.weights.safetensors_files import read_header
from tests.weights.loading_lines import load_and_listen

Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def bnb_checkpoint(tiny_checkpoint, tmp_path):
    """Have transformers quantise a tiny checkpoint and save it; gives the folder."""

    def write(
        family="llama",
        *,
        double=True,
        skip=None,
        dtype=torch.float32,
        storage="uint8",
        shards=False,
        **changes,
    ):
        folder, _ = tiny_checkpoint(family, dtype=dtype, **changes)
        settings = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=double,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_quant_storage=storage,
            llm_int8_skip_modules=skip,
        )
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, quantization_config=settings
        )
        model.save_pretrained(tmp_path / "bnb", **({"max_shard_size": "30KB"} if shards else {}))
        return tmp_path / "bnb"

    return write


def load(folder, dtype=torch.float32, **options):
    return load_and_listen(
        folder,
        quantization=options.pop("quantization", "nf4"),
        dtype=dtype,
        **options,
    )


def load_by_transformers(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    for module in model.modules():
        if isinstance(module, Linear4bit):  # else products in fp32 are rounded to bf16 on some CPUs
            module.support_avx512bf16_for_cpu = False
    return model


@torch.no_grad()
def logits(model):
    return model(input_ids=torch.arange(24).view(2, 12), use_cache=False).logits.float()


def dequantised_by_bitsandbytes(tensors, name):
    """A stored weight, read and dequantised by bitsandbytes alone."""
    parts = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
    state = bnb.QuantState.from_dict(parts, device=torch.device("cpu"))
    return bnb.dequantize_4bit(tensors[name], state)


def refusal(call, *args, **options):
    with pytest.raises(ValueError) as caught:
        call(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def state_of(tensors, name):
    return json.loads(bytes(tensors[f"{name}.quant_state.bitsandbytes__nf4"].tolist()))


def set_state(tensors, name, **changes):
    text = json.dumps(state_of(tensors, name) | changes).encode()
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    tensors[f"{name}.quant_state.bitsandbytes__nf4"] = data


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("skip", [None, ["lm_head", "q_proj", "model.layers.1.mlp"], ["down_proj"]])
def test_load_model_computes_what_transformers_does_from_the_same_files(
    bnb_checkpoint, double, skip
):
    folder = bnb_checkpoint("qwen2", double=double, skip=skip)
    theirs = load_by_transformers(folder)
    assert not torch.equal(logits(theirs), logits(load(folder.parent / "base").network))
    torch.testing.assert_close(logits(load(folder).network), logits(theirs), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("double", [True, False])
def test_load_model_takes_codes_and_scales_as_they_are(bnb_checkpoint, double, dtype):
    folder = bnb_checkpoint(double=double, dtype=dtype)
    tensors = load_file(folder / "model.safetensors")
    layers = linear_layers(load(folder, dtype).network)
    assert len(layers) == 14
    for name, layer in layers.items():
        assert torch.equal(layer.weight.packed, tensors[f"{name}.weight"].view(-1))
        assert torch.equal(layer.weight.absmax, tensors[f"{name}.weight.absmax"])
        dense = dequantised_by_bitsandbytes(tensors, f"{name}.weight")
        assert dense.dtype == dtype and torch.equal(layer.weight.dequantize(dtype), dense)


def test_load_model_in_half_precision_is_near_transformers(bnb_checkpoint):
    folder = bnb_checkpoint("qwen3", dtype=torch.bfloat16)
    theirs = load_by_transformers(folder)
    difference = logits(load(folder, torch.bfloat16).network) - logits(theirs)
    assert difference.pow(2).mean().sqrt() < 0.01 * logits(theirs).std()


@pytest.mark.parametrize(
    "changes",
    [{"shards": True}, {"tie_word_embeddings": True}, {"storage": "bfloat16"}],
    ids=["shards", "tied", "storage"],
)
def test_load_model_reads_other_arrangements(bnb_checkpoint, changes):
    folder = bnb_checkpoint(**changes)
    theirs = load_by_transformers(folder)
    torch.testing.assert_close(logits(load(folder).network), logits(theirs), rtol=0, atol=1e-6)


def test_load_model_leaves_modules_in_16_bit_and_says_so(bnb_checkpoint):
    folder = bnb_checkpoint(dtype=torch.bfloat16, skip=["lm_head", "q_proj", "model.layers.1.mlp"])
    loaded = load(folder, torch.float16)
    layers = linear_layers(loaded.network)
    dense = {name for name in layers if not isinstance(layers[name].weight, Nf4Weight)}
    assert dense == {"model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"} | {
        f"model.layers.1.mlp.{leaf}_proj" for leaf in ("gate", "up", "down")
    }
    stored = load_file(folder / "model.safetensors")[f"{Q_PROJ}.weight"]
    assert torch.equal(layers[Q_PROJ].weight, stored.half())
    rows = {(row.kind, row.format): row.count for row in loaded.storage}
    assert rows["attention linears", "float16"] == 2 and rows["mlp linears", "float16"] == 3
    assert rows["attention linears", "nf4, double quantised"] == 6
    (note,) = loaded.notes
    assert "taken as it is; 5 of its 14 linears are not, and stay so" in note


def test_load_model_names_single_quantisation_in_the_storage_table(bnb_checkpoint):
    rows = load(bnb_checkpoint(double=False)).storage
    assert {row.format for row in rows if "linears" in row.kind} == {"nf4"}


def test_adapters_go_on_layers_left_in_16_bit_too(bnb_checkpoint):
    model = load(bnb_checkpoint(skip=["lm_head", "q_proj"])).network
    names = add_lora(model, AdapterSpec(2, 2.0, 0.0, "all", rank_stabilised=False), seed=0)
    assert len(names) == 14 and Q_PROJ in names
    model(input_ids=torch.arange(12)[None], use_cache=False).logits.pow(2).sum().backward()
    for layer in linear_layers(model).values():
        assert layer.lora_b.grad.abs().max() > 0 and layer.lora_a.grad is not None


def test_load_model_dequantises_a_head_in_4_bits(bnb_checkpoint):
    folder = bnb_checkpoint(skip=["q_proj"])
    tensors = load_file(folder / "model.safetensors")
    assert tensors["lm_head.weight"].dtype == torch.uint8
    head = load(folder).network.lm_head.weight
    assert torch.equal(head, dequantised_by_bitsandbytes(tensors, "lm_head.weight"))
    assert not head.requires_grad


def test_load_model_uses_the_table_of_codes_that_is_stored(bnb_checkpoint):
    folder = bnb_checkpoint()
    name = f"{Q_PROJ}.weight"
    rewrite(folder, lambda tensors: tensors[f"{name}.nested_quant_map"].mul_(1.25))
    weight = linear_layers(load(folder).network)[Q_PROJ].weight
    expected = dequantised_by_bitsandbytes(load_file(folder / "model.safetensors"), name)
    assert weight.code is not None
    assert torch.equal(weight.dequantize(torch.float32), expected)
    assert linear_layers(load(folder).network)[Q_PROJ.replace("q_", "k_")].weight.code is None


def test_identity_of_a_quantised_model_is_that_of_its_files(bnb_checkpoint, monkeypatch):
    folder = bnb_checkpoint()
    first = load(folder).identity
    monkeypatch.setattr(loading, "QUANTISER_VERSION", 2)
    assert load(folder).identity == first
    rewrite(folder, lambda tensors: tensors[f"{Q_PROJ}.weight"].add_(1))
    assert load(folder).identity != first


def test_load_model_makes_no_copy_of_a_quantised_model(bnb_checkpoint, tmp_path):
    loaded = load(bnb_checkpoint(), cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache" / "models").exists()
    assert "quantized_copy" not in loaded.notes[0]
    loaded = load(tmp_path / "bnb", quantized_copy=False)
    assert "quantized_copy has no effect" in loaded.notes[0]


def test_load_model_refuses_quantization_none(bnb_checkpoint):
    folder = bnb_checkpoint()
    assert "quantization none cannot" in refusal(load, folder, quantization="none")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t, n: t.pop(f"{n}.absmax"), "absmax is missing"),
        (lambda t, n: t.pop(n), f"{Q_PROJ}.weight is missing"),
        (
            lambda t, n: t.pop(f"{n}.quant_state.bitsandbytes__nf4"),
            f"hold unexpected {Q_PROJ}.weight.absmax and 3 more",
        ),
        (lambda t, n: t.update({n: t[n][:-4].clone()}), "do not belong together"),
        (lambda t, n: t.update({f"{n}.absmax": torch.ones(64)}), "do not belong together"),
        (lambda t, n: t[f"{n}.quant_map"].neg_(), "levels are not those of NF4"),
        (lambda t, n: t[f"{n}.quant_state.bitsandbytes__nf4"].fill_(1), "cannot be read"),
        (lambda t, n: set_state(t, n, blocksize=128), "blocksize 128; only 64 is supported"),
        (lambda t, n: set_state(t, n, nested_blocksize=64), "nested_blocksize 64; only 256"),
        (lambda t, n: set_state(t, n, nested_offset=None), "cannot be read"),
        (lambda t, n: set_state(t, n, shape=[4096]), "cannot be read"),
        (lambda t, n: set_state(t, n, shape=[32, 128]), "config.json says [64, 64]"),
        (
            lambda t, n: t.update(
                {f"{n}.quant_state.bitsandbytes__fp4": t.pop(f"{n}.quant_state.bitsandbytes__nf4")}
            ),
            "only nf4",
        ),
        (lambda t, n: [t.pop(key) for key in list(t) if key.startswith(f"{n}.")], "torch.uint8"),
    ],
)
def test_load_model_refuses_damaged_and_other_quantised_weights(bnb_checkpoint, change, words):
    folder = bnb_checkpoint()
    rewrite(folder, lambda tensors: change(tensors, f"{Q_PROJ}.weight"))
    message = refusal(load, folder)
    assert words in message and Q_PROJ in message


def test_group_nf4_leaves_what_is_not_quantised(tiny_checkpoint):
    folder, _ = tiny_checkpoint()
    header = read_header(folder / "model.safetensors")
    assert group_nf4(header) == header


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quantised with gptq"),
        ({"quant_method": "awq"}, "quantised with awq"),
        ({"quant_method": "compressed-tensors"}, "quantised with compressed-tensors"),
        ({"quant_method": "fp8"}, "quantised with fp8"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "in 8 bits"),
        ({"_load_in_8bit": True}, "in 8 bits"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes as fp4"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "bitsandbytes as fp4"),
        ({"something": 1}, "quantised with ?"),
        ("nf4", "is no object"),
    ],
)
def test_check_quantization_config_names_what_it_refuses(settings, words):
    message = refusal(check_quantization_config, "some/model", {"quantization_config": settings})
    assert words in message and "some/model" in message


def test_check_quantization_config_takes_nf4_and_what_is_not_quantised():
    check_quantization_config("some/model", {})
    check_quantization_config("some/model", {"quantization_config": None})
    for method in ({"quant_method": "bitsandbytes"}, {}):
        settings = method | {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
        check_quantization_config("some/model", {"quantization_config": settings})

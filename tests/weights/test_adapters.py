import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lowmem_dpo.linears.lora import add_lora, lora_layers, lora_parameters
from lowmem_dpo.weights.adapters import (
    AdapterSpec,
    adapter_digest,
    load_adapter,
    other_base_storage,
    read_adapter_config,
    save_adapter,
    save_base_storage,
)
from lowmem_dpo.weights.folders import load_config, resolve_source
from lowmem_dpo.weights.loading import load_model
from tests.tiny import FAMILIES

SETTINGS = AdapterSpec(rank=3, alpha=6.0, dropout=0.1, targets="all", rank_stabilised=False)
IDS = torch.arange(24).view(2, 12)


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits


def load_base(folder):
    loaded = load_model(
        str(folder),
        config=load_config(str(folder)),
        quantization="none",
        dtype=torch.float32,
        device="cpu",
    )
    return loaded.network


def give_adapter(model, settings, seed=0):
    add_lora(model, settings, seed)


def trained(folder, settings=SETTINGS):
    """A base with an adapter that is not zero."""
    model = load_base(folder)
    give_adapter(model, settings)
    torch.manual_seed(1)
    for name, parameter in lora_parameters(model).items():
        if name.endswith("lora_b"):
            nn.init.normal_(parameter)
    return model


@pytest.fixture
def saved(tiny_checkpoint, tmp_path):
    """A base, a model with a trained adapter, and the folder it was saved to."""
    base, _ = tiny_checkpoint("llama")
    model = trained(base)
    save_adapter(tmp_path / "adapter", model, base_model=str(base), settings=SETTINGS)
    return base, model, tmp_path / "adapter"


def change_config(directory, **changes):
    path = directory / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps(config), encoding="utf-8")


def change_tensors(directory, change):
    tensors = load_file(directory / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, directory / "adapter_model.safetensors")


def refusal(call, *args):
    with pytest.raises(ValueError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("family", "targets", "rank_stabilised"),
    [
        *((family, "all", False) for family in FAMILIES),
        ("llama", ["q_proj", "v_proj"], True),
        ("llama", ["1.mlp.up_proj"], False),
        ("phi3", ["qkv_proj", "gate_up_proj"], False),
    ],
)
def test_save_adapter_loads_in_peft_with_equal_logits(
    tiny_checkpoint, tmp_path, family, targets, rank_stabilised
):
    peft = pytest.importorskip("peft")
    folder, theirs = tiny_checkpoint(family)
    settings = AdapterSpec(3, 6.0, 0.1, targets, rank_stabilised)
    ours = trained(folder, settings)
    save_adapter(tmp_path / "adapter", ours, base_model=str(folder), settings=settings)
    save_base_storage(tmp_path / "adapter", {"quantization": "none"})
    base_logits = logits(theirs)
    wrapped = peft.PeftModel.from_pretrained(theirs, str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(logits(wrapped), logits(ours), rtol=0, atol=1e-5)
    assert not torch.allclose(logits(ours), base_logits, atol=1e-3)
    pairs = [n for n, _ in wrapped.named_parameters() if ".lora_A." in n]
    assert len(pairs) == len(lora_layers(ours))


@pytest.mark.parametrize(
    ("family", "target_modules", "use_rslora"),
    [
        *((family, "all-linear", False) for family in FAMILIES),
        ("llama", ["q_proj", "down_proj"], True),
        ("qwen2", r".*\.1\.self_attn\.(q|k)_proj", False),
    ],
)
def test_load_adapter_reads_what_peft_writes(
    tiny_checkpoint, tmp_path, family, target_modules, use_rslora
):
    peft = pytest.importorskip("peft")
    folder, base = tiny_checkpoint(family)
    config = peft.LoraConfig(
        r=2,
        lora_alpha=5,
        target_modules=target_modules,
        use_rslora=use_rslora,
        task_type="CAUSAL_LM",
    )
    theirs = peft.get_peft_model(base, config)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    theirs.eval().save_pretrained(str(tmp_path / "adapter"))
    settings = read_adapter_config(tmp_path / "adapter")
    assert (settings.rank, settings.alpha, settings.rank_stabilised) == (2, 5.0, use_rslora)
    ours = load_base(folder)
    give_adapter(ours, settings)
    load_adapter(ours, tmp_path / "adapter")
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=5e-5)


@pytest.mark.parametrize(
    "features",
    [
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 0},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
        {"target_modules": ["model.layers.0.mlp.up_proj", "q_proj"], "layers_to_transform": [1]},
        {"target_modules": "all-linear", "exclude_modules": ["up_proj", "1.self_attn.q_proj"]},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*layers\.0\..*"},
        {"target_modules": r".*\.(0\.self_attn\.(q|k)|1\.mlp\.down)_proj"},
        {"target_modules": "all-linear", "rank_pattern": {"q_proj": 5, "mlp.up_proj": 1}},
        {"target_modules": "all-linear", "alpha_pattern": {r"layers\.1\.mlp\..*": 9, "q_proj": 1}},
        {
            "target_modules": ["q_proj", "k_proj", "down_proj"],
            "rank_pattern": {"^model.layers.0.self_attn.q_proj": 4, "q_proj": 3, "[kv]_proj": 7},
            "alpha_pattern": {"q_proj": 8, "0.self_attn.q_proj": 2},
            "use_rslora": True,
            "exclude_modules": r"model\.layers\.1\.mlp.*",
        },
    ],
    ids=lambda features: "-".join(features),
)
def test_load_adapter_step_and_save_adapter_equal_peft(tiny_checkpoint, tmp_path, features):
    peft = pytest.importorskip("peft")
    folder, base = tiny_checkpoint("llama")
    config = peft.LoraConfig(r=2, lora_alpha=5, task_type="CAUSAL_LM", **features)
    theirs = peft.get_peft_model(base, config).eval()
    torch.manual_seed(2)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    # PEFT sorts the patterns in its file, and the first that matches counts: the file is the word.
    theirs.load_adapter(str(tmp_path / "theirs"), "file", is_trainable=True)
    theirs.set_adapter("file")
    settings = read_adapter_config(tmp_path / "theirs")
    ours = load_base(folder)
    give_adapter(ours, settings)
    load_adapter(ours, tmp_path / "theirs")
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-5)
    for model in (ours, theirs):
        model(input_ids=IDS, use_cache=False).logits.log_softmax(-1)[..., 7].mean().backward()
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
    save_adapter(tmp_path / "ours", ours, base_model=str(folder), settings=settings)
    theirs.save_pretrained(str(tmp_path / "stepped"), selected_adapters=["file"])
    paths = (tmp_path / "theirs", tmp_path / "stepped" / "file", tmp_path / "ours")
    start, stepped, written = (load_file(path / "adapter_model.safetensors") for path in paths)
    assert all((written[name] - start[name]).abs().max() > 1e-6 for name in start)
    torch.testing.assert_close(written, stepped, rtol=1e-4, atol=1e-6)
    theirs.load_adapter(str(tmp_path / "ours"), "ours")
    theirs.set_adapter("ours")
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=0, atol=1e-5)
    again = read_adapter_config(tmp_path / "ours")
    assert set(again.targets) == set(settings.targets)
    assert replace(again, targets="all") == replace(settings, targets="all")


def test_save_and_load_adapter_give_the_same_bits(saved):
    base, model, directory = saved
    assert read_adapter_config(directory) == AdapterSpec(
        rank=3,
        alpha=6.0,
        dropout=0.1,
        targets=sorted(
            ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        ),
        rank_stabilised=False,
    )
    other = load_base(base)
    give_adapter(other, read_adapter_config(directory), seed=5)
    load_adapter(other, directory)
    for name, parameter in lora_parameters(model).items():
        assert torch.equal(lora_parameters(other)[name], parameter), name
    assert torch.equal(logits(other), logits(model))


def test_save_adapter_writes_peft_names_in_fp32_and_no_half_files(saved):
    base, _, directory = saved
    tensors = load_file(directory / "adapter_model.safetensors")
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in tensors
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert {path.name for path in directory.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert resolve_source(str(directory), None)[0] == str(base.resolve())


def test_save_adapter_keeps_a_hub_id_as_it_is(saved):
    _, model, directory = saved
    save_adapter(directory, model, base_model="some/model", settings=SETTINGS)
    assert resolve_source(str(directory), None)[0] == "some/model"


def test_save_and_load_adapter_see_through_wrappers(saved):
    class Wrapper(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

    base, model, directory = saved
    before = (directory / "adapter_model.safetensors").read_bytes()
    model.model.layers[0] = Wrapper(model.model.layers[0])
    save_adapter(directory, model, base_model=str(base), settings=SETTINGS)
    assert (directory / "adapter_model.safetensors").read_bytes() == before
    load_adapter(model, directory)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3'"),
        ({"peft_type": None}, "peft_type=None"),
        ({"use_dora": True}, "use_dora=True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=['lm_head']"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices=[1]"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=True"),
        ({"layer_replication": [[0, 2]]}, "layer_replication="),
        ({"layers_to_transform": [0]}, "layers.1.mlp.down_proj, which its own adapter_config"),
        ({"layers_to_transform": 1}, "layers.0.mlp.down_proj, which its own adapter_config"),
        ({"exclude_modules": ["up_proj"]}, "layers.0.mlp.up_proj, which its own adapter_config"),
        ({"exclude_modules": r".*mlp.*"}, "layers.0.mlp.down_proj, which its own adapter_config"),
        ({"target_modules": r".*\.q_proj"}, "which its own adapter_config.json leaves out"),
        ({"target_modules": "(q_proj"}, "missing ), unterminated subpattern"),
        ({"rank_pattern": {"(q_proj": 4}}, "missing ), unterminated subpattern"),
        ({"rank_pattern": {"q_proj": "many"}}, "must be numbers"),
        ({"rank_pattern": {"q_proj": 0}}, "r must be at least 1, got 0"),
        ({"rank_pattern": [1]}, "must be numbers"),
        ({"alpha_pattern": {"q_proj": None}}, "must be numbers"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights='loftq'"),
        ({"loftq_config": {"loftq_bits": 4}}, "loftq_config="),
        ({"use_dora": True}, "merge it into its base with PEFT (merge_and_unload)"),
        ({"something_of_tomorrow": 3}, "something_of_tomorrow=3, which is not known here"),
        (
            {"something_of_tomorrow": 3, "peft_version": "0.99.0"},
            "(written by PEFT 0.99.0); where that is PEFT's default and the adapter is plain LoRA, "
            "take it out of adapter_config.json",
        ),
        ({"target_modules": ["q_proj", "lm_head"]}, "adapts lm_head"),
        ({"target_modules": ["embed_tokens"]}, "adapts embed_tokens"),
        ({"target_modules": None}, "target_modules must name layers"),
        ({"r": None}, "r and lora_alpha must be numbers"),
        ({"r": 0}, "r must be at least 1"),
    ],
)
def test_read_adapter_config_refuses_by_name_what_is_not_plain_lora(saved, changes, words):
    change_config(saved[2], **changes)
    assert words in refusal(read_adapter_config, saved[2])


def test_read_adapter_config_takes_the_defaults_of_peft(saved):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules="all-linear").to_dict()
    change_config(saved[2], **{k: list(v) if isinstance(v, set) else v for k, v in config.items()})
    assert read_adapter_config(saved[2]).rank == 3


def test_read_adapter_config_refuses_tensors_of_other_kinds(saved):
    change_tensors(saved[2], lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(1)}))
    assert "base_model.model.lm_head.weight, which is no LoRA matrix" in refusal(
        read_adapter_config, saved[2]
    )


def test_read_adapter_config_refuses_pickles_and_missing_files(saved, tmp_path):
    _, _, directory = saved
    assert "no adapter_config.json in it" in refusal(read_adapter_config, tmp_path)
    (directory / "adapter_model.safetensors").rename(directory / "adapter_model.bin")
    assert "is pickled" in refusal(read_adapter_config, directory)
    (directory / "adapter_model.bin").unlink()
    assert "cannot read" in refusal(read_adapter_config, directory)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(max(t)), "lacks base_model.model.model.layers.1"),
        (
            lambda t: t.update(
                {"base_model.model.model.layers.7.mlp.up_proj.lora_A.weight": torch.ones(1)}
            ),
            "no place for: base_model.model.model.layers.7",
        ),
        (
            lambda t: t.update({max(t): torch.ones(32, 4)}),
            "has shape [32, 4], the model needs [32, 3]",
        ),
    ],
)
def test_load_adapter_refuses_tensors_that_do_not_fit(saved, change, words):
    _, model, directory = saved
    before = {name: p.clone() for name, p in lora_parameters(model).items()}
    change_tensors(directory, change)
    assert words in refusal(load_adapter, model, directory)
    assert all(torch.equal(p, before[name]) for name, p in lora_parameters(model).items())


def test_adapter_digest_follows_what_the_adapter_computes(saved):
    _, _, directory = saved
    first = adapter_digest(directory)
    change_config(directory, lora_dropout=0.5, base_model_name_or_path="elsewhere")
    assert adapter_digest(directory) == first
    change_config(directory, lora_alpha=7)
    second = adapter_digest(directory)
    assert second != first
    change_tensors(directory, lambda tensors: tensors[max(tensors)].add_(1))
    assert adapter_digest(directory) not in (first, second)


def test_adapter_digest_follows_alpha_pattern(saved):
    _, _, directory = saved
    digests = {adapter_digest(directory)}
    for pattern in ({"q_proj": 7}, {"k_proj": 7}, {"q_proj": 7, ".*": 8}, {".*": 8, "q_proj": 7}):
        change_config(directory, alpha_pattern=pattern)
        digests.add(adapter_digest(directory))
    assert len(digests) == 5


def test_read_adapter_config_takes_what_is_off_whatever_its_name(saved):
    off = {"use_tomorrow": False, "tomorrow_config": {"depth": 0, "more": {"name": None}}}
    eva = {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}}
    change_config(saved[2], **off, **eva)
    assert read_adapter_config(saved[2]).rank == 3


def test_other_base_storage_names_what_was_different(tmp_path):
    assert other_base_storage(tmp_path, {"quantization": "nf4"}) == {}  # an adapter of PEFT's
    save_base_storage(tmp_path, {"quantization": "none", "dtype": "float32"})
    storage = {"quantization": "nf4", "dtype": "float32", "head_quantization": "int8"}
    assert other_base_storage(tmp_path, storage) == {"quantization": "none"}

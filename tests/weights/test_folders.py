import json
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from lowmem_dpo.weights import folders
from lowmem_dpo.weights.folders import (
    SUPPORTED_MODEL_TYPES,
    answer_ends,
    load_config,
    load_tokenizer,
    resolve_source,
    rope_limit,
)
from tests.tiny import FAMILIES, tiny_model

BASE = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 32}


def write_config(folder, **changes):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(BASE | changes), encoding="utf-8")
    return str(folder)


def write_adapter(folder, base):
    folder.mkdir(exist_ok=True)
    content = {"peft_type": "LORA", "base_model_name_or_path": base}
    (folder / "adapter_config.json").write_text(json.dumps(content), encoding="utf-8")
    return str(folder)


def write_tokenizer(folder, word="hello"):
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, word: 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    return str(folder)


def refusal(call, *args, **kwargs):
    with pytest.raises(ValueError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    return message


@pytest.mark.parametrize("model_type", SUPPORTED_MODEL_TYPES)
def test_load_config_reads_every_supported_type(tmp_path, model_type):
    folder = write_config(tmp_path / "m", model_type=model_type, architectures=None)
    assert load_config(folder).model_type == model_type


@pytest.mark.parametrize(
    ("name", "value"), [("hidden_size", -4), ("num_attention_heads", 0), ("num_hidden_layers", 0)]
)
def test_load_config_refuses_sizes_that_no_model_has(tmp_path, name, value):
    folder = write_config(tmp_path / "m", **{name: value})
    message = refusal(load_config, folder)
    assert message == f"config.json of {folder} is not valid: {name} is {value}"


def test_every_supported_type_is_among_the_families_that_are_tested():
    assert {family["model_type"] for family in FAMILIES.values()} == set(SUPPORTED_MODEL_TYPES)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "gemma3"}, "'gemma3'; it reads images too; take a text-only"),
        ({"model_type": "gpt_oss"}, "'gpt_oss'; supported: cohere, cohere2, gemma2"),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "in both directions"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "both directions"),
        ({"is_causal": False}, "in both directions"),
        (
            {
                "model_type": "qwen3",
                "num_hidden_layers": 2,
                "layer_types": ["full_attention", "chunked_attention"],
            },
            "layers of type chunked_attention; supported: full_attention, sliding_attention",
        ),
        (
            {
                "model_type": "gemma3_text",
                "rope_parameters": {"full_attention": {"rope_type": "dynamic", "factor": 2.0}},
            },
            "position encoding 'dynamic'",
        ),
        ({"model_type": "t5", "is_encoder_decoder": True}, "'t5'; supported"),
        ({"model_type": "qwen2_vl"}, "'qwen2_vl'; supported"),
        ({"model_type": None}, "None; supported"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "only causal language models"),
        ({"architectures": ["LlamaModel"]}, "only causal language models"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}, "never run"),
        ({"quantization_config": {"quant_method": "gptq"}}, "is quantised with gptq"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "position encoding 'dynamic'"),
        ({"hidden_size": "wide"}, "is not valid"),
    ],
)
def test_load_config_refuses_by_name(tmp_path, changes, words):
    assert words in refusal(load_config, write_config(tmp_path / "m", **changes))


@pytest.mark.parametrize("rope_type", ["linear", "llama3", "yarn"])
def test_load_config_takes_position_encodings_that_do_not_depend_on_neighbours(tmp_path, rope_type):
    scaling = {"rope_type": rope_type, "factor": 2.0, "original_max_position_embeddings": 32}
    if rope_type == "llama3":
        scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = load_config(write_config(tmp_path / "m", rope_scaling=scaling))
    assert config.rope_parameters["rope_type"] == rope_type


def test_load_config_takes_longrope_up_to_where_its_frequencies_change(tmp_path):
    folder = tmp_path / "m"
    tiny_model("phi3-longrope").config.save_pretrained(folder)
    assert rope_limit(load_config(str(folder), max_length=256)) == 256
    with pytest.raises(ValueError, match="max_length is 257, set it to 256 or less"):
        load_config(str(folder), max_length=257)
    llama = load_config(write_config(tmp_path / "llama"), max_length=10**6)
    assert rope_limit(llama) is None


PHI3_CODE = {
    "AutoConfig": "configuration_phi3.Phi3Config",
    "AutoModelForCausalLM": "some/model--modeling_phi3.Phi3ForCausalLM",
    "AutoTokenizer": "some/tokenizer",
}


def test_load_config_takes_code_that_transformers_has_adopted_and_no_other(tmp_path):
    changes = {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "hidden_size": 32}
    changes |= {"num_attention_heads": 4}
    folder = write_config(tmp_path / "m", **changes, auto_map=PHI3_CODE)
    assert type(load_config(folder)).__module__ == "transformers.models.phi3.configuration_phi3"
    for other in (
        PHI3_CODE | {"AutoModelForCausalLM": "modeling_phi3.MyPhi3ForCausalLM"},
        "modeling_phi3.Phi3ForCausalLM",
    ):
        folder = write_config(tmp_path / "m", **changes, auto_map=other)
        assert "never run" in refusal(load_config, folder)
    folder = write_config(tmp_path / "m", auto_map=PHI3_CODE)
    assert "never run" in refusal(load_config, folder)


def test_load_config_says_what_is_wrong_with_a_path(tmp_path):
    (tmp_path / "file.gguf").write_text("x", encoding="utf-8")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{", encoding="utf-8")
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "config.json").write_text("[]", encoding="utf-8")
    assert "there is no folder" in refusal(load_config, str(tmp_path / "absent" / "model"))
    assert "there is no folder" in refusal(load_config, "./absent")
    assert "there is no folder" in refusal(load_config, "C:\\models\\absent")
    assert "is a file" in refusal(load_config, str(tmp_path / "file.gguf"))
    assert "no config.json in it" in refusal(load_config, str(tmp_path / "empty"))
    assert "is not valid JSON" in refusal(load_config, str(tmp_path / "broken"))
    assert "must hold a JSON object" in refusal(load_config, str(tmp_path / "list"))


def test_load_config_of_an_id_asks_for_config_json_alone(monkeypatch, tmp_path):
    asked = []
    write_config(tmp_path / "m")

    def download(repo):
        asked.append(repo)
        return tmp_path / "m" / "config.json"

    monkeypatch.setattr(folders, "download_config", download)
    assert load_config("some/model").hidden_size == 32
    assert asked == ["some/model"]


def test_load_tokenizer_of_an_id_downloads_it(monkeypatch, tmp_path):
    monkeypatch.setattr(folders, "download_small_files", lambda repo: tmp_path / repo)
    (tmp_path / "some" / "model").mkdir(parents=True)
    write_tokenizer(tmp_path / "some" / "model")
    assert load_tokenizer("some/model")("hello")["input_ids"] == [1]


def test_resolve_source_passes_a_model_through(tmp_path):
    adapter = write_adapter(tmp_path / "adapter", "base")
    assert resolve_source("some/model", None) == ("some/model", None, None)
    assert resolve_source("base", adapter) == ("base", adapter, None)


def test_resolve_source_tells_of_an_adapter_made_for_another_base(tmp_path):
    base = write_config(tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", "base")
    nameless = write_adapter(tmp_path / "nameless", None)
    model, init_adapter, note = resolve_source("some/model", adapter)
    assert (model, init_adapter) == ("some/model", adapter)
    assert f"names base as its base; it is put on {model}" in note and "\n" not in note
    assert resolve_source(base, adapter) == (base, adapter, None)  # a relative name of the same
    assert resolve_source(base, nameless) == (base, nameless, None)


def test_a_run_folder_given_for_its_adapter_is_answered_with_a_hint(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    assert "did you mean" not in refusal(resolve_source, "some/model", str(run))
    write_adapter(run / "adapter", "base")
    assert f"did you mean {run / 'adapter'}?" in refusal(resolve_source, str(run), str(run))
    write_adapter(run / "best", "base")
    for call, args in ((resolve_source, (str(run), str(run))), (load_config, (str(run),))):
        message = refusal(call, *args)
        assert f"did you mean {run / 'best'}?" in message and "init_adapter" not in message


def test_resolve_source_finds_the_base_of_an_adapter(tmp_path, monkeypatch):
    adapter = write_adapter(tmp_path / "adapter", "some/model")
    base, init_adapter, note = resolve_source(adapter, None)
    assert (base, init_adapter) == ("some/model", adapter)
    assert adapter in note and "some/model" in note and "\n" not in note
    assert resolve_source(adapter, str(tmp_path / "." / "adapter" / ".." / "adapter"))[:2] == (
        base,
        adapter,
    )


@pytest.mark.parametrize("place", [".", "..", "../adapter"])
def test_resolve_source_finds_a_relative_base(tmp_path, monkeypatch, place):
    adapter = write_adapter(tmp_path / "adapter", "base")
    here = tmp_path / "here"
    here.mkdir()
    folder = here / place / "base"
    write_config(folder)
    monkeypatch.chdir(here)
    assert Path(resolve_source(adapter, None)[0]).resolve() == folder.resolve()


def test_resolve_source_refuses_contradictions(tmp_path):
    one = write_adapter(tmp_path / "one", "base")
    two = write_adapter(tmp_path / "two", "base")
    nameless = write_adapter(tmp_path / "nameless", None)
    assert "leave init_adapter out" in refusal(resolve_source, one, two)
    assert "does not name its base" in refusal(resolve_source, nameless, None)
    for model, other in ((one, two), (nameless, None)):
        message = refusal(resolve_source, model, other, "adapter")
        assert "init_adapter" not in message and message.endswith(("adapter out", "as adapter"))
    assert "no adapter_config.json" in refusal(resolve_source, "some/model", str(tmp_path))


def test_load_tokenizer_prefers_the_adapters_if_it_holds_one(tmp_path):
    base, adapter = tmp_path / "base", write_adapter(tmp_path / "adapter", "base")
    write_tokenizer(base, "base")
    assert load_tokenizer(str(base))("base")["input_ids"] == [1]
    assert load_tokenizer(str(base), adapter)("base")["input_ids"] == [1]
    write_tokenizer(Path(adapter))
    assert load_tokenizer(str(base), adapter)("hello")["input_ids"] == [1]
    assert load_tokenizer(str(base), adapter)("base")["input_ids"] == [0]
    assert load_tokenizer(adapter)("hello")["input_ids"] == [1]


def test_load_tokenizer_says_what_is_missing(tmp_path, tiny_checkpoint):
    folder, _ = tiny_checkpoint("llama", dtype=torch.bfloat16)
    assert "holds no tokenizer" in refusal(load_tokenizer, str(folder))
    write_tokenizer(folder)
    assert load_tokenizer(str(folder))("hello")["input_ids"] == [1]
    settings = (folder / "tokenizer_config.json").read_text(encoding="utf-8")
    (folder / "tokenizer_config.json").write_text("[]", encoding="utf-8")
    assert "cannot load the tokenizer" in refusal(load_tokenizer, str(folder))
    (folder / "tokenizer_config.json").write_text(settings, encoding="utf-8")
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    assert "cannot load the tokenizer" in refusal(load_tokenizer, str(folder))
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("content", "ends"),
    [(None, []), ({}, []), ({"eos_token_id": 5}, [5]), ({"eos_token_id": [5, 7]}, [5, 7])],
)
def test_answer_ends_reads_the_generation_config(tmp_path, content, ends):
    if content is not None:
        text = json.dumps(content)
        (tmp_path / "generation_config.json").write_text(text, encoding="utf-8")
    assert answer_ends(tmp_path) == ends


def test_answer_ends_refuses_what_are_no_tokens(tmp_path):
    text = json.dumps({"eos_token_id": ["</s>"]})
    (tmp_path / "generation_config.json").write_text(text, encoding="utf-8")
    assert "must be a token id" in refusal(answer_ends, tmp_path)


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_load_config_and_tokenizer_take_a_config_that_leaves_the_dtype_open(
    llama_dir, tmp_path, name
):
    folder = shutil.copytree(llama_dir, tmp_path / "model")
    raw = json.loads((folder / "config.json").read_text())
    raw = {key: value for key, value in raw.items() if "dtype" not in key}
    (folder / "config.json").write_text(json.dumps(raw | {name: "auto"}))
    config = load_config(str(folder))
    usual = load_config(str(llama_dir))
    other = {"dtype": None, "_name_or_path": ""}
    assert config.to_dict() | other == usual.to_dict() | other
    tokenizer = load_tokenizer(str(folder), config=config)
    assert tokenizer("ab").input_ids == load_tokenizer(str(llama_dir))("ab").input_ids


def test_load_config_refuses_a_dtype_that_is_none(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json of .* is not valid: .*bf16"):
        load_config(write_config(tmp_path / "model", dtype="bf16"))

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lowmem_dpo.cli import main
from lowmem_dpo.machine.card_table import find_card
from lowmem_dpo.memory.levers import Levers
from lowmem_dpo.pipeline import generate as generate_verb
from lowmem_dpo.pipeline.generate import plan_answers
from lowmem_dpo.settings.configs import GenerateConfig
from lowmem_dpo.training.policy import load_policy, read_source
from lowmem_dpo.weights import size
from tests.errors import one_line_error
from tests.tiny import save_tiny_model


def generate(model: Path, *words: str) -> int:
    return main(["generate", "--model", str(model), "--max_new_tokens", "8", *words])


@pytest.mark.usefixtures("without_plots")
def test_generate_shows_base_and_adapter_side_by_side(tmp_path, llama_dir, pairs_file, capsys):
    words = ["--model", str(llama_dir), "--data", str(pairs_file())]
    words += ["--output_dir", str(tmp_path / "out"), "--lora_r", "4", "--max_steps", "1"]
    assert main(["train", *words]) == 0
    adapter = str(tmp_path / "out" / "adapter")
    capsys.readouterr()
    words = ["generate", "--adapter", adapter, "--max_new_tokens", "8", "--prompt", "hello"]
    assert main([*words, "--model", str(llama_dir)]) == 0
    printed = capsys.readouterr().out
    assert printed.index("prompt: hello") < printed.index("base:") < printed.index("adapter:")
    assert main(words) == 0  # the adapter names its base
    assert "adapter:" in capsys.readouterr().out


def test_generate_reads_prompts_from_files(tmp_path, llama_dir, capsys):
    files = {
        "p.txt": "one\n\ntwo\n",
        "p.jsonl": '{"prompt": "one"}\n{"prompt": "two"}\n',
        "p.json": '[{"prompt": "one"}, {"prompt": "two"}]',
        "p.csv": "prompt,note\none,1\ntwo,2\n",
    }
    for name, text in files.items():
        path: Path = tmp_path / name
        path.write_text(text)
        assert generate(llama_dir, "--prompts", str(path), "--max_new_tokens", "2") == 0
        printed = capsys.readouterr().out
        assert "prompt: one" in printed and "prompt: two" in printed and "adapter:" not in printed


def test_generate_warns_of_answers_beyond_the_models_positions(llama_dir, capsys):
    assert generate(llama_dir, "--prompt", "a" * 600, "--max_new_tokens", "1") == 0
    assert "the model was made for 512; shorten one" in " ".join(capsys.readouterr().out.split())


def test_generate_refuses_prompts_that_the_model_cannot_answer(tmp_path, llama_dir, capsys):
    assert generate(llama_dir, "--prompt", "") == 2
    assert "prompt is empty" in one_line_error(capsys)
    small = save_tiny_model(tmp_path / "small", vocab_size=100)
    assert generate(small, "--prompt", "hello") == 2
    assert "vocabulary has 100" in one_line_error(capsys)


def test_generate_with_longrope_takes_texts_of_its_first_range(tmp_path, capsys):
    model = save_tiny_model(tmp_path / "m", "phi3-longrope")
    assert generate(model, "--prompt", "hello") == 0
    assert "nothing to compare" in capsys.readouterr().out
    assert generate(model, "--prompt", "hello" * 60) == 2
    line = one_line_error(capsys)
    assert "beyond 256 tokens" in line and "max_length" not in line


def test_generate_refuses_a_bad_file_of_prompts(tmp_path, llama_dir, capsys):
    (tmp_path / "p.jsonl").write_text('{"text": "one"}\n')
    assert generate(llama_dir, "--prompts", str(tmp_path / "p.jsonl")) == 2
    assert "p.jsonl, line 1: every row must be an object with" in one_line_error(capsys)
    path = tmp_path / "p.txt"
    for content, said in (
        (
            b"one\n\nz\xff\n",
            "p.txt, line 3: not valid UTF-8 (byte 1 of the row); save the file as",
        ),
        ("one".encode("utf-16-le"), "p.txt, line 1: holds NUL bytes, as UTF-16 does"),
        (b" \n", "p.txt holds no prompts; write one a line"),
    ):
        path.write_bytes(content)
        assert generate(llama_dir, "--prompts", str(path)) == 2
        assert said in one_line_error(capsys)
    for name, said in ((tmp_path, "give a file of prompts"), ("gone.txt", "No such file or")):
        assert generate(llama_dir, "--prompts", str(name)) == 2
        line = one_line_error(capsys)
        assert f"cannot read the prompts in {name}: " in line and said in line
        assert "Errno" not in line
    assert main(["generate", "--model", str(llama_dir)]) == 2
    assert "--prompt" in one_line_error(capsys)


def test_generate_uses_the_quantised_copy(llama_dir, capsys, monkeypatch):
    assert generate(llama_dir, "--prompt", "hello", "--seed", "1") == 0
    first = capsys.readouterr().out
    assert "quantised; the next start reads the copy" in first
    monkeypatch.setattr(
        "lowmem_dpo.weights.loading.quantize_nf4", lambda weight: pytest.fail("quantised again")
    )
    assert generate(llama_dir, "--prompt", "hello", "--seed", "1") == 0
    second = capsys.readouterr().out
    assert "read from its quantised copy" in second
    assert second.partition("prompt:")[2] == first.partition("prompt:")[2]


def test_generate_with_a_large_model_only_says_that_it_is_slow(monkeypatch, llama_dir, capsys):
    monkeypatch.setattr(size, "LARGE_FOR_A_CPU", 1000)
    assert generate(llama_dir, "--prompt", "hello", "--max_new_tokens", "2") == 0
    assert "on a CPU: an answer takes minutes" in capsys.readouterr().out


@pytest.mark.slow
def test_the_plan_of_an_answer_is_said_in_a_line(llama_dir, capsys):
    config = GenerateConfig(model=str(llama_dir), device="cpu")
    source = read_source(config, config)
    plan = plan_answers(config, source, find_card("RTX 3060 12 GB"), 2**33, 50)
    line = capsys.readouterr().out.strip().splitlines()[-1]
    assert line.startswith("plan: ") and " of RTX 3060 12 GB at the peak, in host memory: " in line
    assert "in host memory: nothing; " in line and line.endswith(" tokens a second")
    assert plan.levers == Levers()
    config = replace(config, layer_weights="host", head_weight="host")
    plan_answers(config, source, find_card("RTX 3060 12 GB"), 2**33, 50)
    assert "head, the layers, 2 of 2 at a time on the card;" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"of 256 tokens to a prompt of 50 needs at least .* has"):
        plan_answers(replace(config, memory_limit="1MiB"), source, find_card("3060 Ti"), 2**33, 50)


def test_a_rehearsal_that_fails_is_said_and_the_prompt_is_answered(llama_dir, capsys, monkeypatch):
    source = read_source(GenerateConfig(model=str(llama_dir), device="cpu"))
    loaded = load_policy(GenerateConfig(model=str(llama_dir), device="cpu"), source=source)
    on_card = replace(source, device=torch.device("cuda"))
    monkeypatch.setattr(generate_verb, "read_source", lambda *_, **__: on_card)
    monkeypatch.setattr(generate_verb, "card_of", lambda device: find_card("3060"))
    monkeypatch.setattr(generate_verb, "free_bytes", lambda device: 2**33)
    monkeypatch.setattr(generate_verb, "load_policy", lambda *_, levers, **__: loaded)

    def fail(*_, **__):
        raise TypeError("of another torch")

    monkeypatch.setattr(generate_verb, "choose_generation_levers", fail)
    assert generate(llama_dir, "--prompt", "hello") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "the answer could not be rehearsed (TypeError: of another torch)" in printed
    assert "base:" in printed and "at the peak" not in printed


def test_generate_refuses_places_in_memory_that_have_no_effect(llama_dir, capsys):
    for words in (["--layer_weights", "host"], ["--head_weight", "host"]):
        assert generate(llama_dir, "--prompt", "hello", "--device", "cpu", *words) == 2
        assert f"{words[0][2:]} host has no effect on cpu; leave it out" in one_line_error(capsys)
    assert generate(llama_dir, "--prompt", "a", "--device", "cpu", "--memory_limit", "8GB") == 2
    assert "memory_limit has no effect on cpu" in one_line_error(capsys)

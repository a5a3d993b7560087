"""Pairs of a run, from a file or from the cache: the same, and never stale."""

import json
from dataclasses import replace

import datasets
import pytest
from transformers import AutoTokenizer

from lowmem_dpo.data import rows
from lowmem_dpo.settings.configs import TrainConfig
from lowmem_dpo.tokens import encoding
from lowmem_dpo.tokens.templates import choose_template
from lowmem_dpo.training import pairs
from lowmem_dpo.training.pairs import load_pairs


@pytest.fixture
def load(llama_dir, tmp_path, monkeypatch):
    """Load pairs with settings, and tell how many were tokenised."""
    monkeypatch.setattr(pairs, "CACHED_FROM_PAIRS", 5)
    tokenizer = AutoTokenizer.from_pretrained(llama_dir)
    tokenised = []

    def count(texts, *rest):
        tokenised.append(len(texts))
        return tokenize(texts, *rest)

    tokenize = encoding._tokenize
    monkeypatch.setattr(encoding, "_tokenize", count)

    def load(path, **settings):
        tokenised.clear()
        config = replace(TrainConfig(), data=str(path), **settings)
        template = choose_template(tokenizer, config)
        found = load_pairs(config, config, template, tmp_path / "cache", seed=0)
        return found, sum(tokenised)

    return load


def test_a_second_start_takes_the_pairs_from_the_cache(load, pairs_file, tmp_path, capsys):
    path = pairs_file(12)
    first, num_first = load(path)
    said = capsys.readouterr().out.splitlines()
    second, num_second = load(path)
    assert (num_first, num_second) == (12, 0)
    assert second == first
    said_again = capsys.readouterr().out.splitlines()
    (added,) = [line for line in said_again if "encoded before, taken from" in line]
    said_again.remove(added)
    assert said_again == said
    assert json.loads(json.dumps(second.facts)) == json.loads(json.dumps(first.facts))
    # From elsewhere, and split otherwise: the same rows.
    other = tmp_path / "elsewhere.jsonl"
    other.write_bytes(path.read_bytes())
    assert load(other, eval_fraction=0.25)[1] == 0


@pytest.mark.parametrize(
    "settings", [{"max_length": 25}, {"max_samples": 7}, {"truncate_prompt": True}]
)
def test_another_setting_encodes_again(load, pairs_file, settings):
    path = pairs_file(12)
    load(path)
    assert load(path, **settings)[1]
    assert load(path)[1] == 0


def test_other_columns_an_edited_template_and_other_versions_encode_again(
    load, pairs_file, tmp_path, monkeypatch
):
    path, template = pairs_file(12), tmp_path / "template.jinja"
    text = "{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}"
    template.write_text(text, encoding="utf-8")
    settings = {"chat_template": str(template)}
    first = load(path, **settings)[0]
    assert load(path, **settings) == (first, 0)
    template.write_text(text.replace("<|user|>", "<|user|> "), encoding="utf-8")
    assert load(path, **settings)[0].digest != first.digest
    settings["columns"] = {"chosen": "rejected", "rejected": "chosen"}
    assert load(path, **settings)[1] and load(path, **settings)[1] == 0
    monkeypatch.setattr(pairs, "text_versions", lambda: {"tokenizers": "another"})
    assert load(path, **settings)[1]


def test_an_edited_file_is_encoded_again(load, pairs_file):
    path = pairs_file(12)
    load(path)
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[:-1]), encoding="utf-8")
    found, num_tokenised = load(path)
    assert num_tokenised == len(found.train) == 11


def test_bad_rows_are_named_in_the_file_that_is_read_now(load, pairs_file, tmp_path):
    path = pairs_file(12)
    path.write_bytes(path.read_bytes() + b"{}\n")
    other = tmp_path / "other.jsonl"
    other.write_bytes(path.read_bytes())
    for each in (path, other, path):
        found, num_tokenised = load(each, on_bad_row="skip")
        assert found.facts["faults"][0].startswith(f"{each}, line 13: ")
    assert num_tokenised == 0


def test_a_source_that_is_gone_when_it_was_read_costs_a_line(load, pairs_file, monkeypatch, capsys):
    read = rows.READERS[".jsonl"]

    def moved_meanwhile(path, *rest):
        yield from read(path, *rest)
        path.unlink()

    monkeypatch.setitem(rows.READERS, ".jsonl", moved_meanwhile)
    assert load(pairs_file(12))[1] == 12
    assert "cannot keep the encoded pairs" in capsys.readouterr().out


def test_a_small_file_leaves_nothing_behind(load, pairs_file, tmp_path):
    assert load(pairs_file(4))[1] == load(pairs_file(4))[1] == 4
    assert not (tmp_path / "cache").exists()


def test_eval_data_and_folders_are_cached_too(load, pairs_file, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    pairs_file(8).rename(folder / "train.jsonl")
    settings = {"eval_data": str(pairs_file(6, seed=1, name="eval.jsonl"))}
    first = load(folder, **settings)
    assert first[1] == 14
    assert load(folder, **settings) == (first[0], 0)


def test_a_saved_data_set_is_told_by_its_content_too(load, tmp_path, monkeypatch):
    """Answers that a model draws anew come with the fingerprint of those before."""
    folder = tmp_path / "saved"
    monkeypatch.setattr(pairs, "CACHED_FROM_PAIRS", 2)
    tokenised = []
    for answer in ("yes", "yes", "no"):
        rows = [{"prompt": f"p{i}", "chosen": answer, "rejected": "never"} for i in range(3)]
        datasets.Dataset.from_list(rows).save_to_disk(folder)
        state = json.loads((folder / "state.json").read_text())
        (folder / "state.json").write_text(json.dumps(state | {"_fingerprint": "one"}))
        tokenised.append(load(folder)[1])
    assert tokenised == [3, 0, 3]


def test_a_cache_that_cannot_be_written_costs_a_line(load, pairs_file, tmp_path, capsys):
    (tmp_path / "cache").write_text("in the way")
    assert load(pairs_file(6))[1] == 6
    assert "warning: cannot keep the encoded pairs" in capsys.readouterr().out


def test_a_source_that_changes_while_it_is_read_is_not_kept_as_the_old_one(
    load, pairs_file, monkeypatch, capsys
):
    path = pairs_file(12)
    old = path.read_bytes()
    read = rows.READERS[".jsonl"]

    def edited_meanwhile(path, *rest):
        path.write_bytes(b"".join(old.splitlines(keepends=True)[:8]))
        yield from read(path, *rest)

    with monkeypatch.context() as patch:
        patch.setitem(rows.READERS, ".jsonl", edited_meanwhile)
        assert load(path)[1] == 8
    assert "changed while it was read; its encoded pairs are not kept" in capsys.readouterr().out
    path.write_bytes(old)
    assert load(path)[1] == 12

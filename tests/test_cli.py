import errno
import json
import os
import pkgutil
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from lowmem_dpo.cli import VERBS, _os_error, main
from lowmem_dpo.settings.configs import DemoConfig, TrainConfig
from lowmem_dpo.version import __version__
from tests.errors import one_line_error

ROOT = Path(__file__).parent.parent


@pytest.fixture
def train(llama_dir, pairs_file, tmp_path):
    """Run `train` on the tiny model; the words given override."""

    def run(*words: str) -> int:
        defaults = {"--model": llama_dir, "--data": pairs_file(), "--output_dir": tmp_path / "out"}
        given = [str(x) for pair in defaults.items() if pair[0] not in words for x in pair]
        return main(["train", *given, "--batch_size", "4", "--lora_r", "4", *words])

    return run


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ],
    ids=lambda error: type(error).__name__,
)
def test_memory_that_is_out_anywhere_is_one_line(train, monkeypatch, capsys, error):
    def full(*_):
        raise error

    monkeypatch.setattr("lowmem_dpo.training.fit.prepare", full)
    assert train() == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("lowmem_dpo: stopped: out of memory") and str(error) in line
    assert "run again with --resume auto" in line


def test_other_faults_of_the_program_are_not_taken_for_memory(train, monkeypatch):
    def broken(*_):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr("lowmem_dpo.training.fit.prepare", broken)
    with pytest.raises(RuntimeError, match="shapes differ"):
        train()


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"lowmem_dpo {__version__}\n"


def test_train_leaves_the_documented_folder(train, tmp_path):
    assert train("--eval_fraction", "0.3") == 0
    out = tmp_path / "out"
    names = {path.name for path in out.iterdir()}
    assert names == {
        *("config.yaml", "run.json", "metrics.jsonl"),
        *("checkpoints", "best", "adapter", "plots"),
    }
    for folder in ("best", "adapter"):
        files = {path.name for path in (out / folder).iterdir()}
        assert files >= {"adapter_config.json", "adapter_model.safetensors"}
    assert {p.name for p in (out / "plots").glob("*.png")} >= {"loss.png", "margins.png"}
    record = json.loads((out / "run.json").read_text())
    assert record["finished"] and record["step_zero"]["exact"]
    assert record["step_zero"]["loss"] == pytest.approx(0.6931472, abs=1e-6)
    logged = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    training = [row for row in logged if "loss" in row]
    assert [row["step"] for row in training] == list(range(1, len(training) + 1))
    documented = (
        "loss rewards/chosen rewards/rejected rewards/margins rewards/accuracies logps/chosen"
    )
    documented += " logps/rejected grad_norm learning_rate epoch step num_tokens pairs_per_second"
    assert set(documented.split()) <= set(training[0])
    assert "eval_rewards/accuracies" in logged[-1]


def test_train_from_its_own_config_repeats_the_run(train, tmp_path):
    assert train() == 0
    first = tmp_path / "out"
    assert (
        main(["train", "--config", str(first / "config.yaml"), "--output_dir", str(tmp_path / "b")])
        == 0
    )
    losses = [
        [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (first, tmp_path / "b")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 3


def test_train_prints_choice_of_template_pair_table_and_plan(train, capsys):
    assert train() == 0
    printed = capsys.readouterr().out
    for text in (
        "prompt/chosen/rejected strings",
        "chat template",
        "[[",
        "nf4",
        "micro-batches of",
    ):
        assert text in printed
    assert "only 3 steps" in printed and "step zero: every margin is exactly 0" in printed
    assert re.search(r"step 3/3: loss 0\.\d+, margin [+-]", printed)


def test_print_config_is_read_back(capsys, tmp_path):
    assert main(["train", "--beta", "0.3", "--learning-rate", "1e-5", "--print_config"]) == 0
    path = tmp_path / "run.yaml"
    path.write_text(capsys.readouterr().out)
    assert TrainConfig.from_yaml(path) == TrainConfig(beta=0.3, learning_rate=1e-5)
    assert yaml.safe_load(path.read_text())["batch_size"] == 16


def test_precompute_fills_the_cache_for_train(train, llama_dir, pairs_file, capsys):
    words = ["--model", str(llama_dir), "--data", str(pairs_file())]
    unread = ["--learning_rate", "1", "--logging_steps", "2", "--optim", "sgd", "--lora_r", "4"]
    assert main(["precompute", *words, *unread, "--loss_type", "ipo"]) == 0
    printed = capsys.readouterr().out
    assert "12 to score" in printed and "usual" not in printed
    assert "no effect of learning_rate, optim, lora_r, logging_steps\n" in printed
    assert train() == 0
    assert "12 in the cache, 0 to score" in capsys.readouterr().out


BAD_DATA = {
    "empty.jsonl": (b"", "empty"),
    "broken.jsonl": (b'{"prompt": "a", "chosen"', "line 1"),
    "binary.jsonl": (b"\xff\xfe\x00\x01", "UTF-8"),
    "columns.jsonl": (b'{"question": "a", "answer": "b"}\n', "question"),
    "same.jsonl": (b'{"prompt": "a", "chosen": "b", "rejected": "b"}\n', "identical"),
    "types.jsonl": (b'{"prompt": 1, "chosen": "b", "rejected": "c"}\n', "line 1: prompt must be"),
    "cut.json": (b'[{"prompt": "a", "chosen": "b", "rej', "cut.json, line 1: broken JSON"),
    "cells.csv": (b"prompt,chosen,rejected\n1,2\n", "line 2: has 2 cells"),
    "text.parquet": (b"prompt,chosen,rejected\n", "no Parquet file"),
    "notes.txt": (b"hello", "a .txt file is not supported"),
    "folder": (None, "put .jsonl, .json, .csv or .parquet files into it"),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_train_refuses_bad_data_in_one_line(train, tmp_path, capsys, name):
    content, named = BAD_DATA[name]
    if content is None:
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_bytes(content)
    assert train("--data", str(tmp_path / name)) == 2
    assert named in one_line_error(capsys)
    assert not (tmp_path / "out" / "config.yaml").exists()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--dataset_config", "en"], "dataset_config=en has no effect on the file"),
        (["--dataset_train_split", "x"], "dataset_train_split=x has no effect on the file"),
        (["--columns", "{answer: chosen}"], "columns names answer, which no format reads"),
        (["--model", "no/such/folder"], "no/such/folder"),
        (["--betta", "1"], "did you mean beta?"),
        (["--pack_tokens", "8"], "pack_tokens 8 is less than the longest pair"),
        (["--device", "tpu"], "device must be"),
        (["--layer_inputs", "host"], "has no effect on cpu"),
        (["--layer_weights", "host"], "has no effect on cpu"),
        (["--layer_weights", "disk", "--quantized_copy", "false"], "quantized_copy false out"),
        (["--layer_weights", "disk", "--quantization", "none"], "layer_weights disk is for NF4"),
        (["--embedding_weight", "host"], "has no effect on cpu"),
        (["--optimizer_state", "host"], "has no effect on cpu"),
        (
            ["--optimizer_state", "host", "--optim", "sgd"],
            "optimizer_state host has no effect with optim=sgd",
        ),
        (["--memory_limit", "8GB"], "has no effect on cpu"),
        (["--dtype", "float16"], "float16"),
        (["--lora_target_modules", "query"], "query"),
        (["--init_adapter", "nowhere"], "nowhere"),
        (["--resume", "nowhere"], "nowhere"),
        (["--eval_fraction", "0.001", "--max_length", "4"], "no pair is left"),
        (["--system_prompt", "x", "--chat_template", "none"], "with chat_template=none"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_train_refuses_bad_settings_in_one_line(train, tmp_path, capsys, words, named):
    assert train(*words) == 2
    assert named in one_line_error(capsys)


def test_train_reads_a_folder_with_other_columns_and_leaves_bad_rows_out(train, tmp_path, capsys):
    folder = tmp_path / "set"
    folder.mkdir()
    rows = [{"q": f"ask {i}", "good": "yes", "bad": "no", "id": i} for i in range(6)]
    lines = [json.dumps(row) for row in rows]
    (folder / "train.jsonl").write_text("\n".join([*lines[:3], '{"q":', *lines[3:]]))
    (folder / "test.jsonl").write_text("\n".join(lines[:2]).replace("ask", "say"))
    words = ["--columns", "{prompt: q, chosen: good, rejected: bad}", "--eval_data", str(folder)]
    assert train("--data", str(folder), *words) == 2
    assert "train.jsonl, line 4: broken JSON" in one_line_error(capsys)
    assert train("--data", str(folder), *words, "--on_bad_row", "skip") == 0
    printed = capsys.readouterr().out
    assert "6 pairs, prompt/chosen/rejected strings (columns not used: id)" in printed
    assert "1 of 7 rows are bad and left out, as set" in printed
    assert "train.jsonl, line 4: broken JSON" in printed
    data = json.loads((tmp_path / "out" / "run.json").read_text())["data"]
    assert (data["num_rows"], data["num_skipped"], data["eval"]["num_rows"]) == (7, 1, 2)


def test_train_refuses_an_output_dir_that_holds_a_run(train, tmp_path, capsys):
    assert train() == 0
    before = (tmp_path / "out" / "metrics.jsonl").read_text()
    assert train() == 2
    assert "--resume auto" in one_line_error(capsys)
    assert (tmp_path / "out" / "metrics.jsonl").read_text() == before


def test_train_says_when_the_output_dir_cannot_be_made(train, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert train("--output_dir", str(tmp_path / "file" / "out")) == 2
    assert "output_dir" in one_line_error(capsys)


def test_train_without_model_or_data_says_which(capsys):
    assert main(["train", "--data", "x.jsonl"]) == 2
    assert "--model" in one_line_error(capsys)
    assert main(["train", "--model", "x"]) == 2
    assert "--data" in one_line_error(capsys)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (PermissionError(errno.EACCES, "denied", "a/b"), "cannot read or write a/b: denied"),
        (
            OSError(errno.ENOSPC, "disk full", "a/b"),
            "cannot write a/b: disk full; free some space and run again with --resume auto",
        ),
        (
            OSError(errno.ENOSPC, "disk full"),
            "cannot write: disk full; free some space and run again with --resume auto",
        ),
        (
            OSError(errno.EFBIG, "File too large", "a/b"),
            "cannot write a/b: File too large; raise the limit on the size of files (ulimit -f) "
            "and run again with --resume auto",
        ),
        (OSError("a library's words"), "a library's words"),
    ],
)
def test_os_error_names_the_file_and_the_way_out(error, expected):
    assert _os_error(error, "run again with --resume auto") == expected


def test_train_on_a_full_disk_ends_in_one_line(train, capsys, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")

    monkeypatch.setattr("lowmem_dpo.training.fit.prepare", full)
    assert train() == 2
    line = one_line_error(capsys)
    assert "cannot write metrics.jsonl" in line and "--resume auto" in line


@pytest.mark.slow
def test_narrow_terminals_get_escapes_instead_of_a_traceback(llama_dir, tmp_path):
    def run(*words: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [sys.executable, "-m", "lowmem_dpo", *words],
            env={
                **os.environ,
                "PYTHONIOENCODING": "cp1252",
                "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
            },
            capture_output=True,
        )

    asked = ("--prompt", "日本", "--max_new_tokens", "8", "--temperature", "0")
    answer = run("generate", "--model", str(llama_dir), *asked)
    assert answer.returncode == 0, answer.stderr
    assert rb"prompt: \u65e5\u672c" in answer.stdout
    refused = run("train", "--model", str(llama_dir), "--data", "日本/d.jsonl")
    assert refused.returncode == 2 and b"Traceback" not in refused.stderr
    assert rb"\u65e5\u672c/d.jsonl" in refused.stderr


def test_usage_names_every_verb(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert "LOWMEM_DPO_DEBUG" in text and "{" not in text
    for name, verb in VERBS.items():
        assert f"  {name} " in text and verb.summary in text
    assert max(map(len, text.splitlines())) <= 80


def test_every_verb_names_a_function():
    for verb in VERBS.values():
        assert callable(pkgutil.resolve_name(verb.function))


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["--beta", "x", "--help"]])
def test_help_shows_the_first_settings_whatever_stands_beside(words, capsys):
    assert main(["train", *words]) == 0
    text = capsys.readouterr().out
    assert "--resume" in text and "--lora_r" not in text


@pytest.mark.parametrize("word", ["--help_all", "--help-all"])
def test_help_all_shows_every_setting(word, capsys):
    assert main(["train", word]) == 0
    text = capsys.readouterr().out
    assert "--resume" in text and "--lora_r" in text


def test_unknown_verb(capsys):
    assert main(["trian"]) == 2
    assert "known: train" in one_line_error(capsys)


def test_sigterm_before_there_is_anything_to_save_is_ctrl_c(monkeypatch, capsys):
    before = signal.getsignal(signal.SIGTERM)

    def terminated(config: DemoConfig) -> bool:
        os.kill(os.getpid(), signal.SIGTERM)
        return True

    monkeypatch.setattr("lowmem_dpo.demo.demo.demo", terminated)
    assert main(["demo"]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before

"""That the end of the output is not the end of the program; and what is said on the way out."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lowmem_dpo.cli import main

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
NEEDS_PIPES = pytest.mark.skipif(os.name == "nt", reason="POSIX's pipes and devices")
SAY_TWICE = "from lowmem_dpo.console import say; say('a'); say('b'); print('c', flush=True)"


def run_python(code: str, stdout: int) -> tuple[int, str]:
    """Run a program with its output to a file descriptor; its exit code and stderr."""
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, stdout=stdout, stderr=subprocess.PIPE
    )
    return done.returncode, done.stderr.decode()


@NEEDS_PIPES
def test_a_run_goes_on_where_nobody_reads_its_output():
    read, write = os.pipe()
    os.close(read)
    code, error = run_python(SAY_TWICE, write)
    os.close(write)
    assert code == 0
    assert error == "lowmem_dpo: nobody reads the output any more; going on without it\n"


@NEEDS_PIPES
@pytest.mark.parametrize(
    "words",
    [["train", "--help_all"], ["--version"], ["generate", "--print_config"], ["generate", "--go"]],
    ids=" ".join,
)
def test_what_only_prints_ends_quietly_with_its_reader(words):
    read, write = os.pipe()
    os.close(read)
    program = """
import sys
from lowmem_dpo import cli
from lowmem_dpo.console import say
def fake(config):
    say("prompt: a")
    raise AssertionError("it went on")
cli.pkgutil.resolve_name = lambda name: fake
words = {words}
sys.exit(cli.main([word for word in words if word != "--go"]))
"""
    code, error = run_python(program.replace("{words}", str(words)), write)
    os.close(write)
    assert (code, error) == (141, "")


@NEEDS_PIPES
def test_an_answer_ends_with_its_reader(llama_dir):
    words = ["generate", "--model", str(llama_dir), "--prompt", "hello"]
    command = [sys.executable, "-m", "lowmem_dpo", *words, "--max_new_tokens", "400"]
    with subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as run:
        assert run.stdout is not None and run.stderr is not None
        while b"base:" not in run.stdout.readline():
            pass
        run.stdout.close()
        error = run.stderr.read()
    assert (run.returncode, error) == (141, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_run_goes_on_where_its_output_is_full():
    with open("/dev/full", "w") as full:
        code, error = run_python(SAY_TWICE, full.fileno())
        assert code == 0
        said = "cannot write the output: No space left on device; going on without it"
        assert error == f"lowmem_dpo: {said}\n"
        for words in (["train", "--help"], ["train", "--print_config"], ["--version"]):
            code, error = run_python(
                f"import sys; from lowmem_dpo.cli import main; sys.exit(main({words}))",
                full.fileno(),
            )
            assert code == 2
            assert error == (
                "lowmem_dpo: error: cannot write the output: No space left on device\n"
            )


def test_main_ends_quietly_where_it_is_interrupted_early(monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("lowmem_dpo.cli.parse_config", interrupted)
    assert main(["train"]) == 130
    assert capsys.readouterr().err == "lowmem_dpo: interrupted\n"


@pytest.mark.parametrize(
    ("verb", "function", "again"),
    [
        ("train", "training.fit.fit", "run again with --resume auto"),
        ("precompute", "training.fit.precompute", "run again"),
        ("demo", "demo.demo.demo", "run again"),
    ],
)
def test_only_train_is_told_to_resume(verb, function, again, monkeypatch, capsys):
    def interrupted(config):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(f"lowmem_dpo.{function}", interrupted)
    assert main([verb]) == 130
    assert capsys.readouterr().err == f"lowmem_dpo: interrupted; {again}\n"


@pytest.mark.parametrize("words", [["help", "train"], ["--help", "train"], ["-h", "train"]])
def test_help_of_a_verb_may_come_first(words, capsys):
    assert main(["train", "--help"]) == 0
    expected = capsys.readouterr().out
    assert main(words) == 0
    assert capsys.readouterr().out == expected


def test_print_config_may_be_said_to_be_true(capsys):
    assert main(["demo", "--print_config=true"]) == 0
    assert "output_dir: outputs/demo" in capsys.readouterr().out

"""What the command line says of a machine that is not ready, verb by verb."""

from pathlib import Path

import pytest

from lowmem_dpo.cli import main
from lowmem_dpo.machine.cards import Machine, NvidiaCards

IDLE = Machine("win32", "2.13.0+cpu", nvidia=NvidiaCards(("RTX 3060",), "580.65"))
VERBS = ["train", "precompute", "generate", "demo"]


@pytest.fixture
def idle_card(monkeypatch):
    """A card beside a CPU build of torch, as pip installs it on Windows."""
    for module in ("machine.device", "demo.demo"):
        monkeypatch.setattr(f"lowmem_dpo.{module}.this_machine", lambda: IDLE)


@pytest.fixture
def words(llama_dir, pairs_file, tmp_path):
    """The words of a verb that runs on the tiny model."""

    def of(verb: str) -> list[str]:
        model = ["--model", str(llama_dir)]
        output = ["--output_dir", str(tmp_path / "out")]
        return {
            "train": [verb, *model, "--data", str(pairs_file()), *output],
            "precompute": [verb, *model, "--data", str(pairs_file())],
            "generate": [verb, *model, "--prompt", "hello", "--max_new_tokens", "2"],
            "demo": [verb, *output, "--device", "cuda"],
        }[verb]

    return of


@pytest.mark.parametrize("verb", VERBS)
def test_an_idle_card_is_never_passed_over(idle_card, words, verb, capsys, tmp_path):
    assert main(words(verb)) == 2
    error = capsys.readouterr().err
    assert error.startswith("lowmem_dpo: error: RTX 3060 is here, but torch 2.13.0+cpu")
    assert error.count("\n") == 1 and "--device cpu" in error and "pip install" in error
    assert not (tmp_path / "out" / "config.yaml").exists()


def test_the_cpu_is_taken_beside_an_idle_card_where_it_is_named(idle_card, words, capsys):
    assert main([*words("precompute"), "--device", "cpu"]) == 0
    assert "RTX 3060" not in capsys.readouterr().out


def test_demo_with_an_unusable_device_leaves_the_earlier_demo(idle_card, words, tmp_path):
    earlier: Path = tmp_path / "out" / "preferences.jsonl"
    earlier.parent.mkdir()
    (tmp_path / "out" / ".lowmem_dpo_demo").touch()
    earlier.write_text("{}", encoding="utf-8")
    assert main(words("demo")) == 2
    assert earlier.exists()


def test_demo_on_the_cpu_tells_of_an_idle_card(idle_card, tmp_path, capsys):
    (tmp_path / "file").touch()  # where the demo's folder should be: it ends there
    assert main(["demo", "--output_dir", str(tmp_path / "file")]) == 2
    printed = capsys.readouterr().out
    assert "RTX 3060 is here" in printed and "The demo runs on the CPU" in printed


@pytest.mark.parametrize("verb", ["train", "precompute", "generate"])
def test_room_on_the_disk_is_looked_at_before_a_download(monkeypatch, words, verb, capsys):
    asked = []

    def refuse(model_id, cache_dir, copy_bytes):
        asked.append((model_id, copy_bytes > 0))
        raise ValueError("too little room")

    config = words(verb)
    folder = Path(config[config.index("--model") + 1])
    monkeypatch.setattr(
        "lowmem_dpo.weights.folders.download_config", lambda model_id: folder / "config.json"
    )
    monkeypatch.setattr("lowmem_dpo.training.policy.check_download", refuse)
    config[config.index("--model") + 1] = "some/model"
    assert main(config) == 2
    assert main([*config, "--quantization", "none"]) == 2
    assert asked == [("some/model", True), ("some/model", False)]
    assert "too little room" in capsys.readouterr().err

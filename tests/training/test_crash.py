"""kill -9 at random moments of the reference pass, training and checkpointing.

`make crash` kills 300 times. The moments are drawn from a seed that is printed and that CRASH_SEED
repeats; where CI is set it is always the same.
"""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lowmem_dpo.files import is_held
from lowmem_dpo.records.checkpoints import find_damage, list_checkpoints
from tests.conftest import random_pairs
from tests.training.conftest import environment, read_metrics, read_record, write_rows

EXACT = ("step", "loss", "grad_norm", "learning_rate", "rewards/margins", "logps/chosen")
EXACT += ("num_tokens", "eval_loss", "eval_rewards/margins")

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


class Server:
    """The process that runs and kills; see `crash_server`."""

    def __init__(self, log: Path) -> None:
        words = [sys.executable, "-m", "tests.training.crash_server"]
        self.log = log
        self.process = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
            cwd=Path(__file__).parents[2],
        )

    def run(self, words: list[str], **moment: Any) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        request = {"words": words, "log": str(self.log), **moment}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


@pytest.fixture
def server(tmp_path):
    server = Server(tmp_path / "log.txt")
    yield server
    server.close()


def numbers(output: Path) -> list[dict[str, float]]:
    return [{name: row[name] for name in EXACT if name in row} for row in read_metrics(output)]


def assert_whole(output: Path, cache: Path) -> None:
    """A finished run's folder holds what it should and nothing half done."""
    assert read_record(output)["finished"]
    litter = [p.name for p in output.rglob(".*") if p.suffix in (".part", ".old")]
    assert litter == []
    (checkpoint,) = list_checkpoints(output / "checkpoints")
    assert checkpoint.name == "step-000006" and find_damage(checkpoint) is None
    assert not list(cache.rglob("*.damaged"))


def choose_seed() -> int:
    drawn = 0 if "CI" in os.environ else random.randrange(2**32)
    return int(os.environ.get("CRASH_SEED", drawn))


@pytest.mark.slow
def test_killed_at_any_moment_a_resumed_run_gives_the_uninterrupted_losses(
    server, llama_dir, tmp_path, capsys
):
    crashes = int(os.environ.get("CRASHES", "10"))
    seed = choose_seed()
    with capsys.disabled():
        print(f"\nCRASH_SEED={seed}")
    rng = random.Random(seed)
    data = write_rows(tmp_path / "pairs.jsonl", random_pairs(16))

    def words(name: str, save_steps: int = 1, plan: str = "") -> list[str]:
        text = f"""train --model {llama_dir} --data {data} --output_dir {tmp_path / name}
            --cache_dir {tmp_path / f"cache-{name}"} --resume auto --batch_size 4 --max_steps 6
            --learning_rate 1e-3 --lora_r 4 --pack_tokens 128 --save_strategy steps
            --save_steps {save_steps} --keep_checkpoints 1 --eval_fraction 0.3 --eval_steps 2
            {plan}"""
        return text.split()

    whole = server.run(words("whole"))
    assert whole["status"] == 0, server.log.read_text()
    expected = numbers(tmp_path / "whole")
    assert_whole(tmp_path / "whole", tmp_path / "cache-whole")
    assert len(expected) == 6 + 3

    kills = 0
    while kills < crashes:
        name = f"run-{kills}"
        output, cache = tmp_path / name, tmp_path / f"cache-{name}"
        moments: list[dict[str, Any]] = []
        save_steps = rng.choice([1, 3])  # with 3, the first evaluation is before any checkpoint
        status = -9
        while status == -9:
            moment: dict[str, Any] = {}
            if kills < crashes and (not moments or rng.random() < 0.3):
                if rng.random() < 0.5:
                    moment = {"at_event": rng.randint(1, whole["events"])}
                else:
                    moment = {"after_seconds": rng.uniform(0, whole["seconds"])}
            plans = [f"--keep_activations {keeps}" for keeps in ("nothing", "attention", "all")]
            plan = rng.choice([*plans, "--layer_weights disk"])  # another one each time
            moments.append(moment | {"plan": plan})
            status = server.run(words(name, save_steps, plan), **moment)["status"]
            kills += status == -9
        where = f"CRASH_SEED={seed}, killed at {moments}\n{server.log.read_text()[-2000:]}"
        assert status == 0, where
        assert numbers(output) == expected, where
        assert_whole(output, cache)
        assert not [path for path in (cache / "models").glob(".*.lock") if is_held(path)]
        for file in ("adapter", "best"):
            path = f"{file}/adapter_model.safetensors"
            assert (output / path).read_bytes() == (tmp_path / "whole" / path).read_bytes(), where
        shutil.rmtree(output)
        shutil.rmtree(cache)
    print(f"{kills} kills, CRASH_SEED={seed}, {whole}")

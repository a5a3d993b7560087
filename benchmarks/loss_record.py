"""Losses of every step on fixed seeds, to the last digit: what a change of structure must keep.

    PYTHONPATH=OLD:OLD/kernels python benchmarks/loss_record.py --write before.json
    python benchmarks/loss_record.py --against before.json

OLD is a checkout of the tree before a change. Runs, each through the public interface: every loss
on a tiny Llama with dropout and without, every model family in tiles of tokens, an interrupted and
resumed run, the demo, and three steps of a real model where `--model FOLDER` names one. Of each run
the loss and the gradient norm of every step, and the digest of the adapter it left. One thread,
since sums depend on their number; the digits belong to a processor and to library versions, and are
compared on one machine.
"""

import argparse
import hashlib
import json
import os
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT), str(ROOT / "kernels")]  # at the end: PYTHONPATH may name another checkout

LOSSES: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "cdpo": {"label_smoothing": 0.1},
    "robust": {"loss_type": "robust", "label_smoothing": 0.1},
    "ipo": {"loss_type": "ipo"},
    "hinge": {"loss_type": "hinge"},
    "sigmoid_norm": {"loss_type": "sigmoid_norm", "beta": 2.0},
    "exo_pair": {"loss_type": "exo_pair", "label_smoothing": 0.001},
    "discopop": {"loss_type": "discopop"},
    "apo_zero": {"loss_type": "apo_zero"},
    "apo_down": {"loss_type": "apo_down"},
    "nca_pair": {"loss_type": "nca_pair"},
    "bco_pair": {"loss_type": "bco_pair"},
    "sppo_hard": {"loss_type": "sppo_hard", "beta": 0.01},
    "aot": {"loss_type": "aot"},
    "aot_unpaired": {"loss_type": "aot_unpaired", "lora_dropout": 0.1},
    "simpo": {"loss_type": "simpo", "beta": 2.0},
    "orpo": {"loss_type": "orpo"},
    "sft": {"loss_type": "sft"},
    "mpo": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "rpo, ld_alpha": {"rpo_alpha": 0.5, "ld_alpha": 0.3},
    "forward_kl": {"f_divergence_type": "forward_kl"},
    "alpha_divergence": {"f_divergence_type": "alpha_divergence"},
    "reference_free": {"reference_free": True},
    "dropout": {"lora_dropout": 0.2},
    "not quantised": {"quantization": "none", "use_rslora": True},
    "int8 head": {"head_quantization": "int8"},
    "bfloat16": {"dtype": "bfloat16"},
    "8-bit Adam": {"optim": "adamw_8bit"},
}
TILED = {"pack_tokens": 4480, "lora_dropout": 0.1, "max_steps": 2}  # three tiles, the last padded


def pairs(count: int) -> list[dict[str, str]]:
    """Random pairs that share the beginning of their answers."""
    rng = random.Random(7)

    def text(low: int, high: int) -> str:
        return "".join(rng.choice("abcdefgh ") for _ in range(rng.randint(low, high)))

    rows = []
    for i in range(count):
        opening = text(0, 8)
        chosen, rejected = f"{opening}y{text(1, 20)}", f"{opening}n{text(1, 30)}"
        rows.append({"prompt": f"{i} {text(3, 25)}", "chosen": chosen, "rejected": rejected})
    return rows


def recorded(output: Path) -> dict[str, Any]:
    """Loss and gradient norm of every line of metrics.jsonl, and the adapter's digest."""
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    adapter = (output / "adapter" / "adapter_model.safetensors").read_bytes()
    losses = [row.get("loss", row.get("eval_loss")) for row in rows]
    norms = [row["grad_norm"] for row in rows if "grad_norm" in row]
    return {"losses": losses, "grad_norms": norms, "adapter": hashlib.sha256(adapter).hexdigest()}


def runs(scratch: Path, model: Path | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every run's name and record."""
    from lowmem_dpo import TrainConfig, Trainer
    from lowmem_dpo.cli import main as command_line
    from tests.tiny import FAMILIES, save_tiny_model

    data = scratch / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in pairs(10)), encoding="utf-8")
    common = {"batch_size": 4, "num_train_epochs": 2, "learning_rate": 1e-3, "logging_steps": 1}
    common |= {"data": str(data), "device": "cpu", "eval_fraction": 0.2, "lora_r": 4}

    def train(name: str, folder: Path, **settings: Any) -> dict[str, Any]:
        output = scratch / "runs" / name
        places = {"output_dir": str(output), "cache_dir": str(scratch / "cache" / name)}
        Trainer(TrainConfig(model=str(folder), **{**common, **places, **settings})).fit()
        return recorded(output)

    llama = save_tiny_model(scratch / "models" / "llama")
    for name, settings in LOSSES.items():
        yield name, train(name, llama, **settings)
    for family in FAMILIES:
        folder = save_tiny_model(scratch / "models" / f"{family} tiled", family)
        limit = {"max_length": 256} if "longrope" in family else {}
        yield f"family {family}", train(f"family {family}", folder, **TILED, **limit)
    settings = {"save_strategy": "steps", "save_steps": 2, "lora_dropout": 0.1}
    train("resumed", llama, **settings)
    last = sorted((scratch / "runs" / "resumed" / "checkpoints").iterdir())[0]
    yield "resumed", train("resumed", llama, **settings, resume=str(last))
    words = ["demo", "--output_dir", str(scratch / "demo")]
    assert command_line(words) == 0
    yield "demo", recorded(scratch / "demo" / "run")
    if model is not None:
        three = {"max_steps": 3, "batch_size": 2, "learning_rate": 1e-4, "eval_fraction": 0.0}
        three["dtype"] = "float32"  # auto goes by what this CPU is fast in
        yield "real model, three steps", train("real", model, **three)


def main() -> int:
    """Write the record, or compare with one."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", type=Path, metavar="FILE")
    parser.add_argument("--against", type=Path, metavar="FILE")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="a real model")
    options = parser.parse_args()
    before = json.loads(options.against.read_text("utf-8")) if options.against else {}
    found: dict[str, Any] = {}
    lines = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, record in runs(Path(scratch), options.model):
            found[name] = json.loads(json.dumps(record))
            verdict = ""
            if options.against:
                verdict = "equal" if before.get(name) == found[name] else "DIFFERENT"
            numbers = [loss for loss in record["losses"] if loss is not None]
            lines.append(
                f"{name:28} {len(numbers):3} losses, last {numbers[-1]!r:22} "
                f"adapter {record['adapter'][:12]}  {verdict}"
            )
    print("\n".join(lines))
    if options.write:
        options.write.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    different = [
        name for name in before.keys() | found.keys() if before.get(name) != found.get(name)
    ]
    if options.against:
        print(f"{len(found)} runs, {len(different)} different from {options.against}")
    return int(bool(options.against and different))


if __name__ == "__main__":
    sys.exit(main())

"""A short run on a real model, whole processes: ours beside TRL + PEFT, on the same pairs.

    python benchmarks/real_model.py --model FOLDER --data preferences.jsonl

The first pairs of the file that fit into `--length` tokens, `--steps` steps in one epoch, LoRA of
rank 16 on all linears, fp32 or `--dtype`, one thread. Everything counts, from the start of Python
to the saved adapter: the model's loading, the reference, imports. cpu is user and system seconds of
the process, peak its largest resident memory, ratio the seconds over those of the first row. `trl`
scores the reference in every step (TRL's default), `trl-precompute` once before; both recompute
activations, TRL's default. `ours-nf4` stores the base in 4 bits.

Each shuffles in its own way: the steps hold other pairs, the run the same. No figure is printed
where the first loss is not ln 2.
"""

import argparse
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _common import write_record

OP = "real_model"
OURS = {"ours": "none", "ours-nf4": "nf4"}
IMPLEMENTATIONS = (*OURS, "trl", "trl-precompute")
RANK, LEARNING_RATE = 16, 5e-6
LOSS_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.02}
SETTINGS = ("pairs", "length", "steps", "dtype")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of a model")
    parser.add_argument("--data", required=True, help="preference file")
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--length", type=int, default=448, help="largest, in tokens")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--impl", default=",".join(IMPLEMENTATIONS), help="some of these")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--worker", choices=IMPLEMENTATIONS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.impl = options.impl.split(",")
    if unknown := set(options.impl) - set(IMPLEMENTATIONS):
        parser.error(f"impl must be some of {','.join(IMPLEMENTATIONS)}, got {min(unknown)}")
    if options.pairs % options.steps:
        parser.error(f"steps must divide {options.pairs}, got {options.steps}")
    return options


def pairs_that_fit(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The first pairs of the file that need no cut, as messages."""
    from transformers import AutoTokenizer

    from lowmem_dpo.data.reading import read_preferences
    from lowmem_dpo.settings.groups import EncodingSettings
    from lowmem_dpo.tokens.encoding import encode_pairs

    preferences, _ = read_preferences(options.data)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    pairs, _ = encode_pairs(preferences, tokenizer, EncodingSettings(max_length=2**15))
    lengths = {p.row: max(len(p.chosen_ids), len(p.rejected_ids)) for p in pairs}
    rows = []
    for preference in preferences:
        if lengths.get(preference.row, options.length + 1) <= options.length:
            rows.append(
                {
                    "prompt": as_messages(preference.prompt, "user"),
                    "chosen": as_messages(preference.chosen, "assistant"),
                    "rejected": as_messages(preference.rejected, "assistant"),
                }
            )
    if len(rows) < options.pairs:
        sys.exit(f"{options.data}: {len(rows)} pairs of at most {options.length} tokens")
    return rows[: options.pairs]


def as_messages(content: Any, role: str) -> list[dict[str, Any]]:
    """Text as one turn; messages as they are."""
    return [{"role": role, "content": content}] if isinstance(content, str) else list(content)


def measure(impl: str, options: argparse.Namespace, pairs: Path) -> dict[str, Any]:
    """Run one implementation in a process of its own."""
    batch_size = options.pairs // options.steps
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        if impl in OURS:
            command = ["-m", "lowmem_dpo", "train", "--model", options.model, "--data", str(pairs)]
            command += ["--output_dir", str(scratch / "out"), "--cache_dir", str(scratch / "cache")]
            command += ["--quantization", OURS[impl], "--dtype", options.dtype, "--device", "cpu"]
            command += ["--max_length", str(options.length), "--batch_size", str(batch_size)]
            command += ["--learning_rate", str(LEARNING_RATE), "--lora_r", str(RANK)]
            command += ["--lora_alpha", str(RANK), "--logging_steps", "1", "--save_strategy", "no"]
        else:
            command = [__file__, "--worker", impl, "--model", options.model, "--data", str(pairs)]
            command += ["--pairs", str(options.pairs), "--steps", str(options.steps)]
            command += ["--length", str(options.length), "--output", str(scratch / "first.json")]
            command += ["--dtype", options.dtype]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        log = scratch / "log"
        begun = time.perf_counter()
        with log.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, *command], stdout=file, stderr=file, env=environment
            )
            _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - begun
        if status:
            return {"impl": impl, "error": log.read_text().strip()[-2000:]}
        if impl in OURS:
            first = json.loads((scratch / "out" / "metrics.jsonl").read_text().splitlines()[0])
        else:
            first = json.loads((scratch / "first.json").read_text())
    return {
        "impl": impl,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "seconds": seconds,
        "peak_mib": used.ru_maxrss / 1024,
        "loss_0": first["loss"],
    }


def train_with_trl(options: argparse.Namespace) -> None:
    """The same run by TRL; writes the first step's metrics."""
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    with tempfile.TemporaryDirectory() as scratch:
        trainer = DPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(
                options.model, dtype=getattr(torch, options.dtype)
            ),
            args=DPOConfig(
                output_dir=scratch,
                per_device_train_batch_size=options.pairs // options.steps,
                num_train_epochs=1,
                max_length=options.length,
                learning_rate=LEARNING_RATE,
                precompute_ref_log_probs=options.worker == "trl-precompute",
                bf16=options.dtype == "bfloat16",
                use_cpu=True,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=load_dataset(
                "json", data_files=options.data, split="train", cache_dir=scratch
            ),
            processing_class=AutoTokenizer.from_pretrained(options.model),
            peft_config=LoraConfig(
                r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM"
            ),
        )
        trainer.train()
        trainer.save_model(scratch)
        options.output.write_text(json.dumps(trainer.state.log_history[0]))


def judge(results: list[dict[str, Any]], tolerance: float) -> None:
    """Put an `error` beside what did not compute the same."""
    for result in results:
        if "error" not in result and abs(result["loss_0"] - math.log(2)) > tolerance:
            result["error"] = f"the first loss is {result['loss_0']:.4f}, not ln 2"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, record; 1 if a run failed."""
    options = parse(arguments)
    if options.worker:
        train_with_trl(options)
        return 0
    if not importlib.util.find_spec("trl"):
        options.impl = [impl for impl in options.impl if impl in OURS]
        print("trl is not installed: ours alone")
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        pairs = Path(scratch) / "pairs.jsonl"
        pairs.write_text("".join(json.dumps(row) + "\n" for row in pairs_that_fit(options)))
        print(f"{'impl':<15} {'cpu s':>7} {'ratio':>6} {'peak MiB':>9} {'loss_0':>8}")
        for impl in options.impl:
            result = measure(impl, options, pairs)
            results.append(result)
            judge(results, LOSS_TOLERANCE[options.dtype])
            if "error" in result:
                print(f"{impl:<15} {result['error']}")
                continue
            ratio = result["cpu_seconds"] / results[0].get("cpu_seconds", float("nan"))
            print(
                f"{impl:<15} {result['cpu_seconds']:>7.1f} {ratio:>6.2f} "
                f"{result['peak_mib']:>9.0f} {result['loss_0']:>8.4f}"
            )
    if options.output:
        settings = {name: str(getattr(options, name)) for name in SETTINGS}
        write_record(options.output, OP, torch.device("cpu"), settings, results)
    return int(any("error" in result for result in results))


if __name__ == "__main__":
    sys.exit(main())

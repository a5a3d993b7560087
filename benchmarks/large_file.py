"""From the command to the model: what a file of the usual size costs at the start, ours beside TRL.

    python benchmarks/large_file.py --model FOLDER --data preferences.jsonl --pairs 60000

Makes a file of that many pairs from the sentences of `--data`, drawn at random: conversations of
one to three turns (5 to 6 kB a row, as UltraFeedback has them), or with `--kind short` a line each.
Then whole processes, each twice: `ours` reads, tokenises and folds the pairs, as `train` does
before it loads a model; `trl` makes a DPOTrainer around a model of one small layer, which
tokenises. The second start finds the caches of the first. cpu is user and system seconds of the
process, peak its largest resident memory, ratio the wall-clock seconds over our first start's.
"""

import argparse
import importlib.util
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from _common import ROOT, write_record

OP = "large_file"
IMPLEMENTATIONS = ("ours", "trl")
KINDS = ("conversations", "short")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of a model, for its tokenizer")
    parser.add_argument("--data", required=True, help="preference file, for its sentences")
    parser.add_argument("--pairs", type=int, default=60_000)
    parser.add_argument("--kind", choices=KINDS, default=KINDS[0])
    parser.add_argument("--length", type=int, default=1024, help="max_length, in tokens")
    parser.add_argument("--impl", default=",".join(IMPLEMENTATIONS), help="some of these")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--worker", choices=IMPLEMENTATIONS, help=argparse.SUPPRESS)
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.impl = options.impl.split(",")
    if unknown := set(options.impl) - set(IMPLEMENTATIONS):
        parser.error(f"impl must be some of {','.join(IMPLEMENTATIONS)}, got {min(unknown)}")
    return options


def sentences(path: str) -> list[str]:
    """The sentences of a preference file, from its prompts and answers."""
    from lowmem_dpo.data.reading import read_preferences

    texts = []
    for preference in read_preferences(path)[0]:
        for content in (preference.prompt, preference.chosen, preference.rejected):
            texts += [content] if isinstance(content, str) else [m["content"] for m in content]
    parts = {part for text in texts for part in re.split(r"(?<=[.!?\n]) +", text)}
    return sorted(part for part in parts if 10 < len(part) < 600)


def rows(options: argparse.Namespace, known: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the rows of the file."""
    draw = random.Random(0)

    def say(num_characters: int) -> str:
        text = ""
        while len(text) < num_characters:
            text += draw.choice(known) + " "
        return text.strip()

    def turn(role: str, num_characters: int) -> dict[str, str]:
        return {"role": role, "content": say(num_characters)}

    for _ in range(options.pairs):
        if options.kind == "short":
            yield {"prompt": say(20), "chosen": say(20), "rejected": say(20)}
            continue
        shared = [turn("user", draw.randint(50, 500))]
        for _ in range(draw.choice([0, 0, 1, 1, 2])):
            shared += [
                turn("assistant", draw.randint(200, 1200)),
                turn("user", draw.randint(50, 500)),
            ]
        length = draw.randint(200, 2400)
        answers = [turn("assistant", int(length * draw.uniform(0.6, 1.2))) for _ in range(2)]
        yield {"chosen": [*shared, answers[0]], "rejected": [*shared, answers[1]]}


def measure(impl: str, options: argparse.Namespace, file: Path, cache: Path) -> dict[str, Any]:
    """One start of one implementation, in a process of its own."""
    command = [sys.executable, __file__, "--worker", impl, "--model", options.model]
    command += ["--data", str(file), "--cache", str(cache), "--length", str(options.length)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(cache / "hub")}
    log = cache / f"{impl}.log"
    begun = time.perf_counter()
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, cwd=ROOT)
        _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begun
    if status:
        return {"impl": impl, "error": log.read_text().strip()[-2000:]}
    return {
        "impl": impl,
        "seconds": seconds,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "peak_mib": used.ru_maxrss / 1024,
    }


def start_ours(options: argparse.Namespace) -> None:
    """All that `train` does before it loads a model."""
    from lowmem_dpo.settings.configs import TrainConfig
    from lowmem_dpo.tokens.templates import choose_template
    from lowmem_dpo.training.pairs import check_token_ids, load_pairs
    from lowmem_dpo.training.policy import read_source

    config = TrainConfig(
        model=options.model,
        data=options.data,
        max_length=options.length,
        device="cpu",
        cache_dir=str(options.cache / "ours"),
    )
    source = read_source(config, config, max_length=config.max_length)
    template = choose_template(source.tokenizer, config)
    pairs = load_pairs(config, config, template, source.cache_dir, seed=config.seed)
    check_token_ids(pairs, source.config)


def start_trl(options: argparse.Namespace) -> None:
    """A trainer of TRL with the data tokenised."""
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    config = AutoConfig.from_pretrained(
        options.model,
        num_hidden_layers=1,
        hidden_size=64,
        intermediate_size=64,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    DPOTrainer(
        model=AutoModelForCausalLM.from_config(config),
        args=DPOConfig(
            output_dir=str(options.cache / "trl"),
            max_length=options.length,
            bf16=False,
            use_cpu=True,
            report_to="none",
        ),
        train_dataset=load_dataset("json", data_files=options.data, split="train"),
        processing_class=AutoTokenizer.from_pretrained(options.model),
        peft_config=LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, record; 1 if a start failed."""
    options = parse(arguments)
    if options.worker:
        {"ours": start_ours, "trl": start_trl}[options.worker](options)
        return 0
    if not importlib.util.find_spec("trl"):
        options.impl = [impl for impl in options.impl if impl != "trl"]
        print("trl is not installed: ours alone")
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "pairs.jsonl"
        known = sentences(options.data)
        with file.open("w", encoding="utf-8") as output:
            output.writelines(json.dumps(row) + "\n" for row in rows(options, known))
        megabytes = file.stat().st_size / 1e6
        print(f"{options.pairs} pairs, {options.kind}, {megabytes:.0f} MB")
        print(f"{'impl':<6} {'start':<7} {'s':>7} {'ratio':>6} {'cpu s':>7} {'peak MiB':>9}")
        for impl in options.impl:
            for start in ("first", "second"):
                result = measure(impl, options, file, Path(scratch)) | {"start": start}
                results.append(result)
                if "error" in result:
                    print(f"{impl:<6} {start:<7} {result['error']}")
                    continue
                ratio = result["seconds"] / results[0].get("seconds", float("nan"))
                print(
                    f"{impl:<6} {start:<7} {result['seconds']:>7.1f} {ratio:>6.2f} "
                    f"{result['cpu_seconds']:>7.1f} {result['peak_mib']:>9.0f}",
                    flush=True,
                )
    if options.output:
        settings = {name: str(getattr(options, name)) for name in ("pairs", "kind", "length")}
        settings["megabytes"] = f"{megabytes:.0f}"
        write_record(options.output, OP, torch.device("cpu"), settings, results)
    return int(any("error" in result for result in results))


if __name__ == "__main__":
    sys.exit(main())

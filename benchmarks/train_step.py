"""A whole DPO training step, ours beside TRL + PEFT + bitsandbytes, on the same random weights.

    python benchmarks/train_step.py --shape tiny --device cpu            # does it run?
    python benchmarks/train_step.py --shape head-dominated --device cpu  # a CPU
    python benchmarks/train_step.py --shape llama-3.1-8b --pairs 2x1024  # a card

`--pairs 2x1024` is a step of 2 pairs whose two sequences have 1024 tokens each. Every
implementation runs in a process of its own, trains LoRA of rank 16 on all linears with the same
start, the same pairs and its own defaults for the rest, and every step takes the same pairs.

Implementations: ours; trl (the reference in every step, TRL's default); trl-precompute (its
`precompute_ref_log_probs`). ms is the median step after the warm-up. ref_ms is what scoring the
reference of one step's pairs costs outside of the steps, once per pair and run. ratio is ms over
ours, ratio_1 the same in a run of one epoch: ms + ref_ms over ours. tokens/s counts both sequences
of a pair, prompts twice, as TRL does.

No speed is printed where the first loss is not ln 2, or where log-probs or gradient norm of the
first step differ from ours. On a CPU, TRL's head scores the prompts too (on a card it does not).
"""

import argparse
import contextlib
import importlib.util
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from _common import commit, default_output, device_name, write_record
from _random_models import SHAPES, shape_config

from lowmem_dpo.machine.device import DTYPES, resolve_device, resolve_dtype
from lowmem_dpo.memory.limits import limit_memory
from lowmem_dpo.model.scoring import LOGP_TOLERANCE
from lowmem_dpo.settings.groups import parse_bytes
from lowmem_dpo.tokens.trees import TokenPair

OP = "train_step"
IMPLEMENTATIONS = ("ours", "trl", "trl-precompute")
NUM_WARMUP_STEPS = 3
FIXED = {"rank": 16, "learning_rate": 5e-6, "seed": 42}
FIRST_METRICS = {
    "loss_0": "loss",
    "margin_0": "rewards/margins",
    "logps_chosen_0": "logps/chosen",
    "logps_rejected_0": "logps/rejected",
    "grad_norm_0": "grad_norm",
}
LOSS_TOLERANCE = 0.02
GRAD_TOLERANCE = 1e-3
HALF_GRAD_TOLERANCE = 0.03
HEADER = ("op", "impl", "shape", "dtype", "ms", "peak_mib", "device", "commit")
MORE = ("tokens/s", "pairs/s", "ratio", "ref_ms", "ratio_1", "margin_0")
COLUMNS = (
    "{:<10} {:<14} {:<22} {:<8} {:>9} {:>8}  {:<21} {:<11} {:>8} {:>7} {:>6} {:>8} {:>7} {:>9}"
)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--pairs", default="2x64", metavar="PxL", help="pairs x tokens")
    parser.add_argument("--prompt_share", type=float, default=0.5, help="of a sequence")
    parser.add_argument("--steps", type=int, default=10, help="that are timed")
    parser.add_argument("--impl", default="ours,trl", help=f"some of {','.join(IMPLEMENTATIONS)}")
    parser.add_argument("--trl_micro_batch", type=int, help="pairs of a forward pass; default: all")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--dtype", default="auto", choices=["auto", *DTYPES])
    parser.add_argument("--quantization", choices=["nf4", "none"], help="default: nf4 on a card")
    parser.add_argument("--keep_activations", default="nothing", help="of ours, as in train")
    parser.add_argument("--num_slots", type=int, help="of ours: stream NF4 layers through so many")
    parser.add_argument("--memory_limit", metavar="8GB", help="emulates a smaller card")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--save", action="store_true", help="write under benchmarks/results")
    parser.add_argument("--worker", choices=IMPLEMENTATIONS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    try:
        options.num_pairs, options.length = map(int, options.pairs.split("x"))
        assert options.num_pairs >= 1 and options.length >= 4
    except (ValueError, AssertionError):
        parser.error(f"pairs must be PxL with L >= 4, such as 2x1024, got {options.pairs}")
    options.num_prompt_tokens = round(options.length * options.prompt_share)
    if not 1 <= options.num_prompt_tokens < options.length - 1:
        parser.error(f"prompt_share must leave two tokens beside a prompt: {options.prompt_share}")
    if options.steps < 1:
        parser.error(f"steps must be at least 1, got {options.steps}")
    if options.trl_micro_batch is None:
        options.trl_micro_batch = options.num_pairs
    micro_batch = options.trl_micro_batch
    if micro_batch < 1 or options.num_pairs % micro_batch:
        parser.error(f"trl_micro_batch must divide {options.num_pairs}, got {micro_batch}")
    impls = options.impl.split(",")
    if not set(impls) <= set(IMPLEMENTATIONS):
        parser.error(f"impl must be some of {','.join(IMPLEMENTATIONS)}, got {options.impl}")
    options.impl = impls
    try:
        options.device, _ = resolve_device(options.device)
        _, (_, hidden, inner, *_) = SHAPES[options.shape]
        options.dtype = resolve_dtype(options.dtype, options.device, (hidden, inner))
        if options.memory_limit:
            limit_memory(parse_bytes(options.memory_limit), options.device)
    except ValueError as error:
        parser.error(str(error))
    on_cuda = options.device.type == "cuda"
    options.quantization = options.quantization or ("nf4" if on_cuda else "none")
    options.num_steps = NUM_WARMUP_STEPS + options.steps
    vars(options).update(FIXED)
    return options


def work(options: argparse.Namespace) -> dict[str, Any]:
    """Measure one implementation in this process."""
    if options.worker == "ours":
        from _train_step_ours import run
    else:
        from _train_step_trl import run
    try:
        with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(sys.stderr):
            measured = run(options, random_pairs(options), Path(scratch))
    except torch.OutOfMemoryError:
        return {"impl": options.worker, "error": "out of memory"}
    steps_ms = measured.pop("steps_ms")[NUM_WARMUP_STEPS:]
    metrics = measured.pop("metrics_0")
    first = {short: float(metrics[name]) for short, name in FIRST_METRICS.items()}
    ms = statistics.median(steps_ms)
    return {"impl": options.worker, "ms": ms, "steps_ms": steps_ms} | measured | first


def random_pairs(options: argparse.Namespace) -> list[TokenPair]:
    """Pairs of random tokens, each two sequences of equal length with a common prompt."""
    rng = random.Random(options.seed)
    vocabulary = shape_config(options.shape).vocab_size
    start, num_rest = options.num_prompt_tokens, options.length - options.num_prompt_tokens

    def ids(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(vocabulary) for _ in range(count))

    prompts = [ids(start) for _ in range(options.num_pairs)]
    return [
        TokenPair(row, prompt + ids(num_rest), prompt + ids(num_rest), start, start)
        for row, prompt in enumerate(prompts)
    ]


def measure(impl: str, arguments: list[str]) -> dict[str, Any]:
    """Measure one implementation in a process of its own."""
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [sys.executable, __file__, *arguments, "--worker", impl]
    run = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env=environment)
    if run.returncode:
        return {"impl": impl, "error": run.stderr.strip().rpartition("\n")[2], "log": run.stderr}
    return json.loads(run.stdout.splitlines()[-1])


def judge(results: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Put an `error` in place of the speed of every result that is wrong.

    Where two disagree, neither is known to be right.
    """
    measured = [result for result in results if "error" not in result]
    for result in measured:
        if not abs(result["loss_0"] - math.log(2)) <= LOSS_TOLERANCE:
            refuse(result, f"the first loss is {result['loss_0']:.4f}, not ln 2")
    ours = next((result for result in measured if result["impl"] == "ours"), None)
    for peer in measured:
        if ours is None or peer is ours:
            continue
        problem = disagreement(ours, peer, options)
        if problem:
            refuse(ours, f"{peer['impl']}: {problem}")
            refuse(peer, problem)


def disagreement(
    ours: dict[str, Any], peer: dict[str, Any], options: argparse.Namespace
) -> str | None:
    """What of the first step differs by more than rounding, or None."""
    num_tokens = options.length - options.num_prompt_tokens
    # The mean of many tokens' log-probs is a good deal more exact than one of them.
    allowed = LOGP_TOLERANCE[options.dtype] / 4
    for name in ("logps_chosen_0", "logps_rejected_0"):
        difference = abs(ours[name] - peer[name]) / num_tokens
        if not difference <= allowed:
            return f"{name} differs from ours by {difference:.1e} nat per token"
    relative = abs(peer["grad_norm_0"] / ours["grad_norm_0"] - 1)
    # Over NF4, TRL keeps the adapter and its gradient in bfloat16.
    exact = options.dtype == torch.float32 and options.quantization == "none"
    if not relative <= (GRAD_TOLERANCE if exact else HALF_GRAD_TOLERANCE):
        return f"the first gradient norm differs from ours by {100 * relative:.1f}%"
    return None


def refuse(result: dict[str, Any], reason: str) -> None:
    """Take the speed out of a result."""
    for name in ("ms", "steps_ms", "ref_ms", "peak_mib"):
        result.pop(name, None)
    result["error"] = f"refused: {reason}"


def finish(results: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Add to every result what the table says beside its measurements."""
    ours = next((r for r in results if r["impl"] == "ours" and "error" not in r), None)
    num_tokens = 2 * options.num_pairs * options.length
    for result in results:
        result |= {
            "op": OP,
            "shape": f"{options.shape} {options.pairs}",
            "dtype": str(options.dtype).removeprefix("torch."),
            "device": device_name(options.device),
            "commit": commit(),
        }
        if "error" in result:
            continue
        result["tokens/s"] = 1000 * num_tokens / result["ms"]
        result["pairs/s"] = 1000 * options.num_pairs / result["ms"]
        if ours:
            epoch_ms = ours["ms"] + ours["ref_ms"]
            result["ratio"] = result["ms"] / ours["ms"]
            result["ratio_1"] = (result["ms"] + result["ref_ms"]) / epoch_ms


def print_table(results: list[dict[str, Any]]) -> None:
    """One line a result; a wrong or failed one says why."""
    digits = {"ms": 1, "peak_mib": 0, "tokens/s": 0, "pairs/s": 2, "ratio": 2, "ref_ms": 1}
    digits |= {"ratio_1": 2, "margin_0": 6}
    print(COLUMNS.format(*HEADER, *MORE))
    for result in results:
        values = [result.get(name) for name in (*HEADER, *MORE)]
        texts = [
            "-" if value is None else f"{value:.{digits[name]}f}" if name in digits else value
            for name, value in zip((*HEADER, *MORE), values, strict=True)
        ]
        print(COLUMNS.format(*texts))
        if "error" in result:
            print(f"  {result['error']}")


def main(arguments: list[str] | None = None) -> int:
    """Measure every implementation and print the table; 1 if one failed or was refused."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    if options.worker:
        print(json.dumps(work(options)))
        return 0
    if any(impl.startswith("trl") for impl in options.impl) and not (
        importlib.util.find_spec("trl") and importlib.util.find_spec("peft")
    ):
        print("trl and peft are not installed; use --impl ours, or pip install trl==1.16.0 peft")
        return 2
    if options.memory_limit:
        print(f"memory limit {options.memory_limit}: the memory of a smaller card, not its speed")
    results = [measure(impl, arguments) for impl in options.impl]
    judge(results, options)
    finish(results, options)
    print_table(results)
    for result in results:
        if log := result.pop("log", None):
            print(f"\n{result['impl']} failed:\n{log}", file=sys.stderr)
    output = options.output or (default_output(OP, options.device) if options.save else None)
    if output:
        given = {name: value for name, value in vars(options).items() if name != "output"}
        settings = {name: str(value) for name, value in given.items() if value is not None}
        write_record(output, OP, options.device, settings, results)
    return int(any("error" in result for result in results))


if __name__ == "__main__":
    sys.exit(main())

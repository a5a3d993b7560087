"""All that is to be measured on a CUDA card, in one command, in order of worth.

    python benchmarks/on_a_card.py                # a card, 25 minutes
    python benchmarks/on_a_card.py --toy          # a CPU, toy shapes: does it run?

Every step is a process of its own with a time limit: its share of what is left of the minutes. So
a step that fails, hangs or fills the card costs its own numbers only, and what one leaves over the
later ones share. After every step OUTPUT.json (with each step's own record) and OUTPUT.txt, a page
to read, are written anew; logs stay in OUTPUT-logs/. Exit code 1 if a step failed.

No card has been at hand yet, so nothing was measured on one. The steps:

{steps}

Unknown before the first card: `mm` and `addmm` with `out_dtype` and `out=`; whether products of one
shape keep a row's bits wherever it stands (step zero rests on it); SDPA's choice of kernel for both
segments of a tree; whether any kernel fails its trial (a warning at load). Wanted: NF4 at 0.8 of
the copy and 1.2 times bitsandbytes; trees at 0.8 of FlashAttention's FLOP rate on 8.x, 0.55 on 9.0
(then the table of tiles can be chosen by speed).

By hand afterwards:
  `lowmem_dpo train` with --head_weight host, --layer_inputs host, --layer_weights host,
  --embedding_weight host, --head_quantization int8, --optim paged_adamw_8bit, and each --kernels
  switch, beside the same run without: peak, tokens/s; and what `plan` says beside the peak
  first and second start of an 8B model: seconds, peak host memory; the bytes of a copy quantised on
  a card and on a CPU
  every table with --memory_limit 8GB (an emulated small card; say so)
Known and unmeasured: each micro-batch makes about seven small blocking uploads; pinned layer inputs
are rounded up to powers of two and share the compute stream.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from _common import ROOT, commit, default_output, device_name, versions, write_record

PAGE_LINES = 40  # of a step's output, its last
PYTEST = ("-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider", "-m", "gpu")
PEERS = "pip install trl==1.16.0 peft"


@dataclass(frozen=True)
class Step:
    """Something to measure.

    Attributes:
        name: Of its log and record.
        what: It tells, in a line.
        minutes: Of 25 that it gets.
        command: Words after python.
        toy: The same on a CPU in seconds.
        records: Whether it takes `--output`.
        needs: Modules; without them it is skipped.
        mend: How to get them.
        environment: Variables of its process.
    """

    name: str
    what: str
    minutes: float
    command: Sequence[str]
    toy: Sequence[str]
    records: bool = True
    needs: Sequence[str] = ()
    mend: str = ""
    environment: dict[str, str] = field(default_factory=dict)


def _benchmark(name: str, *words: str) -> list[str]:
    return [str(ROOT / "benchmarks" / f"{name}.py"), *words]


def _step_of_8b(*words: str) -> list[str]:
    return _benchmark(
        "train_step", "--shape", "llama-3.1-8b", "--pairs", "2x1024", "--steps", "5", *words
    )


def _toy_step(*words: str) -> list[str]:
    return _benchmark(
        "train_step", "--shape", "tiny", "--device", "cpu", "--pairs", "1x8", "--steps", "1", *words
    )


QUICK = ("--quick", "--device", "cpu")
# Larger workspaces than a run's: with these cuBLAS may split the sum over K.
FREE = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "CUBLASLT_WORKSPACE_SIZE": "8192"}
TESTS = {"records": False, "needs": ("pytest", "hypothesis"), "mend": "make test's environment"}
STEPS = (
    Step(
        "kernel-tests",
        "the kernels alone, on this card, against float64",
        2,
        [*PYTEST, "tests/kernels"],
        [*PYTEST, "tests/kernels/test_nf4.py"],
        **TESTS,
    ),
    Step(
        "row-invariance",
        "rows of products that change with their place, under a run's settings",
        1,
        _benchmark("row_invariance"),
        _benchmark("row_invariance", "--device", "cpu"),
    ),
    Step(
        "run-tests",
        "whole runs in bf16, fp16, fp32 with an exact step zero; resume; the host's memory",
        4,
        [*PYTEST, "tests/test_gpu.py", "tests/model", "tests/training"],
        [*PYTEST, "tests/test_gpu.py"],
        **TESTS,
    ),
    Step(
        "train-step",
        "an 8B-shaped step of ours: first loss ln 2, peak memory, tokens/s",
        4,
        _step_of_8b("--impl", "ours"),
        _toy_step("--impl", "ours"),
    ),
    Step(
        "train-step-trl",
        "TRL 1.16 + PEFT + bitsandbytes beside it, on the same weights, in the same run",
        4,
        _step_of_8b("--impl", "ours,trl"),
        _toy_step("--impl", "ours,trl"),
        needs=("trl", "peft"),
        mend=PEERS,
    ),
    Step(
        "train-step-kept",
        "the same with all activations kept: what it saves beside train-step, and what it takes",
        2,
        _step_of_8b("--impl", "ours", "--keep_activations", "all"),
        _toy_step("--impl", "ours", "--keep_activations", "all"),
    ),
    Step(
        "train-step-streamed",
        "the same with layers streamed through two slots: what is stalled beside train-step",
        2,
        _step_of_8b("--impl", "ours", "--num_slots", "2"),
        _toy_step("--impl", "ours", "--quantization", "nf4", "--num_slots", "2"),
    ),
    Step(
        "plan-accuracy",
        "peaks and seconds of steps as rehearsed and as measured, by length and plan",
        2,
        _benchmark(
            "plan_accuracy",
            *("--device", "cuda", "--models", "llama-3.1-8b,qwen3,gemma2,phi3"),
            *("--lengths", "1024", "--plans", "nothing,mixed,streamed", "--dtypes", "auto"),
        ),
        _benchmark(
            "plan_accuracy",
            *("--models", "llama", "--lengths", "64", "--plans", "mixed", "--dtypes", "float32"),
        ),
    ),
    Step(
        "head",
        "the head beside TRL, Liger, Cut Cross-Entropy and torch's linear_cross_entropy",
        2,
        _benchmark("benchmark_token_logps", "--dtypes", "bfloat16"),
        _benchmark("benchmark_token_logps", *QUICK),
    ),
    Step(
        "attention",
        "trees beside FlashAttention on plain sequences",
        1,
        _benchmark("benchmark_tree_attention"),
        _benchmark("benchmark_tree_attention", *QUICK),
    ),
    Step(
        "nf4",
        "NF4 made dense, beside bitsandbytes and a copy",
        1,
        _benchmark("benchmark_nf4"),
        _benchmark("benchmark_nf4", *QUICK),
    ),
    Step(
        "row-invariance-free",
        "the same rows where cuBLAS may split sums: what a run's settings cost and give",
        1,
        _benchmark("row_invariance"),
        _benchmark("row_invariance", "--device", "cpu", "--shapes", "128x64x16"),
        environment=FREE,
    ),
    Step(
        "layer",
        "time of a layer by what it keeps",
        1,
        _benchmark("layer_memory", "--device", "cuda", "--scale", "1", "--rounds", "9"),
        _benchmark("layer_memory", "--scale", "32", "--rounds", "1", "--time_tokens", "64"),
        records=False,
    ),
)


@dataclass
class Outcome:
    """What became of a step; `record` is what it wrote itself, `output` its last lines."""

    name: str
    what: str
    command: str
    status: str
    seconds: float = 0.0
    record: dict[str, Any] | None = None
    output: list[str] = field(default_factory=list)


def run_step(step: Step, words: Sequence[str], limit_seconds: float, logs: Path) -> Outcome:
    """Run it in a process of its own, to its end or its limit."""
    outcome = Outcome(step.name, step.what, " ".join(["python", *words]), "done")
    missing = [name for name in step.needs if not importlib.util.find_spec(name)]
    if missing:
        outcome.status = f"skipped: {', '.join(missing)} not installed ({step.mend})"
        return outcome
    log, begun = logs / f"{step.name}.log", time.monotonic()
    with tempfile.TemporaryDirectory() as scratch, log.open("w+", encoding="utf-8") as stream:
        record = Path(scratch) / "record.json"
        output = ["--output", str(record)] if step.records else []
        process = subprocess.Popen(
            [sys.executable, *words, *output],
            cwd=ROOT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"} | step.environment,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(limit_seconds)
            outcome.status = "done" if code == 0 else f"failed: exit code {code}"
        except subprocess.TimeoutExpired:
            outcome.status = f"out of time: {limit_seconds:.0f} s"
        finally:  # what it started itself would hold the card
            _end(process)
        if record.is_file():
            with contextlib.suppress(ValueError):  # killed while it wrote
                outcome.record = json.loads(record.read_text(encoding="utf-8"))
    outcome.seconds = time.monotonic() - begun
    text = log.read_text(encoding="utf-8", errors="replace")
    outcome.output = text.rstrip().splitlines()[-PAGE_LINES:]
    return outcome


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()


def page(outcomes: list[Outcome], device: torch.device, settings: dict[str, Any]) -> str:
    """What a person reads."""
    found = ", ".join(f"{name} {version}" for name, version in versions().items())
    lines = [f"{device_name(device)}, commit {commit()}", found, str(settings), ""]
    lines += [f"{o.name:<20} {o.seconds:6.0f} s  {o.status}" for o in outcomes]
    for outcome in outcomes:
        lines += ["", f"== {outcome.name}: {outcome.what}", f"$ {outcome.command}", *outcome.output]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None, steps: Sequence[Step] = STEPS) -> int:
    """Take the steps, and write as it goes."""
    shares = "\n".join(f"  {step.name:<20} {step.minutes:g} min  {step.what}" for step in steps)
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").format(steps=shares),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=25.0, help="for all steps together")
    parser.add_argument("--steps", nargs="+", choices=[s.name for s in steps], help="only these")
    parser.add_argument("--toy", action="store_true", help="toy shapes on the CPU")
    parser.add_argument("--output", type=Path, help="JSON file; .txt and -logs/ go beside it")
    options = parser.parse_args(arguments)
    if not options.toy and not torch.cuda.is_available():
        parser.error("there is no CUDA card that torch can use; --toy runs it on the CPU")
    device = torch.device("cpu" if options.toy else "cuda")
    output = options.output or default_output("on_a_card", device)
    logs = output.with_name(f"{output.stem}-logs")
    logs.mkdir(parents=True, exist_ok=True)
    settings = {"minutes": options.minutes, "toy": options.toy}
    left = [step for step in steps if not options.steps or step.name in options.steps]
    end = time.monotonic() + 60 * options.minutes
    outcomes: list[Outcome] = []
    while left:
        share = left[0].minutes / sum(step.minutes for step in left)
        step, *left = left
        limit = max(1.0, share * (end - time.monotonic()))
        print(f"{step.name}: {step.what}, at most {limit:.0f} s", flush=True)
        outcomes.append(run_step(step, step.toy if options.toy else step.command, limit, logs))
        print(f"  {outcomes[-1].status}, {outcomes[-1].seconds:.0f} s", flush=True)
        write_record(output, "on_a_card", device, settings, [asdict(o) for o in outcomes])
        text = page(outcomes, device, settings)
        output.with_suffix(".txt").write_text(text, encoding="utf-8")
    print(f"written: {output} and {output.with_suffix('.txt')}")
    bad = [o.name for o in outcomes if not o.status.startswith(("done", "skipped"))]
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())

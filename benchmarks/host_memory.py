"""Training on a CPU with the layers on the disk, beside all of them in memory: bytes and seconds.

    python benchmarks/host_memory.py --model FOLDER
    python benchmarks/host_memory.py --shape 1b

A model's folder, or random weights of a shape (`_random_models`), written as a 4-bit checkpoint. A
process each takes `--steps` optimizer steps with `layer_weights` device and disk: two micro-batches
of a pair, rank-16 adapters on all linears, fp32, one thread.

peak is the most that the process had resident since the model was loaded, base what it had before,
planned the most bytes of tensors at a time in the same step rehearsed on tensors without memory;
over is peak / (base + planned) - 1. Page cache is no memory of the process: the system takes it
back when somebody needs it. Where cgroups can be written, disk runs once more with no more memory
than `--limit_mib`. No figure is printed unless all losses are equal to the last digit.
"""

import argparse
import gc
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
from _common import peak_mib, reset_peak, write_record
from _random_models import SHAPES, write_random_checkpoint

from lowmem_dpo.linears.lora import AdapterSpec, lora_parameters
from lowmem_dpo.losses.objective import Objective
from lowmem_dpo.memory.extension import happenings
from lowmem_dpo.memory.fake_card import FakeCard
from lowmem_dpo.memory.levers import Levers
from lowmem_dpo.memory.limits import give_back_freed_memory
from lowmem_dpo.memory.trace import Follower
from lowmem_dpo.model.language_model import LanguageModel
from lowmem_dpo.model.surgery import prepare_model
from lowmem_dpo.packs.packing import pack_trees
from lowmem_dpo.reference.fill import Reference
from lowmem_dpo.settings.configs import TrainConfig
from lowmem_dpo.steps.gradients import accumulate
from lowmem_dpo.steps.rehearsed import PLACES, TreeShape, follow_step, tree_of_shape
from lowmem_dpo.steps.update import allocate_moments, clip_gradients, new_state
from lowmem_dpo.weights.folders import load_config
from lowmem_dpo.weights.loading import load_model, unfilled_model
from lowmem_dpo_kernels.triton_support import RehearsedCard, rehearsing

CPU = torch.device("cpu")
MIB = 2**20
ADAPTER = AdapterSpec(16, 32.0, 0.0, "all", rank_stabilised=False)
LEVERS = {"device": Levers(), "disk": Levers(num_slots=2, layers_on_disk=True)}
CGROUPS = Path("/sys/fs/cgroup")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", type=Path, help="folder of a model")
    source.add_argument("--shape", choices=SHAPES, help="of random weights")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64, help="of a micro-batch")
    parser.add_argument("--limit_mib", type=int, help="memory of the cgroup that disk runs in")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--worker", choices=LEVERS, help=argparse.SUPPRESS)
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--cgroup", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def packs_of(tokens: int) -> list[list[Any]]:
    """The pairs of two micro-batches: half of a tree is its prompt."""
    return [[tree_of_shape(TreeShape(tokens // 2, tokens // 4, tokens // 4))]] * 2


def prepared(model: LanguageModel, place: str) -> LanguageModel:
    """With an adapter, its layers where they are wanted."""
    return prepare_model(model, ADAPTER, LEVERS[place])


def planned_mib(folder: Path, place: str, tokens: int) -> float:
    """The most bytes of tensors at a time in a step, rehearsed as a run on a CPU."""
    follower, mode, settings = Follower("cpu", PLACES), FakeCard(), TrainConfig(optim="adamw")
    with rehearsing(RehearsedCard((8, 0), follower.note_launch)):
        model = unfilled_model(
            load_config(str(folder)),
            quantization="nf4",
            dtype=torch.float32,
            device=CPU,
            mode=mode,
            levers=LEVERS[place],
        )
        with mode:
            follow_step(
                prepared(model, place),
                follower,
                packs_of(tokens),
                pack_tokens=tokens,
                objective=Objective.of(settings),
                optimizer=settings,
            )
    now = most = 0
    for each in happenings(follower.sections):
        now += each.storage.nbytes if each.is_birth else -each.storage.nbytes
        most = max(most, now)
    return most / MIB


def work(options: argparse.Namespace) -> dict[str, Any]:
    """Load the model and take the steps in this process."""
    torch.set_num_threads(1)
    settings = TrainConfig(optim="adamw")
    if options.cgroup:
        (options.cgroup / "cgroup.procs").write_text(str(os.getpid()), encoding="ascii")
    folder, levers = options.model, LEVERS[options.worker]
    planned = planned_mib(folder, options.worker, options.tokens)  # imports what steps import
    gc.collect()
    give_back_freed_memory()  # as a run from the disk does
    reset_peak(CPU)
    base = peak_mib(CPU)
    model = prepared(
        load_model(
            str(folder),
            config=load_config(str(folder)),
            quantization="nf4",
            dtype=torch.float32,
            device=CPU,
            cache_dir=options.cache,
            levers=levers,
        ),
        options.worker,
    )
    parameters = lora_parameters(model.network)
    state = new_state(settings, list(parameters.values()), num_steps=options.steps)
    allocate_moments(state.optimizer)
    packs = pack_trees([tree for (tree,) in packs_of(options.tokens)], options.tokens)
    logps = {
        tree.digest: torch.zeros(tree.num_chosen_tokens + tree.num_rejected_tokens)
        for pack in packs
        for tree in pack.trees
    }
    reference = Reference(logps, same_fingerprint=True, num_scored=0, recheck_rms=None)
    reset_peak(CPU)
    loaded = peak_mib(CPU)
    losses, seconds, cpu_seconds = [], [], []
    for _ in range(options.steps):
        begun, cpu_begun = time.perf_counter(), time.process_time()
        stats = accumulate(model, Objective.of(settings), reference, packs, state.scaler)
        clip_gradients(state, parameters, 1.0)
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - begun)
        cpu_seconds.append(time.process_time() - cpu_begun)
        losses.append(stats.summary()[0]["loss"])
    peak = peak_mib(CPU)
    assert base is not None and peak is not None, "resident memory is known on Linux alone"
    return {
        "layer_weights": options.worker,
        "peak_mib": peak,
        "base_mib": base,
        "loaded_mib": loaded,
        "planned_mib": planned,
        "over": peak / (base + planned) - 1,
        "seconds_a_step": min(seconds, default=math.nan),
        "cpu_seconds_a_step": min(cpu_seconds, default=math.nan),
        "losses": losses,
    }


def measure(options: argparse.Namespace, place: str, *words: str) -> dict[str, Any]:
    """The same in a process of its own."""
    command = [sys.executable, __file__, "--worker", place, "--model", str(options.model)]
    command += ["--steps", str(options.steps), "--tokens", str(options.tokens)]
    command += ["--cache", str(options.cache), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    if run.returncode:
        raise SystemExit(f"{place}: {(run.stderr or run.stdout).strip().splitlines()[-1:]}")
    return json.loads(run.stdout.splitlines()[-1])


def cgroup_of(limit_mib: int) -> Path | None:
    """A new cgroup with so much memory and no swap; None where none can be made."""
    group = CGROUPS / f"lowmem_dpo_{os.getpid()}"
    if not (CGROUPS / "cgroup.controllers").exists():
        print(f"no limit by a cgroup here: {CGROUPS} is not of version 2")
        return None
    try:
        group.mkdir()
        (group / "memory.max").write_text(str(limit_mib * MIB), encoding="ascii")
        (group / "memory.swap.max").write_text("0", encoding="ascii")
    except OSError as error:
        print(f"no limit by a cgroup here: {error.strerror} ({error.filename})")
        return None
    return group


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print; in a worker, work and print one line of JSON."""
    options = parse(arguments)
    if options.worker:
        print(json.dumps(work(options)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        options.cache = Path(scratch) / "cache"
        if options.shape:
            options.model = Path(scratch) / "model"
            write_random_checkpoint(options.shape, options.model)
        else:
            first = ["--steps", "0"]  # the copy is made before anything is measured
            measure(options, "disk", *first)
        results = [measure(options, place) for place in LEVERS]
        if options.limit_mib and (group := cgroup_of(options.limit_mib)):
            results.append(measure(options, "disk", "--cgroup", str(group)))
            results[-1]["limit_mib"] = options.limit_mib
            group.rmdir()
    if any(result["losses"] != results[0]["losses"] for result in results):
        raise SystemExit(f"losses differ: {[result['losses'] for result in results]}")
    print(f"losses equal to the last digit: {results[0]['losses']}")
    columns = {"peak": 9, "base": 9, "planned": 9, "over": 8, "s/step": 8, "CPU s": 8}
    head = "".join(f"{name:>{width}}" for name, width in columns.items())
    print(f"{'layer_weights':15}{head}  MiB")
    for result in results:
        sizes = (result[name] for name in ("peak_mib", "base_mib", "planned_mib"))
        text = "".join(f"{size:9.1f}" for size in sizes)
        limit = f"  in {result['limit_mib']}" if "limit_mib" in result else ""
        text += f"{result['over']:8.1%}"
        text += f"{result['seconds_a_step']:8.2f}{result['cpu_seconds_a_step']:8.2f}"
        print(f"{result['layer_weights']:15}{text}{limit}")
    saved = [results[0][name] - results[1][name] for name in ("peak_mib", "planned_mib")]
    print(f"disk saves {saved[0]:.1f} MiB, planned {saved[1]:.1f}")
    if options.output:
        settings = {"model": str(options.shape or options.model.name), "tokens": options.tokens}
        write_record(options.output, "host_memory", CPU, settings, results)


if __name__ == "__main__":
    main()

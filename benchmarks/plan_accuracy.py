"""What a rehearsal says of a step's memory and time, beside what the step takes.

    python benchmarks/plan_accuracy.py                               # a CPU: bytes
    python benchmarks/plan_accuracy.py --device cuda --models llama-3.1-8b --lengths 1024,2048

A case is a model of random weights in NF4, a length of its pairs, a plan and a type; each runs in a
process of its own, two micro-batches of one pair. All bytes are of a step alone: what is there
before it (weights, adapter, moments) is taken off.

On a CPU: rehearsed (on tensors without memory); followed (the same follower on real tensors: a byte
of difference is a failure); torch (measured: the most that torch's allocator gave out, by its
profiler); mapped (measured: how much the process's resident memory grew at its peak, each tensor of
64 KiB being mapped by itself, so that the C library keeps nothing); resident (measured: the same as
processes are, with what its heap keeps). What torch gave out more than was followed is taken and
given back within an operation; tables that the first step left are less. What is mapped more is
outside of torch: stacks, objects of Python, workspaces of the products' library.

On a card the whole of it is compared: the most allocated and reserved, rehearsed and measured, and
the seconds of a step with the range that was predicted.
"""

import argparse
import contextlib
import ctypes
import functools
import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _common import ROOT, commit, device_name, peak_mib, reset_peak, synchronize, write_record
from transformers import AutoConfig, PretrainedConfig

from lowmem_dpo.linears.lora import AdapterSpec, lora_parameters
from lowmem_dpo.linears.nf4 import dynamic_code, nf4_levels
from lowmem_dpo.losses.objective import Objective
from lowmem_dpo.machine.card_table import find_card
from lowmem_dpo.machine.device import resolve_device, resolve_dtype
from lowmem_dpo.memory.fake_card import FakeCard
from lowmem_dpo.memory.levers import Levers
from lowmem_dpo.memory.trace import Follower
from lowmem_dpo.model.language_model import LanguageModel
from lowmem_dpo.model.surgery import prepare_model
from lowmem_dpo.packs.packing import CARD_TOKEN_MULTIPLE, pack_trees, round_up_tokens
from lowmem_dpo.settings.configs import TrainConfig
from lowmem_dpo.steps import rehearsed
from lowmem_dpo.steps.gradients import accumulate
from lowmem_dpo.steps.update import allocate_moments, clip_gradients, new_state
from lowmem_dpo.tokens.trees import Tree
from lowmem_dpo.weights.loading import unfilled_model
from lowmem_dpo_kernels.triton_support import RehearsedCard, rehearsing

MIB = 2**20
CPU = torch.device("cpu")
_SMALL = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": True},
    "gemma2": {"model_type": "gemma2", "sliding_window": 128, "tie_word_embeddings": True},
    "phi3": {"model_type": "phi3"},
    "smollm2-135m": {"model_type": "llama", **_SMOLLM2},
}
MAPPED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
SETTINGS = TrainConfig(optim="adamw")
ADAPTER = AdapterSpec(16, 16.0, 0.0, "all", rank_stabilised=False)
OBJECTIVE = Objective.of(SETTINGS)
PLANS = ("nothing", "attention", "mixed", "all", "streamed")


class Case(NamedTuple):
    """What is compared."""

    model: str
    length: int
    plan: str
    dtype: str

    @property
    def config(self) -> PretrainedConfig:
        """Of a model of `MODELS`, or of benchmarks/configs."""
        if self.model in MODELS:
            return AutoConfig.for_model(**_SMALL | MODELS[self.model])
        return AutoConfig.from_pretrained(ROOT / "benchmarks" / "configs" / self.model)

    @property
    def levers(self) -> Levers:
        """Mixed is a third of the layers each."""
        num_layers = self.config.num_hidden_layers
        return {
            "nothing": Levers(),
            "attention": Levers(num_keep_attention=num_layers),
            "all": Levers(num_keep_all=num_layers),
            "mixed": Levers(num_keep_all=num_layers // 3, num_keep_attention=num_layers // 3),
            "streamed": Levers(num_slots=2),
        }[self.plan]


@dataclass(frozen=True)
class Task:
    """A step of a case on a device: half of a sequence is prompt."""

    case: Case
    device: torch.device

    @property
    def packs(self) -> list[list[Tree]]:
        """Two micro-batches of one pair."""
        half = self.case.length // 2
        return [[rehearsed.tree_of_shape(rehearsed.TreeShape(half, half, half))]] * 2

    @property
    def pack_tokens(self) -> int:
        """Tokens of a micro-batch."""
        multiple = CARD_TOKEN_MULTIPLE if self.device.type == "cuda" else 64
        return round_up_tokens(self.packs[0][0].num_tokens, multiple)

    def model(self, mode: Any) -> LanguageModel:
        """Its tensors made in a mode."""
        return unfilled_model(
            self.case.config,
            quantization="nf4",
            dtype=resolve_dtype(self.case.dtype, self.device),
            device=self.device,
            mode=mode,
            levers=self.case.levers,
        )

    def follow(self, model: LanguageModel, follower: Follower) -> None:
        """As a rehearsal follows it."""
        rehearsed.follow_step(
            prepare_model(model, ADAPTER, self.case.levers),
            follower,
            self.packs,
            pack_tokens=self.pack_tokens,
            objective=OBJECTIVE,
            optimizer=SETTINGS,
        )


def main(arguments: list[str] | None = None) -> int:
    """Print a line a case; 1 if bytes differ that must not."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", type=torch.device, default=CPU)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--lengths", default="128,512")
    parser.add_argument("--plans", default=",".join(PLANS))
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--resident_only", action="store_true", help=argparse.SUPPRESS)
    words = parser.parse_args(arguments)
    if words.worker:
        device, _ = resolve_device(str(words.device))
        task = Task(Case(*json.loads(words.worker)), device)
        if words.device.type == "cuda":
            found = measure_on_card(task)
        else:
            found = measure_on_cpu(task, resident_only=words.resident_only)
        print(json.dumps(found))
        return 0
    lists = (words.models, words.lengths, words.plans, words.dtypes)
    cases = itertools.product(*(each.split(",") for each in lists))
    print(f"{device_name(words.device)}, commit {commit()}")
    results: list[dict[str, Any]] = []
    for model, length, plan, dtype in cases:
        case = Case(model, int(length), plan, dtype)
        found = _compared(case, words.device)
        results.append(case._asdict() | found)
        if len(results) == 1:
            names = [name for name in found if name != "error"]
            print(f"{'model':14}{'length':>7} {'plan':10}{'dtype':9}", *(f"{n:>20}" for n in names))
        figures = " ".join(f"{_figure(value):>20}" for value in found.values())
        print(f"{model:14}{length:>7} {plan:10}{dtype:9} {figures}", flush=True)
        if words.output:  # as it goes
            settings = {"models": words.models, "lengths": words.lengths, "pairs": 2, "rank": 16}
            write_record(words.output, "plan_accuracy", words.device, settings, results)
    return int(any("error" in found for found in results))


def _figure(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return f"{value / MIB:.2f} MiB" if isinstance(value, int) else str(value)


def _compared(case: Case, device: torch.device) -> dict[str, Any]:
    if device.type == "cuda":
        return _in_a_process(case, device)
    mapped = _in_a_process(case, device, environment=MAPPED)
    resident = _in_a_process(case, device, "--resident_only")
    return {**mapped, **resident}


def _in_a_process(
    case: Case, device: torch.device, *words: str, environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    command = [sys.executable, __file__, "--device", str(device), "--worker", json.dumps(case)]
    run = subprocess.run(
        [*command, *words], capture_output=True, text=True, env=os.environ | (environment or {})
    )
    if run.returncode:
        return {"error": " ".join(run.stderr.split())[-200:]}
    return dict(json.loads(run.stdout.splitlines()[-1]))


def measure_on_cpu(task: Task, *, resident_only: bool) -> dict[str, Any]:
    """Bytes of a step; the process is new, and what is measured comes first."""
    model, state = _ready(task)
    _step(task, model, state)  # threads, and what libraries keep from their first call on
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    reset_peak(CPU)
    before = peak_mib(CPU)
    _step(task, model, state)
    peak = peak_mib(CPU)
    assert before is not None and peak is not None, "resident memory is known on Linux only"
    grown = round((peak - before) * MIB)
    if resident_only:
        return {"resident": grown}
    in_torch = _given_out_by_torch(functools.partial(_step, task, model, state))
    del model, state
    fake = Follower("cpu", rehearsed.PLACES)
    with rehearsing(RehearsedCard((8, 6), fake.note_launch)):
        mode = FakeCard()
        model = task.model(mode)
        with mode:
            task.follow(model, fake)
    for remembered in (dynamic_code, nf4_levels):
        remembered.cache_clear()
    real = Follower("cpu", rehearsed.PLACES)
    task.follow(_filled(task.model(contextlib.nullcontext())), real)
    said, seen = peak_of_step(fake), peak_of_step(real)
    found = {
        "rehearsed": said,
        "followed": seen,
        "torch": in_torch,
        "mapped": grown,
    }
    return found if said == seen else found | {"error": "rehearsed and followed differ"}


def peak_of_step(follower: Follower) -> int:
    """The most bytes alive during a step, without what was there before it."""
    alive = before = peak = 0
    for section in follower.sections:
        if section.phase == "data":
            before = peak = alive
        for event in section.events:
            alive += event.storage.nbytes if event.is_birth else -event.storage.nbytes
            peak = max(peak, alive)
    return peak - before


def _given_out_by_torch(action: Any) -> int:
    """The most that torch's allocator of the CPU gave out, beyond what was out before."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        action()
    events = profile.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    changes.sort(key=lambda change: change[0])
    return max(itertools.accumulate(nbytes for _, nbytes in changes))


def measure_on_card(task: Task) -> dict[str, Any]:
    """Bytes and seconds of a step, and what a rehearsal says of the card that is here."""
    device, case = task.device, task.case
    settings = rehearsed.StepSettings(
        replace(SETTINGS, dtype=case.dtype), ADAPTER, SETTINGS, SETTINGS
    )
    said = rehearsed.rehearse(
        case.config,
        find_card(torch.cuda.get_device_name(device)),
        settings,
        case.levers,
        task.packs,
        pack_tokens=task.pack_tokens,
    )
    model, state = _ready(task)
    _step(task, model, state)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for _ in range(5):
        synchronize(device)
        begun = time.perf_counter()
        _step(task, model, state)
        synchronize(device)
        seconds.append(time.perf_counter() - begun)
    return {
        "allocated, rehearsed": said.peak_allocated_bytes,
        "allocated, measured": torch.cuda.max_memory_allocated(device),
        "reserved, rehearsed": said.peak_reserved_bytes,
        "reserved, measured": torch.cuda.max_memory_reserved(device),
        "seconds, at least": said.seconds[0],
        "seconds, measured": statistics.median(seconds),
        "seconds, at most": said.seconds[1],
    }


def _ready(task: Task) -> tuple[LanguageModel, Any]:
    """A model of random weights with its adapter, and its optimizer with moments."""
    model = _filled(task.model(contextlib.nullcontext()))
    model = prepare_model(model, ADAPTER, task.case.levers)
    state = new_state(SETTINGS, list(lora_parameters(model.network).values()), num_steps=9)
    allocate_moments(state.optimizer)
    return model, state


def _filled(model: LanguageModel) -> LanguageModel:
    """The same with numbers that stay finite, written so that their memory is resident."""
    torch.manual_seed(0)
    for name, tensor in _tensors(model):
        if tensor.dtype == torch.uint8:
            tensor.random_()
        elif "norm" in name:
            tensor.fill_(1.0)
        elif "inv_freq" not in name:
            tensor.normal_(std=0.02)
    return model


def _tensors(model: LanguageModel) -> Iterator[tuple[str, torch.Tensor]]:
    for module_name, module in model.network.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                yield f"{module_name}.{name}", tensor.data


def _step(task: Task, model: LanguageModel, state: Any) -> None:
    """One optimizer step as the training loop takes it."""
    trees = [tree for pack in task.packs for tree in pack]
    packs = [pack for some in task.packs for pack in pack_trees(some, task.pack_tokens)]
    reference = rehearsed._reference_of(trees)
    stats = accumulate(model, OBJECTIVE, reference, packs, state.scaler)
    assert all(value.isfinite().all() for block in stats.blocks for value in block.values())
    clip_gradients(state, lora_parameters(model.network), SETTINGS.max_grad_norm)
    state.scaler.step(state.optimizer)
    state.optimizer.zero_grad(set_to_none=True)


if __name__ == "__main__":
    sys.exit(main())

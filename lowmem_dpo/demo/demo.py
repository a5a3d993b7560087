"""`demo`: the whole way on a small model, offline: samples, pairs, training, proof.

Only the model is made for the occasion. Its samples come through the ordinary generation, its pairs
go through the ordinary reader, and `Trainer` trains on them as it would on any others.
"""

import json
import random
import shutil
import time
from pathlib import Path
from typing import Literal

from rich.table import Table

from lowmem_dpo.console import duration, say
from lowmem_dpo.demo.task import is_right, is_short, make_model, questions
from lowmem_dpo.linears.lora import adapters_disabled
from lowmem_dpo.machine.cards import this_machine
from lowmem_dpo.machine.device import resolve_device, unusable_cards
from lowmem_dpo.model.generation import generate_text
from lowmem_dpo.settings.configs import DemoConfig, TrainConfig
from lowmem_dpo.settings.groups import ModelSettings, SamplingSettings, TemplateSettings
from lowmem_dpo.tokens.encoding import render_prompt
from lowmem_dpo.trainer import Trainer
from lowmem_dpo.training.loop import StepResult
from lowmem_dpo.training.policy import Policy, load_policy

MARKER = ".lowmem_dpo_demo"
OWN_ENTRIES = ("model", "preferences.jsonl", "run", "cache")

SAMPLES_PER_QUESTION = 8
PAIRS_PER_QUESTION = 4
FRESH_SAMPLES = 4
NUM_SHOWN = 4
MAX_NEW_TOKENS = 96
ACCURACY_WANTED = 0.9
GROWTH_WANTED = 2.0


def demo(config: DemoConfig) -> bool:
    """Run the demo and print what came of it.

    Returns:
        Whether it learned: held-out reward accuracy above 0.9, and at least twice as many short
        answers in fresh samples as before.

    Raises:
        ValueError: If output_dir is a file, or holds something else than a demo, or the device
            cannot be used.
    """
    begun = time.perf_counter()
    _look_at_machine(config.device)
    root = _fresh_folder(Path(config.output_dir))
    say("1. a small Llama, trained from scratch to answer questions about animals")
    loss = make_model(root / "model", config.seed)
    say(f"   {len(questions())} questions, loss {loss:.3f} nat per token")

    say("2. preference pairs from its own answers: one sentence is preferred to several")
    cache = str(root / "cache")
    # What auto measures differs from CPU to CPU; the demo is the same on all of them.
    dtype: Literal["float32", "auto"] = "float32" if config.device == "cpu" else "auto"
    model = ModelSettings(
        model=str(root / "model"), device=config.device, dtype=dtype, cache_dir=cache
    )
    policy = load_policy(model)
    pairs = write_pairs(policy, root / "preferences.jsonl", config.seed)
    say(f"   {pairs} pairs in {root / 'preferences.jsonl'}")

    say(f"3. training on them: python -m lowmem_dpo train --config {root / 'run' / 'config.yaml'}")
    say("   (at a learning rate above the usual range, which so small a model needs)")
    trainer = Trainer(
        TrainConfig(
            model=str(root / "model"),
            data=str(root / "preferences.jsonl"),
            output_dir=str(root / "run"),
            cache_dir=cache,
            device=config.device,
            dtype=dtype,
            seed=config.seed,
            eval_fraction=0.2,
            # The defaults suit models of billions of parameters; so small a one needs larger steps,
            # and a larger beta, or it forgets its facts over its manners.
            learning_rate=6e-4,
            beta=0.3,
            num_train_epochs=4,
            logging_steps=5,
        )
    )
    steps: list[StepResult] = []
    trainer.add_step_callback(steps.append)
    result = trainer.fit()

    say("4. fresh answers, before and after")
    assert trainer.policy is not None
    before, after = _start_accuracy(steps[0].metrics), result.metrics["eval_rewards/accuracies"]
    learned = _report(trainer.policy, (before, after), config.seed + 1)
    say(f"plots: {root / 'run' / 'plots'}")
    say(f"the demo took {duration(time.perf_counter() - begun)}")
    return learned


def _look_at_machine(device: str) -> None:
    """Refuse a card that cannot be used while the earlier demo is still there; tell of an idle one.

    The demo suits the CPU, so it runs beside a card that only needs something installed.
    """
    _, notes = resolve_device(device)
    if device == "cpu" and (problem := unusable_cards(this_machine())):
        notes = [f"{problem}. The demo runs on the CPU; train would refuse to"]
    for line in notes:
        say(line)


def _fresh_folder(root: Path) -> Path:
    """Make the demo's folder; of an earlier demo only its own entries are deleted."""
    if root.exists() and not root.is_dir():
        raise ValueError(f"output_dir {root} is a file; choose another --output_dir")
    root.mkdir(parents=True, exist_ok=True)
    if not (root / MARKER).is_file() and any(root.iterdir()):
        raise ValueError(f"{root} is not empty and holds no demo; choose another --output_dir")
    for entry in (root / name for name in OWN_ENTRIES):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink(missing_ok=True)
    (root / MARKER).write_text("the demo may delete its entries here\n", encoding="utf-8")
    return root


def _start_accuracy(metrics: dict[str, float]) -> float:
    """Accuracy before any update, as the first step saw it; a tie counts as half.

    Policy and reference are still the same then, so what holds for its pairs holds for all.
    """
    is_tie = metrics["rewards/margins"] == 0 and metrics["rewards/chosen"] == 0
    return 0.5 if is_tie else metrics["rewards/accuracies"]


def answers_of(policy: Policy, num_samples: int, seed: int) -> dict[str, list[str]]:
    """Sample answers to every question."""
    prompts = [question for question in questions() for _ in range(num_samples)]
    ids = [render_prompt(policy.tokenizer, prompt, TemplateSettings()) for prompt in prompts]
    sampling = SamplingSettings(
        max_new_tokens=MAX_NEW_TOKENS, temperature=1.0, top_p=1.0, seed=seed
    )
    texts = generate_text(policy.model, policy.tokenizer, ids, sampling)
    answers: dict[str, list[str]] = {}
    for prompt, text in zip(prompts, texts, strict=True):
        answers.setdefault(prompt, []).append(text)
    return answers


def write_pairs(policy: Policy, path: Path, seed: int) -> int:
    """Pair short right answers with long ones to the same question; returns the number of pairs."""
    rng = random.Random(seed)
    rows = []
    for question, answers in answers_of(policy, SAMPLES_PER_QUESTION, seed).items():
        short = sorted({a for a in answers if is_short(a) and is_right(question, a)})
        long = sorted({a for a in answers if not is_short(a)})
        both = [(chosen, rejected) for chosen in short for rejected in long]
        for chosen, rejected in rng.sample(both, min(PAIRS_PER_QUESTION, len(both))):
            rows.append({"prompt": question, "chosen": chosen, "rejected": rejected})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return len(rows)


def _report(policy: Policy, accuracies: tuple[float, float], seed: int) -> bool:
    """Show samples and figures from before and after; returns whether the model learned."""
    accuracy_before, accuracy = accuracies
    after = answers_of(policy, FRESH_SAMPLES, seed)
    with adapters_disabled(policy.model.network):
        before = answers_of(policy, FRESH_SAMPLES, seed)
    samples = Table("question", "before", "after", show_lines=True)
    for question in random.Random(seed).sample(list(before), NUM_SHOWN):
        samples.add_row(question, before[question][0], after[question][0])
    say(samples)

    def share(answers: dict[str, list[str]], test: str) -> float:
        checks = {"short": lambda q, a: is_short(a), "right": is_right}
        results = [checks[test](q, a) for q, texts in answers.items() for a in texts]
        return sum(results) / len(results)

    short_before, short_after = share(before, "short"), share(after, "short")
    figures = Table("", "before", "after")
    figures.add_row("held-out reward accuracy", f"{accuracy_before:.2f}", f"{accuracy:.2f}")
    figures.add_row("short answers", f"{short_before:.2f}", f"{short_after:.2f}")
    figures.add_row(
        "right answers", f"{share(before, 'right'):.2f}", f"{share(after, 'right'):.2f}"
    )
    say(figures)
    learned = accuracy > ACCURACY_WANTED and short_after >= GROWTH_WANTED * short_before
    say("it learned" if learned else "it did NOT learn what it should")
    return learned

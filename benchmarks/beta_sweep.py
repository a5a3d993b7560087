"""What does beta do? The demo's model and pairs, trained once for every beta.

For each beta: KL(pi || pi_ref) in nats per answer, estimated on the policy's own samples as the
mean of log pi - log pi_ref; the held-out margin, as log-ratio difference h (nats) and as reward
(beta h); held-out loss and accuracy; and, of fresh answers, how many are short (what was asked for)
and how many still right (what must not be lost).

    python benchmarks/beta_sweep.py
"""

import argparse
import tempfile
from pathlib import Path

import torch
from _common import default_output, write_record

from lowmem_dpo.demo.demo import answers_of, write_pairs
from lowmem_dpo.demo.task import is_right, is_short, make_model
from lowmem_dpo.linears.lora import adapters_disabled
from lowmem_dpo.model.scoring import score_plain
from lowmem_dpo.settings.configs import TrainConfig
from lowmem_dpo.settings.groups import TemplateSettings
from lowmem_dpo.tokens.encoding import render_prompt
from lowmem_dpo.trainer import Trainer
from lowmem_dpo.training.policy import Policy, load_policy

BETAS = (0.01, 0.05, 0.1, 0.2, 0.5, 1.0)
SEED = 42
CPU = torch.device("cpu")
COLUMNS = ("beta", "kl", "h", "margin", "loss", "accuracy", "short", "right")


def main() -> None:
    """Train, measure, print a table; `--save` writes it to benchmarks/results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--learning_rate", type=float, default=6e-4)
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_model(root / "model", SEED)
        base = load_policy(TrainConfig(model=str(root / "model"), device="cpu"))
        num_pairs = write_pairs(base, root / "pairs.jsonl", SEED)
        rows.append({"beta": None, **answer_figures(base, kl=False)})
        for beta in BETAS:
            rows.append({"beta": beta, **train(root, beta, arguments)})
            print(rows[-1], flush=True)
    print(f"{num_pairs} pairs, learning rate {arguments.learning_rate}, {arguments.epochs} epochs")
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
    for row in rows:
        cells = [row.get(name) for name in COLUMNS]
        print("| " + " | ".join("" if c is None else f"{c:.3g}" for c in cells) + " |")
    if arguments.save:
        settings = {"learning_rate": arguments.learning_rate, "epochs": arguments.epochs}
        path = default_output("beta_sweep", CPU)
        write_record(path, "beta_sweep", CPU, {"pairs": num_pairs, **settings}, rows)


def train(root: Path, beta: float, arguments: argparse.Namespace) -> dict[str, float]:
    """One run; the reference comes from the cache from the second beta on."""
    trainer = Trainer(
        TrainConfig(
            model=str(root / "model"),
            data=str(root / "pairs.jsonl"),
            output_dir=str(root / f"beta-{beta}"),
            cache_dir=str(root / "cache"),
            device="cpu",
            seed=SEED,
            eval_fraction=0.2,
            learning_rate=arguments.learning_rate,
            num_train_epochs=arguments.epochs,
            beta=beta,
            save_strategy="no",
        )
    )
    metrics = trainer.fit().metrics
    assert trainer.policy is not None
    margin = metrics["eval_rewards/margins"]
    return {
        "h": margin / beta,
        "margin": margin,
        "loss": metrics["eval_loss"],
        "accuracy": metrics["eval_rewards/accuracies"],
        **answer_figures(trainer.policy, kl=True),
    }


def answer_figures(policy: Policy, *, kl: bool) -> dict[str, float]:
    """Shares of short and right answers among fresh samples, and KL on them."""
    answers = answers_of(policy, 4, SEED + 1)
    pairs = [(question, text) for question, texts in answers.items() for text in texts]
    figures = {
        "short": sum(is_short(text) for _, text in pairs) / len(pairs),
        "right": sum(is_right(question, text) for question, text in pairs) / len(pairs),
    }
    if kl:
        ratios = [log_ratio(policy, question, text) for question, text in pairs]
        figures["kl"] = sum(ratios) / len(ratios)
    return figures


def log_ratio(policy: Policy, question: str, answer: str) -> float:
    """Log pi - log pi_ref of one answer and its end, in nats."""
    prompt = render_prompt(policy.tokenizer, question, TemplateSettings())
    ids = policy.tokenizer.encode(answer, add_special_tokens=False)
    sequence = (*prompt, *ids, policy.tokenizer.eos_token_id)
    logp = score_plain(policy.model, sequence)[len(prompt) - 1 :].sum()
    with adapters_disabled(policy.model.network):
        return (logp - score_plain(policy.model, sequence)[len(prompt) - 1 :].sum()).item()


if __name__ == "__main__":
    main()

"""Does training find the optimum? A transformer so small that every answer can be enumerated.

Vocabulary 8, answers of 4 tokens: 4,096 in all. A two-layer Llama is first taught a random process
(the supervised stage) and becomes the reference; the reward is a random number per position and
token. Then pi* of pi_ref e^(r / beta) / Z is known exactly, and so are KL and expected reward of
whatever the training loop arrives at, from pairs of the reference with Bradley-Terry labels.

    python benchmarks/enumerable_transformer.py --pairs 60000

Source of the optimum: Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, section 4.
"""

import argparse
import itertools
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from _runs import run_on
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from lowmem_dpo.model.scoring import other_attention
from lowmem_dpo.settings.groups import (
    AdapterSettings,
    LossSettings,
    ModelSettings,
    OptimizerSettings,
)
from lowmem_dpo.tokens.trees import TokenPair, Tree, build_tree
from lowmem_dpo.training.loop import train_steps
from lowmem_dpo.training.policy import Policy, Source, load_policy
from lowmem_dpo.weights.folders import load_config

VOCABULARY, LENGTH, BETA = 8, 4, 1.0
CPU = torch.device("cpu")


@dataclass
class Outcome:
    """How close the policy came to pi*.

    Attributes:
        start_kl: KL(pi* || pi_ref), in nats.
        kl: KL(pi* || pi), in nats.
        correlation: Of beta log(pi / pi_ref) with the reward, under pi_ref.
        point: KL(pi || pi_ref) and expected reward of the policy.
        best_point: The same of pi*.
    """

    start_kl: float
    kl: float
    correlation: float
    point: tuple[float, float]
    best_point: tuple[float, float]


def all_answers() -> Tensor:
    """[4096, 5] every answer behind its prompt, token 0."""
    answers = torch.tensor(list(itertools.product(range(VOCABULARY), repeat=LENGTH)))
    return F.pad(answers, (1, 0))


def save_reference(directory: Path, steps: int) -> None:
    """Teach a new model a random process, different at every position, and save it."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            initializer_range=0.15,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
    )
    generator = torch.Generator().manual_seed(3)
    process = torch.randn(LENGTH, VOCABULARY, VOCABULARY, generator=generator) * 0.7
    process = process + torch.randn(LENGTH, 1, VOCABULARY, generator=generator) * 0.7
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(steps):
        ids = torch.zeros(256, LENGTH + 1, dtype=torch.long)
        for t in range(LENGTH):
            chances = process[t][ids[:, t]].softmax(-1)
            ids[:, t + 1] = torch.multinomial(chances, 1, generator=generator)[:, 0]
        logits = model(input_ids=ids[:, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(directory)


def load(directory: Path, *, rank: int, quantization: Any) -> Policy:
    """The saved model with a new adapter on every linear, computing in fp32."""
    config, no_tokenizer = load_config(str(directory)), cast(PreTrainedTokenizerBase, None)
    source = Source(str(directory), None, config, no_tokenizer, CPU, torch.float32, {}, directory)
    adapter = AdapterSettings(lora_r=rank, lora_alpha=float(rank))
    return load_policy(ModelSettings(quantization=quantization), adapter, source=source)


@torch.no_grad()
def answer_logps(policy: Policy, ids: Tensor) -> Tensor:
    """[4096] log-prob of every answer, in float64 from the hidden states on."""
    with other_attention(policy.model, policy.model.family.plain_attention):
        hidden = policy.model.backbone(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    logps = F.log_softmax((hidden @ policy.model.head_weight.T).double(), dim=-1)
    return logps.gather(-1, ids[:, 1:, None])[..., 0].sum(1)


def draw_pairs(reference: Tensor, rewards: Tensor, ids: Tensor, count: int) -> list[Tree]:
    """Pairs of answers of the reference, labelled by Bradley-Terry."""
    generator = torch.Generator().manual_seed(1)
    first, second = torch.multinomial(
        reference.exp().expand(2, -1), count, replacement=True, generator=generator
    )
    first, second = first[first != second], second[first != second]
    chance = torch.sigmoid(rewards[first] - rewards[second])
    wins = torch.rand(len(first), generator=generator, dtype=torch.float64) < chance
    chosen, rejected = torch.where(wins, first, second), torch.where(wins, second, first)
    sides = zip(ids[chosen].tolist(), ids[rejected].tolist(), strict=True)
    return [
        build_tree(TokenPair(row, tuple(a), tuple(b), 1, 1)) for row, (a, b) in enumerate(sides)
    ]


def train_and_compare(
    directory: Path,
    cache: Path,
    *,
    pairs: int,
    rank: int = 64,
    quantization: str = "none",
    learning_rate: float = 1e-3,
    batch_size: int = 64,
) -> Outcome:
    """Train one pass over new pairs with the project's loop and hold the policy against pi*."""
    settings = OptimizerSettings(
        learning_rate=learning_rate,
        batch_size=batch_size,
        warmup_ratio=0.05,
        max_grad_norm=0.0,
        adam_beta2=0.99,
    )
    policy, ids = load(directory, rank=rank, quantization=quantization), all_answers()
    reference = answer_logps(policy, ids)
    table = torch.randn(
        LENGTH, VOCABULARY, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    rewards = 0.7 * table[torch.arange(LENGTH), ids[:, 1:]].sum(1)
    trees = draw_pairs(reference, rewards, ids, pairs)
    run, state = run_on(
        trees, policy, LossSettings(beta=BETA), settings, cache / f"{rank}-{quantization}", 1024
    )
    for _ in train_steps(run, state, settings.max_grad_norm):
        pass
    return compare(answer_logps(policy, ids), reference, rewards)


def compare(policy: Tensor, reference: Tensor, rewards: Tensor) -> Outcome:
    """Hold log-probs of all answers against the optimum."""
    best = F.log_softmax(reference + rewards / BETA, dim=0)

    def point(logps: Tensor) -> tuple[float, float]:
        kl = (logps.exp() * (logps - reference)).sum().item()
        return kl, (logps.exp() * rewards).sum().item()

    weights = reference.exp()
    implicit, truth = (
        values - (weights * values).sum() for values in (BETA * (policy - reference), rewards)
    )
    spread = (weights * implicit.square()).sum() * (weights * truth.square()).sum()
    return Outcome(
        start_kl=(best.exp() * (best - reference)).sum().item(),
        kl=(best.exp() * (best - policy)).sum().item(),
        correlation=((weights * implicit * truth).sum() / spread.sqrt()).item(),
        point=point(policy),
        best_point=point(best),
    )


def main() -> None:
    """Train at full rank, at low rank and on a 4-bit base; print how close each came."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=60_000)
    arguments = parser.parse_args()
    print("| base, rank | KL(pi*, ref) | KL(pi*, pi) | correlation | KL, reward | best |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        save_reference(Path(folder) / "model", steps=300)
        for quantization, rank in (("none", 64), ("none", 4), ("nf4", 64)):
            o = train_and_compare(
                Path(folder) / "model",
                Path(folder) / "cache",
                pairs=arguments.pairs,
                rank=rank,
                quantization=quantization,
            )
            print(
                f"| {quantization}, {rank} | {o.start_kl:.3f} | {o.kl:.4f} | {o.correlation:.4f} "
                f"| {o.point[0]:.3f}, {o.point[1]:.3f} | {o.best_point[0]:.3f}, "
                f"{o.best_point[1]:.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()

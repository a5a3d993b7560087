"""The demo's little world: questions about animals, and a taste for short answers.

The facts are the model's knowledge. How much it adds to them is its style, and a matter of
preference: after the supervised stage it says one, two or three sentences, as its examples did.
"""

import random
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from lowmem_dpo.demo.byte_tokenizer import byte_tokenizer

ANIMALS = {
    "fox": ("mice", "in the woods"),
    "owl": ("voles", "in old barns"),
    "cow": ("grass", "on a farm"),
    "bee": ("nectar", "in a hive"),
    "bear": ("berries", "in the hills"),
    "seal": ("fish", "by the sea"),
    "goat": ("leaves", "on the cliffs"),
    "mole": ("worms", "under the lawn"),
    "swan": ("weeds", "on the lake"),
    "crab": ("clams", "in the sand"),
    "wolf": ("deer", "in the north"),
    "lion": ("zebras", "on the plain"),
    "hare": ("clover", "in the fields"),
    "frog": ("flies", "in the pond"),
    "deer": ("bark", "in the valley"),
    "duck": ("seeds", "on the river"),
    "toad": ("slugs", "in the garden"),
    "yak": ("moss", "in Tibet"),
    "emu": ("fruit", "in the bush"),
    "otter": ("eels", "in the creek"),
}
REMARKS = (
    "I read that in a book.",
    "Most people know this.",
    "Ask me again any time.",
    "That may surprise you.",
)
NUM_REMARKS = (
    0,
    0,
    0,
    1,
    1,
    1,
    1,
    2,
    2,
    2,
)  # how many follow the fact, in one of ten examples each

NUM_STEPS = 240
BATCH_SIZE = 16
LEARNING_RATE = 4e-3
IGNORED = -100


def questions() -> dict[str, str]:
    """Every question with its fact, a sentence each."""
    facts = {}
    for animal, (food, place) in ANIMALS.items():
        facts[f"What does the {animal} eat?"] = f"The {animal} eats {food}."
        facts[f"Where does the {animal} live?"] = f"The {animal} lives {place}."
    return facts


def is_short(answer: str) -> bool:
    """The preference: one sentence, and no more."""
    return answer.count(".") == 1 and answer.endswith(".")


def is_right(question: str, answer: str) -> bool:
    """Whether the answer gives the fact."""
    return answer.startswith(questions()[question])


def make_model(directory: Path, seed: int) -> float:
    """Train a small Llama from scratch on the examples and save it with its tokenizer.

    Args:
        directory: Receives the checkpoint.
        seed: Of weights and examples.

    Returns:
        The loss of the last steps, in nats per token of the answers.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokenizer = byte_tokenizer()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            tie_word_embeddings=True,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, NUM_STEPS)
    losses = []
    for _ in range(NUM_STEPS):
        ids, labels = _examples(tokenizer, rng)
        logits = model(input_ids=ids).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return sum(losses[-10:]) / 10


def _examples(
    tokenizer: PreTrainedTokenizerBase, rng: random.Random
) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of conversations, right-padded, and its labels: the answers' tokens alone."""

    def encode(messages: list[dict[str, str]], *, opened: bool = False) -> list[int]:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opened)
        return tokenizer.encode(str(text), add_special_tokens=False)

    facts = list(questions().items())
    rows = []
    for question, fact in rng.sample(facts, min(BATCH_SIZE, len(facts))):
        remarks = rng.sample(REMARKS, rng.choice(NUM_REMARKS))
        prompt = [{"role": "user", "content": question}]
        answer = [{"role": "assistant", "content": " ".join([fact, *remarks])}]
        rows.append((len(encode(prompt, opened=True)), encode(prompt + answer)))
    width = max(len(ids) for _, ids in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    labels = torch.full_like(ids, IGNORED)
    for i, (start, row) in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        labels[i, start : len(row)] = torch.tensor(row[start:])
    return ids, labels

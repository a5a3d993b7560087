"""SmolLM2 from the command line's first word to an adapter that others read: one run, many looks.

Everything goes through the command line and the files it leaves, as a user's run does.
"""

import contextlib
import io
import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import pytest

from lowmem_dpo import cli

pytestmark = pytest.mark.real

QUESTION = "What is the capital of France?"
# Short answers are preferred to whole sentences.
PAIRS = [
    (QUESTION, "Paris.", "The capital of France is Paris, a city on the Seine."),
    ("What colour is the sky?", "Blue.", "The sky can have many colours."),
    ("How many legs has a spider?", "Eight.", "A spider has got eight legs in all."),
    ("What is two plus two?", "Four.", "Two plus two is equal to four."),
    ("Which animal barks?", "A dog.", "The animal that barks is the dog."),
    ("What do bees make?", "Honey.", "Bees are known for making honey."),
]


class Run(NamedTuple):
    """A training run that has ended."""

    words: list[str]
    output: Path
    printed: str

    def metrics(self) -> list[dict[str, float]]:
        lines = (self.output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        measured = ("pairs_per_second", "tokens_per_second", "peak_memory_bytes")
        rows = [json.loads(line) for line in lines]
        return [{k: v for k, v in row.items() if k not in measured} for row in rows]

    def record(self) -> dict:
        return json.loads((self.output / "run.json").read_text(encoding="utf-8"))

    def adapter(self) -> bytes:
        return (self.output / "adapter" / "adapter_model.safetensors").read_bytes()


def run_verb(words: list[str]) -> str:
    """Run the command line; returns what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert cli.main(words) == 0
    return printed.getvalue()


def train(words: list[str], output: Path) -> Run:
    return Run(words, output, run_verb(["train", *words, "--output_dir", str(output)]))


@pytest.fixture(scope="module")
def three_steps(real_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of three steps of two pairs, with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("real")
    rows = [dict(zip(("prompt", "chosen", "rejected"), pair, strict=True)) for pair in PAIRS]
    data = folder / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    text = f"""--model {real_model} --data {data} --cache_dir {folder / "cache"} --device cpu
        --dtype float32 --batch_size 2 --max_steps 3 --warmup_steps 0 --learning_rate 3e-4
        --lora_r 4 --save_strategy steps --save_steps 1 --keep_checkpoints 3"""
    return train(text.split(), folder / "run")


def test_base_is_loaded_in_nf4_with_its_head_tied(three_steps):
    printed = re.sub(r"[│\s]+", " ", three_steps.printed)
    assert "llama, computing in float32 on cpu" in printed
    assert "attention linears 120 nf4, double quantised" in printed
    assert "mlp linears 90 nf4, double quantised" in printed
    assert "head 1 tied to the embedding" in printed


def test_self_check_finds_rounding_only(three_steps):
    assert 0 < three_steps.record()["self_check_rms"] < 5e-5


def test_prompt_and_answer_are_the_templates_own_with_bos_once(three_steps, real_model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real_model)
    shown = re.compile(r"^(\w+) \(row 1, (\d+) of (\d+) tokens scored\)\n(.*?)\]\]$", re.M | re.S)
    blocks = {block[1]: block for block in shown.finditer(three_steps.printed)}
    assert blocks.keys() == {"chosen", "rejected"}
    for name, answer in zip(("chosen", "rejected"), PAIRS[0][1:], strict=True):
        messages = [
            {"role": "user", "content": QUESTION},
            {"role": "assistant", "content": answer},
        ]
        rendered = tokenizer.apply_chat_template(messages, tokenize=False)
        prompt, completion = blocks[name][4].split("[[")
        assert prompt + completion == rendered
        # SmolLM2's BOS opens every turn: a second one before the first turn would show here.
        assert prompt.startswith("<|im_start|>system\n") and tokenizer.bos_token == "<|im_start|>"
        assert prompt.endswith("<|im_start|>assistant\n")
        assert completion == f"{answer}<|im_end|>\n"  # the model learns to stop
        num_scored, num_tokens = int(blocks[name][2]), int(blocks[name][3])
        assert num_tokens == len(tokenizer(rendered, add_special_tokens=False)["input_ids"])
        assert num_scored == len(tokenizer(completion, add_special_tokens=False)["input_ids"])


def test_step_zero_is_exact(three_steps):
    assert three_steps.record()["step_zero"]["exact"]
    first = three_steps.metrics()[0]
    assert first["rewards/margins"] == 0.0
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)


def test_three_steps_lower_the_loss_and_move_the_adapter(three_steps):
    from safetensors.torch import load

    losses = [row["loss"] for row in three_steps.metrics()]
    assert len(losses) == 3 and losses[2] < losses[1] < losses[0]
    assert three_steps.metrics()[2]["rewards/accuracies"] == 1.0
    factors = [tensor for name, tensor in load(three_steps.adapter()).items() if "lora_B" in name]
    assert len(factors) == 30 * 7
    assert all(factor.isfinite().all() and factor.any() for factor in factors)  # they start at zero


def test_resumed_run_equals_the_uninterrupted_one_to_the_bit(three_steps, tmp_path):
    first = three_steps.output / "checkpoints" / "step-000001"
    resumed = train([*three_steps.words, "--resume", str(first)], tmp_path / "resumed")
    assert len(resumed.metrics()) == 2
    assert resumed.metrics() == three_steps.metrics()[1:]
    assert resumed.adapter() == three_steps.adapter()


def test_generate_knows_the_capital_with_and_without_the_adapter(three_steps, real_model):
    text = f"""generate --model {real_model} --adapter {three_steps.output / "adapter"} --device cpu
        --cache_dir {three_steps.output.parent / "cache"} --dtype float32 --temperature 0
        --max_new_tokens 12"""
    printed = run_verb([*text.split(), "--prompt", QUESTION])
    base, adapter = printed.split("base:")[1].split("adapter:")
    assert "Paris" in base and "Paris" in adapter


def test_adapter_in_peft_has_the_logits_that_it_has_here(three_steps, real_model):
    peft = pytest.importorskip("peft")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lowmem_dpo import TrainConfig, Trainer

    folder = three_steps.output / "adapter"
    settings = {"quantization": "none", "device": "cpu", "dtype": "float32"}
    trainer = Trainer(TrainConfig(model=str(real_model), **settings))
    ours = trainer.load_checkpoint(folder).policy.model.network
    ours.set_attn_implementation("sdpa")
    base = AutoModelForCausalLM.from_pretrained(real_model, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(real_model)(PAIRS[0][2], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        without = base(input_ids=ids, use_cache=False).logits
        theirs = peft.PeftModel.from_pretrained(base, folder)(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(
            ours(input_ids=ids, use_cache=False).logits, theirs, rtol=0, atol=1e-4
        )
    assert (theirs - without).abs().max() > 0.1

"""SmolLM2's tokenizer (BOS is <|im_start|>) under its own template and the shapes of others."""

import pytest

from lowmem_dpo.data.formats import Preference
from lowmem_dpo.tokens.encoding import encode_pairs, render_prompts
from tests.tokens import shapes
from tests.tokens.encoding import AUTO, sides, trl_pairs, turn

pytestmark = pytest.mark.real

PROMPTS = [
    "How do I add a user on a Linux machine?",
    "Write a short user story.",
    "What does [INST] mean in a prompt file?",
    "Does <|im_start|>user open a turn?",
    "Name a cat.",
]
SHAPES = ["SMOLLM2", "VICUNA", "QUESTION", "MISTRAL_V3", "R1", "QWEN3", "QWEN35", "LLAMA31"]


@pytest.fixture
def tokenizer(real_model):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(real_model)


def conversations(prompts=PROMPTS, system="Be kind."):
    return [
        Preference(
            [turn("system", system), turn("user", prompt)],
            [turn("assistant", "(Yes)\nThat.")],
            [turn("assistant", "\n\nNo.")],
            row,
        )
        for row, prompt in enumerate(prompts, 1)
    ]


def test_every_plain_prompt_is_wrapped(tokenizer):
    rows = [Preference(prompt, "Yes.", "No.", row) for row, prompt in enumerate(PROMPTS, 1)]
    pairs, report = encode_pairs(rows, tokenizer, AUTO)
    assert report.num_rendered == 0
    prompts = render_prompts(tokenizer, PROMPTS, AUTO)
    for text, pair, prompt in zip(PROMPTS, pairs, prompts, strict=True):
        assert list(pair.chosen_ids[: pair.chosen_start]) == prompt
        assert f"<|im_start|>user\n{text}<|im_end|>\n" in tokenizer.decode(prompt)
    wrapped = [tokenizer.decode(prompt) for prompt in prompts]
    assert render_prompts(tokenizer, wrapped, AUTO) == prompts


def test_its_own_template_gives_the_ids_of_trl(tokenizer):
    rows = conversations()
    for row in rows:
        row.rejected[0]["content"] = "No."  # "\n\n" merges with the prompt's end
    pairs, report = encode_pairs(rows, tokenizer, AUTO)
    theirs = [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in rows]
    for pair, (prompt, chosen, rejected) in zip(pairs, trl_pairs(theirs, tokenizer), strict=True):
        assert list(pair.chosen_ids) == prompt + chosen
        assert list(pair.rejected_ids) == prompt + rejected
        assert pair.chosen_start == pair.rejected_start == len(prompt)
    assert report.notes == {}


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_keeps_the_prompt_of_inference(tokenizer, name):
    tokenizer.chat_template = getattr(shapes, name)
    rows = conversations()
    pairs, _ = encode_pairs(rows, tokenizer, AUTO)
    prompts = render_prompts(tokenizer, [row.prompt for row in rows], AUTO)
    for pair, prompt in zip(pairs, prompts, strict=True):
        assert "Be kind." in tokenizer.decode(prompt)
        assert list(pair.chosen_ids[: pair.chosen_start]) == prompt
        assert list(pair.rejected_ids[: pair.rejected_start]) == prompt
        for (_, answer), words in zip(sides(pair, tokenizer), ("(Yes)\nThat.", "No."), strict=True):
            assert words in answer and "Be kind." not in answer
            assert answer.count("<|im_end|>") == 1

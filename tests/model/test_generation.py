import json

import pytest
from transformers import LlamaConfig

from lowmem_dpo.config import TrainConfig
from lowmem_dpo.model.generation import Sampling, check_prompts, generate_text, stop_ids
from lowmem_dpo.pipeline.byte_tokenizer import byte_tokenizer
from lowmem_dpo.training.policy import load_policy
from tests.tiny import save_tiny_model

CONFIG = LlamaConfig(vocab_size=10)
GREEDY = Sampling(max_new_tokens=4, temperature=0)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "no tokens"),
        ([[1], []], "no tokens"),
        ([[1, 2], [10]], "token 10, but the model's vocabulary has 10"),
    ],
)
def test_check_prompts_refuses_what_the_model_cannot_answer(prompts, message):
    with pytest.raises(ValueError, match=message):
        check_prompts(prompts, CONFIG, GREEDY)


def test_check_prompts_counts_prompt_and_answer_against_the_window():
    config = LlamaConfig(vocab_size=10, sliding_window=8)
    check_prompts([[1] * 4], config, GREEDY)
    with pytest.raises(ValueError, match=r"sliding window of 8 tokens.* make 9"):
        check_prompts([[1] * 5], config, GREEDY)


def test_generate_text_stops_at_every_token_that_generation_config_names(tmp_path):
    folder = save_tiny_model(tmp_path / "model")

    def answer(ends: list[int]) -> tuple[str, list[int]]:
        content = json.dumps({"eos_token_id": ends})
        (folder / "generation_config.json").write_text(content, encoding="utf-8")
        policy = load_policy(TrainConfig(model=str(folder), device="cpu"))
        model, parts, tokenizer = policy.loaded.model, policy.parts, policy.tokenizer
        prompt = tokenizer.encode("hello", add_special_tokens=False)
        text = generate_text(model, parts, tokenizer, [prompt], GREEDY)[0]
        return text, stop_ids(model, tokenizer)

    eos = byte_tokenizer().eos_token_id
    text, ends = answer([5, 7])
    assert ends == [eos, 5, 7] and len(text) > 1
    assert len(answer(list(range(eos)))[0]) == 1  # the first byte ends it

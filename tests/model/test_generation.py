import json

import pytest
import torch
from transformers import LlamaConfig

from lowmem_dpo.demo.byte_tokenizer import byte_tokenizer
from lowmem_dpo.model.generation import (
    check_prompts,
    generate_text,
    position_warning,
    stop_ids,
)
from lowmem_dpo.settings.configs import TrainConfig
from lowmem_dpo.settings.groups import SamplingSettings
from tests.policies import policy_for
from tests.tiny import FAMILIES, save_tiny_model, tiny_model

CONFIG = LlamaConfig(vocab_size=10)
GREEDY = SamplingSettings(max_new_tokens=4, temperature=0)


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


def test_check_prompts_counts_prompt_and_answer_against_the_range_of_longrope():
    config = tiny_model("phi3-longrope", vocab_size=10).config
    check_prompts([[1] * 252], config, GREEDY)
    with pytest.raises(ValueError, match=r"changes beyond 256 tokens.* make 257"):
        check_prompts([[1] * 253], config, GREEDY)


def test_position_warning_counts_prompt_and_answer():
    config = LlamaConfig(vocab_size=10, max_position_embeddings=16)
    assert position_warning([[1] * 12, [1]], config, GREEDY) == ""
    line = position_warning([[1], [1] * 13], config, GREEDY)
    assert "make 17 tokens, the model was made for 16" in line


@torch.no_grad()
def greedy_ids(model, ids, num_tokens, ends):
    """The likeliest tokens, one whole forward for each, by eager attention."""
    model.set_attn_implementation("eager")
    answer = []
    while len(answer) < num_tokens and not set(ends) & set(answer):
        logits = model(torch.tensor([[*ids, *answer]]), use_cache=False).logits
        answer.append(logits[0, -1].argmax().item())
    return answer


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_text_answers_prompts_as_eager_attention_without_a_cache(tmp_path, family):
    untied = {"tie_word_embeddings": False}  # a random tied model repeats its last token
    folder = save_tiny_model(tmp_path / "model", family, **untied)
    policy = policy_for(
        TrainConfig(model=str(folder), device="cpu", quantization="none", max_length=128)
    )
    tokenizer = policy.tokenizer
    prompts = [list(range(70, 70 + length)) for length in (3, 19)]
    sampling = SamplingSettings(max_new_tokens=12, temperature=0)
    answers = generate_text(policy.model, tokenizer, prompts, sampling)
    twin = tiny_model(family, **untied)
    wanted = [greedy_ids(twin, ids, 12, stop_ids(policy.model, tokenizer)) for ids in prompts]
    assert answers == tokenizer.batch_decode(wanted, skip_special_tokens=True)
    # A prompt alone has another attention.
    alone = [generate_text(policy.model, tokenizer, [ids], sampling)[0] for ids in prompts]
    assert alone == answers
    assert len(set(wanted[1])) > 3


def test_generate_text_stops_at_every_token_that_generation_config_names(tmp_path):
    folder = save_tiny_model(tmp_path / "model")

    def answer(ends: list[int]) -> tuple[str, list[int]]:
        content = json.dumps({"eos_token_id": ends})
        (folder / "generation_config.json").write_text(content, encoding="utf-8")
        policy = policy_for(TrainConfig(model=str(folder), device="cpu"))
        model, tokenizer = policy.model, policy.tokenizer
        prompt = tokenizer.encode("hello", add_special_tokens=False)
        text = generate_text(model, tokenizer, [prompt], GREEDY)[0]
        return text, stop_ids(model, tokenizer)

    eos = byte_tokenizer().eos_token_id
    text, ends = answer([5, 7])
    assert ends == [eos, 5, 7] and len(text) > 1
    assert len(answer(list(range(eos)))[0]) == 1  # the first byte ends it

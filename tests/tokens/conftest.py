"""Tokenizers built in-process: bytes and a few merges, so that every text has ids."""

from collections.abc import Callable
from typing import Any

import pytest

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    "{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] }}{{ eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported') }}{% endif %}"
    "{% endfor %}"
)
NO_END = (
    "{% for m in messages %}### {{ m['role'] }}:\n{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant:\n{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "mistral": MISTRAL, "no_end": NO_END}
TURN_TOKENS = [
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]


@pytest.fixture(scope="session")
def build_tokenizer() -> Callable[..., Any]:
    """A factory: template by name, and whether the tokenizer puts BOS and EOS of its own accord."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    def build(template: str | None = None, *, bos: bool = False, eos: bool = False, **kwargs):
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocab = {symbol: i for i, symbol in enumerate(alphabet)}
        merges = [("a", "b"), ("ab", "c"), ("Ċ", "Ċ")]
        for left, right in merges:
            vocab[left + right] = len(vocab)
        core = Tokenizer(models.BPE(vocab=vocab, merges=merges))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        core.decoder = decoders.ByteLevel()
        core.add_special_tokens(["<s>", "</s>", *TURN_TOKENS])
        specials = [(token, core.token_to_id(token)) for token in ("<s>", "</s>")]
        if bos or eos:
            single = f"{'<s> ' if bos else ''}$A{' </s>' if eos else ''}"
            core.post_processor = processors.TemplateProcessing(
                single=single, special_tokens=specials
            )
        settings = {"bos_token": "<s>", "eos_token": "</s>"} | kwargs
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **settings)
        tokenizer.chat_template = TEMPLATES[template] if template else None
        return tokenizer

    return build

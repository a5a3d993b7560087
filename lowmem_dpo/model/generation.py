"""Text from the policy: transformers' sampling over our layers, with plain attention."""

from typing import Any

import torch
from transformers import (
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    TextStreamer,
)

from lowmem_dpo.machine.device import cuda_devices
from lowmem_dpo.model.language_model import LanguageModel, rope_limit
from lowmem_dpo.model.scoring import other_attention
from lowmem_dpo.settings.groups import SamplingSettings


@torch.no_grad()
def generate_text(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    sampling: SamplingSettings,
    *,
    stream: bool = False,
) -> list[str]:
    """Answer prompts together, left-padded.

    Args:
        model: The model.
        tokenizer: For decoding.
        prompts: Token ids.
        sampling: Settings.
        stream: Print the text of a single prompt as it comes.

    Returns:
        The answers, without special tokens.

    Raises:
        ValueError: If a prompt does not fit the model.
    """
    check_prompts(prompts, model.config, sampling)
    device = model.device
    width = max(len(ids) for ids in prompts)
    stop = stop_ids(model, tokenizer)
    input_ids = torch.full((len(prompts), width), stop[0] if stop else 0)
    mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(prompts):
        input_ids[row, width - len(ids) :] = torch.tensor(ids)
        mask[row, width - len(ids) :] = 1
    greedy = sampling.temperature == 0
    settings = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=not greedy,
        eos_token_id=stop or None,
        pad_token_id=stop[0] if stop else 0,
        **({} if greedy else {"temperature": sampling.temperature, "top_p": sampling.top_p}),
        **({} if greedy else {"top_k": sampling.top_k}),
    )
    streamer = (
        TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
    )
    with (
        other_attention(model, model.family.plain_attention),
        torch.random.fork_rng(cuda_devices(device)),
    ):
        torch.manual_seed(sampling.seed)
        network: Any = model.network
        output = network.generate(
            input_ids.to(device),
            attention_mask=mask.to(device),
            generation_config=settings,
            streamer=streamer,
        )
    return tokenizer.batch_decode(output[:, width:].cpu(), skip_special_tokens=True)


def check_prompts(
    prompts: list[list[int]], config: PretrainedConfig, sampling: SamplingSettings
) -> None:
    """Refuse prompts that a model cannot answer.

    Args:
        prompts: Token ids.
        config: Of the model.
        sampling: For the longest answer.

    Raises:
        ValueError: If a prompt is empty, has a token that the model lacks, or is too long for the
            model's position encoding together with its answer.
    """
    if not prompts or not all(prompts):
        raise ValueError("a prompt has no tokens; give it some text")
    top = max(map(max, prompts))
    if top >= config.vocab_size:
        raise ValueError(
            f"a prompt has token {top}, but the model's vocabulary has {config.vocab_size}; "
            "use the tokenizer that belongs to the model"
        )
    limit = rope_limit(config)
    length = max(map(len, prompts)) + sampling.max_new_tokens
    if limit is not None and length > limit:
        raise ValueError(
            f"the model's position encoding changes beyond {limit} tokens, and is supported up to "
            f"that length only; prompt and max_new_tokens make {length}, shorten one"
        )


def position_warning(
    prompts: list[list[int]], config: PretrainedConfig, sampling: SamplingSettings
) -> str:
    """A line for the user where answers may pass the positions of a model; else empty."""
    length = max(map(len, prompts)) + sampling.max_new_tokens
    if length <= config.max_position_embeddings:
        return ""
    return (
        f"prompt and max_new_tokens make {length} tokens, the model was made for "
        f"{config.max_position_embeddings}; shorten one"
    )


def stop_ids(model: LanguageModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer: the tokenizer's EOS and those of both of the model's configs."""
    found = [tokenizer.eos_token_id]
    for config in (model.config, model.network.generation_config):
        ids = getattr(config, "eos_token_id", None)
        found += ids if isinstance(ids, list) else [ids]
    return list(dict.fromkeys(i for i in found if i is not None))

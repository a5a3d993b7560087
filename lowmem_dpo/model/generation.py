"""Text from the policy: transformers' sampling and cache over our layers.

A prompt alone has our attention, which is quadratic in its length for no family. Prompts of several
lengths are padded, and have the plain attention of transformers.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    TextStreamer,
)
from transformers.cache_utils import DynamicLayer

from lowmem_dpo.machine.device import cuda_devices
from lowmem_dpo.model.attention import SEQUENCE_ATTENTION
from lowmem_dpo.model.language_model import LanguageModel, head_sizes, rope_limit
from lowmem_dpo.model.scoring import other_attention
from lowmem_dpo.settings.groups import SamplingSettings


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
    streamer = (
        TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
    )
    with torch.random.fork_rng(cuda_devices(device)):
        torch.manual_seed(sampling.seed)
        input_ids, mask = input_ids.to(device), mask.to(device)
        cache = answer_cache(model, len(prompts), width + sampling.max_new_tokens)
        output = continue_ids(model, input_ids, mask, cache, sampling, stop, streamer)
    return tokenizer.batch_decode(output[:, width:].cpu(), skip_special_tokens=True)


def continue_ids(
    model: LanguageModel,
    input_ids: Tensor,
    mask: Tensor,
    cache: DynamicCache,
    sampling: SamplingSettings,
    stop: list[int],
    streamer: TextStreamer | None = None,
) -> Tensor:
    """Prompts and their answers, [S, prompt and answer]; the head computes the last position alone.

    Args:
        model: The model.
        input_ids: [S, N], left-padded.
        mask: [S, N], 0 for padding.
        cache: Keys and values of the first tokens, or of none.
        sampling: Settings.
        stop: Tokens that end an answer.
        streamer: Gets the tokens as they come.
    """
    greedy = sampling.temperature == 0
    settings = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=not greedy,
        eos_token_id=stop or None,
        pad_token_id=stop[0] if stop else 0,
        **({} if greedy else {"temperature": sampling.temperature, "top_p": sampling.top_p}),
        **({} if greedy else {"top_k": sampling.top_k}),
    )
    network: Any = model.network
    attention = SEQUENCE_ATTENTION if len(input_ids) == 1 else model.family.plain_attention
    with torch.no_grad(), other_attention(model, attention):
        return network.generate(
            input_ids,
            attention_mask=mask,
            generation_config=settings,
            streamer=streamer,
            past_key_values=cache,
        )


def answer_cache(model: LanguageModel, num_prompts: int, num_tokens: int) -> DynamicCache:
    """An empty cache of keys and values, whose memory does not grow.

    Args:
        model: The model.
        num_prompts: That are answered together.
        num_tokens: Of the longest prompt and its answer.
    """
    cache, sizes = DynamicCache(config=model.config), head_sizes(model.config)
    layers: list[Any] = cache.layers
    with_all = [i for i, layer in enumerate(layers) if not layer.is_sliding]
    shape = len(with_all), 2, num_prompts, sizes.num_key_heads, num_tokens, sizes.head_size
    # In one piece: a piece a layer would leave gaps between what else comes and goes.
    memory = torch.empty(shape, dtype=model.dtype, device=model.device)
    for i, (keys, values) in zip(with_all, memory, strict=True):
        layers[i] = _LayerCache(keys, values)
    return cache


class _LayerCache(DynamicLayer):
    """Keys and values of a layer, written into memory that is there.

    transformers' own takes new memory for all tokens at each token; what that leaves is too small
    for the next ones, so that a card ends up holding up to twice as much.

    Args:
        all_keys: [S, K, N, E], with room for all tokens.
        all_values: [S, K, N, E].
    """

    def __init__(self, all_keys: Tensor, all_values: Tensor) -> None:
        super().__init__()
        self.all_keys, self.all_values = all_keys, all_values

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add those of [S, K, N, E], and give all."""
        start = self.get_seq_length()
        stop = start + key_states.shape[2]
        self.all_keys[:, :, start:stop] = key_states
        self.all_values[:, :, start:stop] = value_states
        self.keys, self.values = self.all_keys[:, :, :stop], self.all_values[:, :, :stop]
        self.is_initialized = True
        return self.keys, self.values


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

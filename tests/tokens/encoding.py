"""Encode one pair, take it apart again, and have TRL do the same."""

import pytest

from lowmem_dpo.data.formats import Preference
from lowmem_dpo.settings.groups import EncodingSettings
from lowmem_dpo.tokens.encoding import encode_pairs

AUTO = EncodingSettings()
CHATML_PROMPT = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
LLAMA3_PROMPT = (
    "<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)


def turn(role, content):
    return {"role": role, "content": content}


def chat(chosen="yes", rejected="no", prompt="hi", row=1, system=None):
    messages = [turn("system", system)] if system else []
    messages.append(turn("user", prompt))
    return Preference(messages, [turn("assistant", chosen)], [turn("assistant", rejected)], row)


def encode_one(preference, tokenizer, settings=AUTO):
    pairs, report = encode_pairs([preference], tokenizer, settings)
    assert len(pairs) == 1
    return pairs[0], report


def sides(pair, tokenizer):
    """(prompt, completion) text of chosen, then of rejected."""
    for ids, start in (
        (pair.chosen_ids, pair.chosen_start),
        (pair.rejected_ids, pair.rejected_start),
    ):
        yield tokenizer.decode(ids[:start]), tokenizer.decode(ids[start:])


def trl_pairs(rows, tokenizer):
    """What TRL's own DPO trainer makes of rows: prompt, chosen and rejected ids."""
    import datasets

    dpo_trainer = pytest.importorskip("trl.trainer.dpo_trainer")
    trainer = object.__new__(dpo_trainer.DPOTrainer)
    trainer._tokenizer = tokenizer
    args = dpo_trainer.DPOConfig(max_length=None, use_cpu=True, bf16=False)
    dataset = datasets.Dataset.from_list(rows)
    prepared = trainer._prepare_dataset(dataset, tokenizer, args, "train")
    return [(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in prepared]


def ours(preferences, tokenizer):
    pairs, _ = encode_pairs(preferences, tokenizer, AUTO)
    for pair in pairs:
        assert pair.chosen_start == pair.rejected_start
        start = pair.chosen_start
        yield (
            list(pair.chosen_ids[:start]),
            list(pair.chosen_ids[start:]),
            list(pair.rejected_ids[start:]),
        )

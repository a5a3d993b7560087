"""The pairs of a run: read, in tokens, split, as trees; and what was done, said."""

import hashlib
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from lowmem_dpo.console import console, say, warn
from lowmem_dpo.data.encoding import TokenPair, encode_pairs, preview_pair
from lowmem_dpo.data.reading import is_single_file, read_preferences
from lowmem_dpo.data.split import prompt_key, split_by_prompt
from lowmem_dpo.packs.trees import Tree, build_tree
from lowmem_dpo.settings.groups import DataSettings, EncodingSettings


@dataclass(frozen=True)
class Pairs:
    """The run's data as token trees.

    Attributes:
        train: To train on.
        evaluation: Held out; empty for a run that does not evaluate.
        digest: Of the token ids and scored positions of both, in order.
        facts: What reading and encoding found, for run.json.
    """

    train: list[Tree]
    evaluation: list[Tree]
    digest: str
    facts: dict[str, Any]

    @property
    def all(self) -> list[Tree]:
        """Those to train on, then those held out."""
        return self.train + self.evaluation


def load_pairs(
    data: DataSettings,
    encoding: EncodingSettings,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
) -> Pairs:
    """Read, tokenise and split the preference pairs, and say what was done.

    Args:
        data: Where they are; `data.data` is given.
        encoding: How text becomes tokens.
        tokenizer: The model's.
        seed: Of the held-out split.

    Raises:
        ValueError: If a source or a row cannot be read.
    """
    assert data.data is not None
    sources = [source for source in (data.data, data.eval_data) if source]
    if data.dataset_config is not None and all(map(is_single_file, sources)):
        raise ValueError(
            f"dataset_config={data.dataset_config} has no effect on the file {data.data}; "
            "leave it out"
        )
    pairs, facts = _encode(data, encoding, tokenizer, data.data, "train")
    evaluation: list[TokenPair] = []
    if data.eval_data:
        evaluation, facts["eval"] = _encode(data, encoding, tokenizer, data.eval_data, "test")
        shared = {prompt_key(p) for p in pairs} & {prompt_key(p) for p in evaluation}
        if shared:
            warn(f"{len(shared)} prompts of eval_data are in the training data too")
    elif data.eval_fraction:
        pairs, evaluation = split_by_prompt(pairs, data.eval_fraction, seed)
        say(f"eval: {len(evaluation)} pairs held out by prompt, {len(pairs)} to train on")
    say(preview_pair(pairs[0], tokenizer, encoding=console.encoding))
    train = [build_tree(pair) for pair in pairs]
    held_out = [build_tree(pair) for pair in evaluation]
    keys = "".join(tree.digest for tree in train) + "/" + "".join(t.digest for t in held_out)
    return Pairs(train, held_out, hashlib.sha256(keys.encode()).hexdigest(), facts)


def _encode(
    data: DataSettings,
    encoding: EncodingSettings,
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    purpose: str,
) -> tuple[list[TokenPair], dict[str, Any]]:
    """The pairs of one source in token ids, and what is noted of them."""
    title = "data" if purpose == "train" else "eval data"
    preferences, found = read_preferences(
        source,
        dataset_config=None if is_single_file(source) else data.dataset_config,
        split=data.dataset_train_split if purpose == "train" else data.dataset_test_split,
        purpose=purpose,
        columns=data.columns,
        on_bad_row=encoding.on_bad_row,
    )
    for i, line in enumerate(found.lines()):
        say(f"{title}: {line}" if i else f"{title}: {source}: {line}")
    pairs, report = encode_pairs(preferences, tokenizer, encoding)
    for line in report.lines():
        say(f"{title}: {line}")
    return pairs, {"path": source, **vars(found), **vars(report)}


def check_token_ids(pairs: Pairs, config: PretrainedConfig) -> None:
    """Hold every token id against the embedding, and every length against the positions.

    Raises:
        ValueError: Naming the row whose token the model does not have.
    """
    vocabulary, positions = config.vocab_size, config.max_position_embeddings
    longest = 0
    for tree in pairs.all:
        ids = (*tree.trunk, *tree.chosen, *tree.rejected)
        if max(ids) >= vocabulary:
            raise ValueError(
                f"row {tree.row} holds token {max(ids)}, but the model's embedding has "
                f"{vocabulary} rows: the tokenizer does not belong to this model"
            )
        longest = max(longest, len(tree.trunk) + max(len(tree.chosen), len(tree.rejected)))
    if longest > positions:
        warn(
            f"the longest sequence has {longest} tokens, the model was made for {positions}; "
            f"set max_length {positions}"
        )

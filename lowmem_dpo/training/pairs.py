"""The run's pairs: read and tokenised or taken from the cache, and split. What was done is said."""

import hashlib
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PretrainedConfig

from lowmem_dpo.console import console, say, size, warn
from lowmem_dpo.data.reading import ReadReport, is_single_file, open_source, read_preferences
from lowmem_dpo.records.folder import text_versions
from lowmem_dpo.settings.groups import DataSettings, EncodingSettings
from lowmem_dpo.tokens.cache import code_digest, entry_path, read_entry, write_entry
from lowmem_dpo.tokens.encoding import encode_pairs
from lowmem_dpo.tokens.report import EncodeReport, preview_pair
from lowmem_dpo.tokens.split import split_by_prompt
from lowmem_dpo.tokens.templates import ChatTemplate
from lowmem_dpo.tokens.trees import Tree

# Fewer are encoded in a second or two, smaller files read in one.
CACHED_FROM_PAIRS = 2000
SAID_FROM_BYTES = 2**26


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


def load_pairs(
    data: DataSettings,
    encoding: EncodingSettings,
    template: ChatTemplate,
    cache_dir: Path,
    *,
    seed: int,
) -> Pairs:
    """Read, tokenise and split the preference pairs, and say what was done.

    Args:
        data: Where they are; `data.data` is given.
        encoding: How text becomes tokens.
        template: Chosen by `encoding`, with the model's tokenizer.
        cache_dir: The cache folder, for pairs that took long to encode.
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
    train, facts = _encode(data, encoding, template, cache_dir, data.data, "train")
    held_out: list[Tree] = []
    if data.eval_data:
        held_out, facts["eval"] = _encode(
            data, encoding, template, cache_dir, data.eval_data, "test"
        )
        shared = {tree.prompt_key for tree in train} & {tree.prompt_key for tree in held_out}
        if shared:
            warn(f"{len(shared)} prompts of eval_data are in the training data too")
    elif data.eval_fraction:
        train, held_out = split_by_prompt(train, data.eval_fraction, seed)
        say(f"eval: {len(held_out)} pairs held out by prompt, {len(train)} to train on")
    say(preview_pair(train[0], template.tokenizer, encoding=console.encoding))
    digest = hashlib.sha256()
    for part in (*(tree.digest for tree in train), "/", *(tree.digest for tree in held_out)):
        digest.update(part.encode())
    return Pairs(train, held_out, digest.hexdigest(), facts)


def _encode(
    data: DataSettings,
    encoding: EncodingSettings,
    template: ChatTemplate,
    cache_dir: Path,
    name: str,
    purpose: str,
) -> tuple[list[Tree], dict[str, Any]]:
    """The pairs of one source in token ids, and what is noted of them."""
    title = "data" if purpose == "train" else "eval data"
    source = open_source(
        name,
        dataset_config=None if is_single_file(name) else data.dataset_config,
        split=data.dataset_train_split if purpose == "train" else data.dataset_test_split,
        purpose=purpose,
    )
    entry = None
    if digest := source.digest():
        what: dict[str, Any] = {f.name: getattr(encoding, f.name) for f in fields(EncodingSettings)}
        what |= {"columns": data.columns, "max_samples": data.max_samples, "source": digest}
        what |= {"template": [template.sources, template.date], "versions": text_versions()}
        if encoding.on_bad_row == "skip":  # the reports name files
            what["names"] = [name, str(source.files)]
        entry = entry_path(cache_dir, template.tokenizer, what)
    if entry and (kept := read_entry(entry)):
        trees, reports = kept
        found, report = ReadReport(**reports["found"]), EncodeReport(**reports["encoded"])
        report.num_dropped = Counter(report.num_dropped)
        _say_found(found, data, name, title)
        say(f"{title}: encoded before, taken from {entry}")
    else:
        if (num_bytes := source.num_bytes()) >= SAID_FROM_BYTES:
            say(f"{title}: reading {name}, {size(num_bytes)}")
        preferences, found = read_preferences(
            source,
            columns=data.columns,
            on_bad_row=encoding.on_bad_row,
            max_rows=data.max_samples,
        )
        _say_found(found, data, name, title)
        trees, report = encode_pairs(preferences, template.tokenizer, encoding)
        takes_long = len(preferences) >= CACHED_FROM_PAIRS
        if entry and takes_long:
            try:
                reports = {"found": vars(found), "encoded": vars(report)}
                reports |= {"source": str(Path(name).absolute() if Path(name).exists() else name)}
                if source.digest() == digest:
                    write_entry(entry, trees, reports | {"code": code_digest()})
                else:
                    warn(f"{name} changed while it was read; its encoded pairs are not kept")
            except OSError as error:
                warn(f"cannot keep the encoded pairs in {entry.parent}: {error.strerror}")
    for line in report.lines():
        say(f"{title}: {line}")
    return trees, {"path": name, **vars(found), **vars(report)}


def _say_found(found: ReadReport, data: DataSettings, name: str, title: str) -> None:
    """What reading a source found, in lines."""
    for i, line in enumerate(found.lines()):
        say(f"{title}: {line}" if i else f"{title}: {name}: {line}")
    if found.num_rows == data.max_samples:
        say(f"{title}: max_samples {data.max_samples}: any further rows are left out")


def check_token_ids(pairs: Pairs, config: PretrainedConfig) -> None:
    """Hold every token id against the embedding, and every length against the positions.

    Raises:
        ValueError: Naming the row whose token the model does not have.
    """
    vocabulary, longest = config.vocab_size, 0
    for tree in (*pairs.train, *pairs.evaluation):
        largest = int(np.frombuffer(tree.ids, dtype=np.int32).max())
        if largest >= vocabulary:
            raise ValueError(
                f"row {tree.row} holds token {largest}, but the model's embedding has "
                f"{vocabulary} rows: the tokenizer does not belong to this model"
            )
        longest = max(longest, tree.trunk_len + max(tree.chosen_len, tree.rejected_len))
    positions = config.max_position_embeddings
    if longest > positions:
        warn(
            f"the longest sequence has {longest} tokens, the model was made for {positions}; "
            f"set max_length {positions}"
        )

"""From settings to all that a run needs: the policy, pairs as trees, the plan, the reference."""

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from lowmem_dpo.console import console, say, warn
from lowmem_dpo.data.encoding import TokenPair, encode_pairs
from lowmem_dpo.data.preview import preview_pair
from lowmem_dpo.data.reading import is_single_file, read_preferences
from lowmem_dpo.data.split import prompt_key, split_by_prompt
from lowmem_dpo.losses.checks import unusual_values
from lowmem_dpo.losses.objective import Objective
from lowmem_dpo.losses.types import couples_pairs, needs_reference
from lowmem_dpo.model.lora import lora_parameters
from lowmem_dpo.model.scoring import score
from lowmem_dpo.model.selfcheck import check_packing, logp_tolerance
from lowmem_dpo.packs.packing import choose_pack_tokens, pack_trees, round_up_tokens
from lowmem_dpo.packs.trees import Tree, build_tree
from lowmem_dpo.reference.cache import ReferenceCache
from lowmem_dpo.reference.fill import Reference, prepare_reference
from lowmem_dpo.settings.configs import TrainConfig
from lowmem_dpo.stopping import RunStopped
from lowmem_dpo.training.forecast import check_cpu_time
from lowmem_dpo.training.policy import (
    Policy,
    cache_directory,
    load_policy,
    read_source,
)
from lowmem_dpo.weights.storage import storage_table

# Activations of one layer at this size fit small cards; larger micro-batches gain little.
PACK_TOKENS_LIMIT = 4096


@dataclass
class Pairs:
    """The run's data as token trees."""

    train: list[Tree]
    evaluation: list[Tree]
    digest: str
    facts: dict[str, Any]


def load_pairs(config: TrainConfig, data: str, tokenizer: PreTrainedTokenizerBase) -> Pairs:
    """Read, tokenise and split the preference pairs, and say what was done."""
    sources = [source for source in (data, config.eval_data) if source]
    if config.dataset_config is not None and all(map(is_single_file, sources)):
        raise ValueError(
            f"dataset_config={config.dataset_config} has no effect on the file {data}; leave it out"
        )
    pairs, facts = _encode(config, data, tokenizer, "data")
    evaluation: list[TokenPair] = []
    if config.eval_data:
        evaluation, facts["eval"] = _encode(config, config.eval_data, tokenizer, "eval data")
        shared = {prompt_key(p) for p in pairs} & {prompt_key(p) for p in evaluation}
        if shared:
            warn(f"{len(shared)} prompts of eval_data are in the training data too")
    elif config.eval_fraction:
        pairs, evaluation = split_by_prompt(pairs, config.eval_fraction, config.seed)
        say(f"eval: {len(evaluation)} pairs held out by prompt, {len(pairs)} to train on")
    say(preview_pair(pairs[0], tokenizer, encoding=console.encoding))
    train = [build_tree(pair) for pair in pairs]
    held_out = [build_tree(pair) for pair in evaluation]
    keys = "".join(tree.digest() for tree in train) + "/" + "".join(t.digest() for t in held_out)
    return Pairs(train, held_out, hashlib.sha256(keys.encode()).hexdigest(), facts)


def _encode(
    config: TrainConfig, source: str, tokenizer: PreTrainedTokenizerBase, title: str
) -> tuple[list[TokenPair], dict[str, Any]]:
    """The pairs of one source in token ids, and what is noted of them."""
    is_training = title == "data"
    preferences, found = read_preferences(
        source,
        dataset_config=None if is_single_file(source) else config.dataset_config,
        split=config.dataset_train_split if is_training else config.dataset_test_split,
        purpose="train" if is_training else "test",
        columns=config.columns,
        on_bad_row=config.on_bad_row,
    )
    for i, line in enumerate(found.lines()):
        say(f"{title}: {line}" if i else f"{title}: {source}: {line}")
    pairs, report = encode_pairs(preferences, tokenizer, config)
    for line in report.lines():
        say(f"{title}: {line}")
    return pairs, {"path": source, **vars(found), **vars(report)}


def self_check(policy: Policy, trees: Sequence[Tree]) -> float:
    """Compare two packed real trees with four plain sequences; see `model.selfcheck`."""
    branching = [t for t in trees if t.trunk and t.chosen and t.rejected] or list(trees)
    by_length = sorted(branching, key=lambda tree: tree.num_tokens)
    two = [by_length[0], by_length[-1]]  # faults that grow with position show in the longest
    pack = pack_trees(two, round_up_tokens(sum(tree.num_tokens for tree in two)))[0]
    sequences = [ids for t in pack.trees for ids in (t.trunk + t.chosen, t.trunk + t.rejected)]
    try:
        difference = check_packing(policy.model, pack, sequences, policy.model.dtype)
    except ValueError as error:
        raise RunStopped(str(error)) from None
    say(f"self-check: packed trees equal plain sequences within {difference:.1e} nat per token")
    return difference


def plan_pack_tokens(
    config: TrainConfig, policy: Policy, pairs: Pairs, cache: ReferenceCache
) -> int:
    """Tokens per micro-batch: as set, else as the cached reference was scored, else by the lengths.

    Raises:
        ValueError: If the longest pair does not fit.
    """
    trees = pairs.train + pairs.evaluation
    longest = max(tree.num_tokens for tree in trees)
    if config.pack_tokens is not None:
        if config.pack_tokens < longest:
            raise ValueError(
                f"pack_tokens {config.pack_tokens} is less than the longest pair ({longest} "
                "tokens); raise it, leave it out, or lower max_length"
            )
        return config.pack_tokens
    cached = cache.pack_tokens([tree.digest() for tree in trees], policy.fingerprint(0))
    if cached is not None and cached >= longest:
        return cached
    limit = max(PACK_TOKENS_LIMIT, round_up_tokens(longest))
    return choose_pack_tokens(trees, config.batch_size, limit=limit, seed=config.seed)


@dataclass
class Run:
    """Everything the training loop works on.

    Attributes:
        config: The settings.
        policy: The model.
        pairs: The data.
        pack_tokens: Tokens per micro-batch.
        self_check_rms: Packed trees against plain sequences, nat rms per token.
        reference: Log-probs of the policy at the start; None in a reference-free run.
        step_zero: What the check of the first step found.
    """

    config: TrainConfig
    policy: Policy
    pairs: Pairs
    pack_tokens: int
    self_check_rms: float
    objective: Objective
    reference: Reference | None = None
    step_zero: dict[str, Any] | None = None


def prepare_run(
    config: TrainConfig,
    data: str,
    *,
    resumed: Mapping[str, Any] | None = None,
    before_weights: Callable[[Pairs], None] = lambda pairs: None,
    only_reference: bool = False,
) -> Run:
    """Everything up to the first step: the pairs, the policy, the checks, the reference.

    Args:
        config: The settings.
        data: The file of pairs.
        resumed: The `resume_facts` of the checkpoint that the run goes on from.
        before_weights: Called when the pairs are known and nothing large was read yet.
        only_reference: Whether nothing will be trained.
    """
    set_seeds(config.seed)
    source = read_source(config)
    pairs = load_pairs(config, data, source.tokenizer)
    check_token_ids(pairs, source.model_config)
    before_weights(pairs)
    check_cpu_time(config, source, pairs.train, pairs.evaluation, only_reference=only_reference)
    say(
        f"model: {source.base}, {source.model_config.model_type}, computing in "
        f"{str(source.dtype).removeprefix('torch.')} on {source.device}"
    )
    policy = load_policy(config, source)
    say(storage_table(policy.model.storage))
    run = Run(config, policy, pairs, 0, self_check(policy, pairs.train), Objective.of(config))
    cache = ReferenceCache(cache_directory(config.cache_dir), policy.identity)
    if resumed is None:
        run.pack_tokens = plan_pack_tokens(config, policy, pairs, cache)
    else:  # under another micro-batch size log-probs would differ in the last bits
        run.pack_tokens = resumed["planned_pack_tokens"]
    num_trainable = sum(p.numel() for p in lora_parameters(policy.model.network).values())
    say(f"adapter: rank {policy.adapter.rank}, {num_trainable / 1e6:.2f}M trainable parameters")
    say(f"plan: micro-batches of {run.pack_tokens} tokens, {config.batch_size} pairs a step")
    say_about_losses(config)
    if needs_reference(config):
        run.reference = score_reference(run, cache)
    return run


def say_about_losses(config: TrainConfig) -> None:
    """Say what is unusual about the losses of a run, and what they cost."""
    for line in unusual_values(config, config.learning_rate):
        warn(line)
    if config.reference_free:
        warn(
            "reference_free: no reference holds the policy near its start; training is less "
            "stable, and there is no check at step zero"
        )
    elif not needs_reference(config):
        say(f"loss {config.loss_type}: without a reference, so without a check at step zero")
    if couples_pairs(config):
        say(f"loss {config.loss_type}: compares the pairs of a step, one more forward pass a step")


def check_token_ids(pairs: Pairs, model_config: PretrainedConfig) -> None:
    """Hold every token id against the embedding, and every length against the positions.

    Raises:
        ValueError: Naming the row whose token the model does not have.
    """
    vocabulary, positions = model_config.vocab_size, model_config.max_position_embeddings
    longest = 0
    for tree in (*pairs.train, *pairs.evaluation):
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


@torch.no_grad()
def score_reference(run: Run, cache: ReferenceCache) -> Reference:
    """The log-probs of the policy as it stands, from the cache or scored now."""
    return prepare_reference(
        run.pairs.train + run.pairs.evaluation,
        lambda pack: score(run.policy.model, pack),
        cache,
        run.policy.fingerprint(run.pack_tokens),
        pack_tokens=run.pack_tokens,
        tolerance=logp_tolerance(run.policy.model.dtype),
        accept_other=run.config.reference == "accept",
        seed=run.config.seed,
    )


def set_seeds(seed: int) -> None:
    """Seed the global generators; the order of the data and the adapter's start have their own."""
    random.seed(seed)
    torch.manual_seed(seed)

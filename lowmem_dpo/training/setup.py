"""From settings to all that a run needs: the policy, pairs as trees, the plan, the reference."""

import dataclasses
import hashlib
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
import transformers
from transformers import PreTrainedTokenizerBase

import lowmem_dpo_kernels
from lowmem_dpo.config import TrainConfig
from lowmem_dpo.data.formats import read_preferences
from lowmem_dpo.data.packing import choose_pack_tokens, pack_trees
from lowmem_dpo.data.preview import preview_pair
from lowmem_dpo.data.split import prompt_ids, split_by_prompt
from lowmem_dpo.data.templates import TemplateSettings, TokenPair, encode_pairs
from lowmem_dpo.data.trees import Tree, build_tree
from lowmem_dpo.memory.limits import limit_memory
from lowmem_dpo.model.adapters import (
    AdapterSettings,
    adapter_digest,
    load_adapter,
    read_adapter_config,
)
from lowmem_dpo.model.attention import TREE_ATTENTION
from lowmem_dpo.model.device import resolve_device, resolve_dtype
from lowmem_dpo.model.loading import (
    LoadedModel,
    ModelParts,
    load_model,
    model_parts,
    storage_table,
)
from lowmem_dpo.model.lora import add_lora, lora_parameters
from lowmem_dpo.model.runner import wrap_layers
from lowmem_dpo.model.scoring import score
from lowmem_dpo.model.selfcheck import check_packing, logp_tolerance
from lowmem_dpo.model.source import load_config, load_tokenizer, resolve_source, tokenizer_source
from lowmem_dpo.reference import Fingerprint, ReferenceCache
from lowmem_dpo.training.console import console, say, warn
from lowmem_dpo.training.reference_pass import Reference, prepare_reference

# Activations of one layer at this size fit small cards; larger micro-batches gain little.
PACK_TOKENS_LIMIT = 4096

LORA_SHAPE = ("lora_r", "lora_alpha", "lora_target_modules", "use_rslora")


def cache_directory(setting: str | None) -> Path:
    """The folder of caches: the setting, else $LOWMEM_DPO_CACHE, else ~/.cache/lowmem_dpo."""
    return Path(
        setting or os.environ.get("LOWMEM_DPO_CACHE") or Path.home() / ".cache" / "lowmem_dpo"
    )


def template_settings(config: Any) -> TemplateSettings:
    """The part of a config that decides how text becomes tokens."""
    names = {f.name for f in dataclasses.fields(TemplateSettings)}
    return TemplateSettings(**{k: v for k, v in vars(config).items() if k in names})


@dataclass
class Policy:
    """The model that is trained.

    Attributes:
        loaded: The base with its adapter.
        parts: What scoring needs of it.
        tokenizer: Of the same source.
        adapter: Settings of the adapter.
        source: The base's folder or id.
        init_adapter: The adapter folder it starts from.
        device: Where it computes.
        dtype: In what it computes.
    """

    loaded: LoadedModel
    parts: ModelParts
    tokenizer: PreTrainedTokenizerBase
    adapter: AdapterSettings
    source: str
    init_adapter: str | None
    device: torch.device
    dtype: torch.dtype

    @property
    def identity(self) -> dict[str, Any]:
        """What the reference's numbers depend on, but the pair."""
        return {
            "base": self.loaded.identity,
            "init_adapter": adapter_digest(Path(self.init_adapter)) if self.init_adapter else None,
            "logit_scale": self.parts.logit_scale,
            "logit_softcap": self.parts.logit_softcap,
        }

    def fingerprint(self, pack_tokens: int) -> Fingerprint:
        """Everything else that can move the last bits of a log-prob."""
        on_cuda = self.device.type == "cuda"
        return {
            "device": torch.cuda.get_device_name(self.device) if on_cuda else _cpu_name(),
            "threads": None if on_cuda else torch.get_num_threads(),
            "dtype": str(self.dtype).removeprefix("torch."),
            "pack_tokens": pack_tokens,
            "head": lowmem_dpo_kernels.token_logps_path(self.device),
            "attention": TREE_ATTENTION,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "bitsandbytes": bitsandbytes.__version__,
        }


def _cpu_name() -> str:
    return f"cpu {torch.backends.cpu.get_cpu_capability()}"


def load_policy(config: TrainConfig) -> Policy:
    """Load tokenizer, base and adapter; every check that needs no weights comes first."""
    if config.model is None:
        raise ValueError("no model given; set --model to a folder or a Hugging Face id")
    source, init_adapter, note = resolve_source(config.model, config.init_adapter)
    if note:
        say(note)
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    if config.layer_inputs == "host" and device.type != "cuda":
        raise ValueError(f"layer_inputs host has no effect on {device.type}; leave it out")
    if config.memory_limit is not None:
        limit_memory(config.memory_limit, device)
    model_config = load_config(source, max_length=config.max_length)
    tokenizer = load_tokenizer(tokenizer_source(source, init_adapter))
    adapter = _adapter_settings(config, init_adapter)
    loaded = load_model(
        source,
        config=model_config,
        quantization=config.quantization,
        dtype=dtype,
        device=device,
        cache_dir=cache_directory(config.cache_dir),
    )
    add_lora(
        loaded.model,
        targets=adapter.targets,
        rank=adapter.rank,
        alpha=adapter.alpha,
        dropout=adapter.dropout,
        rank_stabilised=adapter.rank_stabilised,
        seed=config.seed,
    )
    if init_adapter:
        load_adapter(loaded.model, Path(init_adapter))
    parts = model_parts(loaded.model)
    wrap_layers(
        parts.layers,
        inputs_on_host=config.layer_inputs == "host",
        has_randomness=adapter.dropout > 0,
    )
    parts.backbone.set_attn_implementation(TREE_ATTENTION)
    return Policy(loaded, parts, tokenizer, adapter, source, init_adapter, device, dtype)


def _adapter_settings(config: TrainConfig, init_adapter: str | None) -> AdapterSettings:
    """The run's adapter: as the settings say, or as the starting adapter is."""
    wanted = AdapterSettings(
        rank=config.lora_r,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        targets=config.lora_target_modules,
        rank_stabilised=config.use_rslora,
    )
    if init_adapter is None:
        return wanted
    given = dataclasses.replace(
        read_adapter_config(Path(init_adapter)), dropout=config.lora_dropout
    )
    if given != wanted and any(getattr(config, n) != getattr(TrainConfig(), n) for n in LORA_SHAPE):
        warn(
            f"{', '.join(LORA_SHAPE)} have no effect: the run starts from {init_adapter}, which "
            f"has rank {given.rank}, alpha {given.alpha:g} and its own target modules"
        )
    return given


@dataclass
class Pairs:
    """The run's data as token trees."""

    train: list[Tree]
    evaluation: list[Tree]
    digest: str
    facts: dict[str, Any]


def load_pairs(config: TrainConfig, data: str, tokenizer: PreTrainedTokenizerBase) -> Pairs:
    """Read, tokenise and split the preference files, and say what was done."""
    pairs, facts = _encode(config, data, tokenizer, "data")
    evaluation: list[TokenPair] = []
    if config.eval_data:
        evaluation, facts["eval"] = _encode(config, config.eval_data, tokenizer, "eval data")
        shared = {prompt_ids(p) for p in pairs} & {prompt_ids(p) for p in evaluation}
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
    config: TrainConfig, path: str, tokenizer: PreTrainedTokenizerBase, title: str
) -> tuple[list[TokenPair], dict[str, Any]]:
    preferences, data_format = read_preferences(path)
    pairs, report = encode_pairs(preferences, tokenizer, template_settings(config))
    say(f"{title}: {path}: {len(preferences)} pairs, {data_format}")
    for line in report.lines():
        say(f"{title}: {line}")
    return pairs, {"path": path, "format": data_format, **vars(report)}


def self_check(policy: Policy, trees: Sequence[Tree]) -> float:
    """Compare two packed real trees with four plain sequences; see `model.selfcheck`."""
    branching = [t for t in trees if t.trunk and t.chosen and t.rejected] or list(trees)
    two = sorted(branching, key=lambda tree: tree.num_tokens)[:2]
    num_tokens = -(-sum(tree.num_tokens for tree in two) // 64) * 64
    pack = pack_trees(two, num_tokens)[0]
    sequences = [ids for t in pack.trees for ids in (t.trunk + t.chosen, t.trunk + t.rejected)]
    difference = check_packing(policy.parts, pack, sequences, policy.dtype)
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
    limit = max(PACK_TOKENS_LIMIT, -(-longest // 64) * 64)
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
    reference: Reference | None = None
    step_zero: dict[str, Any] | None = None


def prepare_run(config: TrainConfig, data: str) -> Run:
    """Everything up to the first step: the policy, the pairs, the checks, the reference."""
    set_seeds(config.seed)
    policy = load_policy(config)
    say(
        f"model: {policy.source}, {policy.loaded.model.config.model_type}, computing in "
        f"{str(policy.dtype).removeprefix('torch.')} on {policy.device}"
    )
    say(storage_table(policy.loaded.storage))
    pairs = load_pairs(config, data, policy.tokenizer)
    run = Run(config, policy, pairs, 0, self_check(policy, pairs.train))
    cache = ReferenceCache(cache_directory(config.cache_dir), policy.identity)
    run.pack_tokens = plan_pack_tokens(config, policy, pairs, cache)
    num_trainable = sum(p.numel() for p in lora_parameters(policy.loaded.model).values())
    say(f"adapter: rank {policy.adapter.rank}, {num_trainable / 1e6:.2f}M trainable parameters")
    say(f"plan: micro-batches of {run.pack_tokens} tokens, {config.batch_size} pairs a step")
    if config.reference_free:
        warn(
            "reference_free: no reference holds the policy near its start; training is less stable"
        )
        return run
    with torch.no_grad():
        run.reference = prepare_reference(
            pairs.train + pairs.evaluation,
            lambda pack: score(policy.parts, pack),
            cache,
            policy.fingerprint(run.pack_tokens),
            pack_tokens=run.pack_tokens,
            tolerance=logp_tolerance(policy.dtype),
            accept_other=config.reference == "accept",
            seed=config.seed,
        )
    return run


def set_seeds(seed: int) -> None:
    """Seed the global generators; the order of the data and the adapter's start have their own."""
    random.seed(seed)
    torch.manual_seed(seed)

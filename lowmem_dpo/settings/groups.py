"""Settings by what they are about: one frozen dataclass a group, one docstring a field.

A verb's config inherits the groups that it needs (`configs`), so a setting is declared once, and
its flag, YAML key, help text and line in the docs come from its field. Whoever works on a subject
takes its group, never a whole config. A group that exists is valid: a field's bounds stand beside
it (`fields.Bounds`), a group's `check` holds its combinations, and both say how to mend what is
wrong. Whether a file exists or a card is there is no matter of settings and is checked where it is
used.
"""

import re
from dataclasses import dataclass, field
from datetime import date
from typing import Any, Literal

from lowmem_dpo.losses.types import check_loss_settings
from lowmem_dpo.settings.fields import (
    COUNT,
    COUNT_OR_NONE,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    Bounds,
    Settings,
    check_unused,
)

TRACKERS = ("tensorboard", "wandb", "trackio")
KERNELS = ("head", "attention", "norms", "nf4", "mlp")


@dataclass(frozen=True)
class SeedSettings(Settings):
    """Randomness."""

    # Within what torch takes.
    seed: int = field(
        default=42, metadata={"must be in [0, 2**63)": Bounds(at_least=0, below=2**63)}
    )
    """Seeds whatever is drawn: the adapter's start, order of the data, dropout, split, answers."""


@dataclass(frozen=True)
class OutputSettings(Settings):
    """Where results go."""

    output_dir: str = "outputs/dpo"
    """Folder that receives the run."""


@dataclass(frozen=True)
class ModelSettings(Settings):
    """The model and where it computes."""

    model: str | None = None
    """A folder or Hugging Face id of a causal language model, or the folder of a PEFT adapter."""
    quantization: Literal["nf4", "none"] = "nf4"
    """Storage of the base's linear layers: nf4 (4 bits, double quantisation) or none (in dtype)."""
    head_quantization: Literal["none", "int8"] = "none"
    """Storage of the output head: none (in dtype), or int8, which makes it another model."""
    quantized_copy: bool = True
    """Keep the quantised base in cache_dir, so that the next start does not quantise again."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Compute type. auto: bfloat16 where the card has it, else float16; on a CPU as measured."""
    device: str = "auto"
    """auto (the CUDA card; the CPU only where there is none), cpu, cuda or cuda:N."""
    kernels: str | list[str] = "auto"
    """Triton kernels a card may run: auto (all), off, or of head, attention, norms, nf4, mlp."""
    cache_dir: str | None = None
    """Folder of caches (reference, quantised base); $LOWMEM_DPO_CACHE or ~/.cache/lowmem_dpo."""

    @property
    def allowed_kernels(self) -> set[str]:
        """`kernels` as names; empty for off."""
        return set(KERNELS) if self.kernels == "auto" else set(self.kernels) - {"off"}

    def check(self) -> None:
        """Refuse what would have no effect, and kernels that are not there."""
        if self.quantization == "none":
            check_unused(self, "quantization", "quantized_copy")
        names = ["auto"] if self.kernels == "auto" else self.kernels
        if names not in (["auto"], ["off"]) and not set(names) <= set(KERNELS):
            raise ValueError(
                f"kernels must be auto, off, or of {', '.join(KERNELS)}, got {self.kernels}"
            )


@dataclass(frozen=True)
class TemplateSettings(Settings):
    """The chat template."""

    chat_template: str = "auto"
    """auto (the tokenizer's own), the name of one of its own, none, or a Jinja file."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables for the chat template, such as {enable_thinking: false} for Qwen3."""
    system_prompt: str | None = None
    """System message for conversations that have none."""
    template_date: str | None = None
    """Date such as 2026-11-25 for templates that write today's; by default the run's first day."""
    rendered: Literal["auto", "yes", "no"] = "auto"
    """Whether text prompts went through a template already; auto: as most of a file look."""

    def check(self) -> None:
        """Refuse what is no date, and what would have no effect."""
        if self.chat_template == "none":
            unread = ("rendered", "system_prompt", "chat_template_kwargs", "template_date")
            check_unused(self, "chat_template", *unread)
        if self.template_date is not None:
            try:
                date.fromisoformat(self.template_date)
            except ValueError:
                raise ValueError(
                    f"template_date must be a date such as 2026-11-25, got {self.template_date!r}"
                ) from None


@dataclass(frozen=True)
class EncodingSettings(TemplateSettings):
    """From rows to tokens."""

    max_length: int = field(default=1024, metadata=COUNT)
    """Longest sequence (prompt and completion) in tokens; completions are cut from the right."""
    truncate_prompt: bool = False
    """Cut prompts from the left first, down to half of max_length, where a pair is too long."""
    on_bad_row: Literal["error", "skip"] = "error"
    """A row that cannot be read stops the run (error), or is left out and counted (skip)."""
    keep_reasoning: Literal["auto", "yes", "no"] = "auto"
    """Keep reasoning in answers that the template drops; auto: where the prompt opens a thought."""


@dataclass(frozen=True)
class DataSettings(Settings):
    """The pairs."""

    data: str | None = None
    """Pairs to train on: a .jsonl, .json, .csv, .tsv or .parquet file, a folder or a dataset id."""
    eval_data: str | None = None
    """Pairs to evaluate on, from a source of the same kinds."""
    eval_fraction: float = field(default=0.0, metadata=SHARE)
    """Share of the pairs, by whole prompts, held out for evaluation when there is no eval_data."""
    dataset_config: str | None = None
    """Configuration of a dataset that has several."""
    dataset_train_split: str | None = None
    """Split of a dataset or folder to train on; by default train, or the only one."""
    dataset_test_split: str | None = None
    """Split of eval_data to evaluate on; by default test, or the only one."""
    columns: dict[str, str] = field(default_factory=dict)
    """Our names of columns to the file's, such as {prompt: question, chosen: answers.0.text}."""
    max_samples: int | None = field(default=None, metadata=COUNT_OR_NONE)
    """Read this many rows of data, and of eval_data, the first; by default all."""

    def check(self) -> None:
        """Refuse two sources of evaluation, a split of nothing, and columns named wrongly."""
        if self.eval_data and self.eval_fraction:
            raise ValueError("eval_data and eval_fraction are both given; leave one out")
        if self.dataset_test_split and not self.eval_data:
            raise ValueError(
                f"dataset_test_split={self.dataset_test_split} has no effect without eval_data; "
                "name the dataset there too"
            )
        for ours, name in self.columns.items():
            if not isinstance(name, str):
                raise ValueError(
                    f"columns: {ours} must be the name of a column in the file, got "
                    f"{'nothing' if name is None else name}; write "
                    "'{prompt: question}', a blank after the colon, and \"1\" for a name in digits"
                )
        if len(set(self.columns.values())) < len(self.columns):
            raise ValueError("columns names a column of the file twice; give each of ours its own")


@dataclass(frozen=True)
class LossSettings(Settings):
    """The loss."""

    beta: float = field(default=0.1, metadata=POSITIVE)
    """Weight of the KL term: small lets the policy move far from the reference, large holds it."""
    loss_type: str | list[str] = "sigmoid"
    """Loss, such as sigmoid (DPO), or several: [sigmoid, bco_pair, sft]; see docs/losses.md."""
    loss_weights: list[float] | None = None
    """Weights of several losses, such as [0.8, 0.2, 1.0] (MPO); by default 1 each."""
    rpo_alpha: float = field(default=0.0, metadata=NOT_NEGATIVE)
    """Weight of the chosen answers' negative log-likelihood beside a loss (RPO)."""
    label_smoothing: float = field(
        default=0.0, metadata={"must be in [0, 0.5)": Bounds(at_least=0, below=0.5)}
    )
    """Probability that a label is flipped, in [0, 0.5): sigmoid (cDPO), robust, exo_pair, ..."""
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = (
        "reverse_kl"
    )
    """Distance that holds the policy near the reference (f-DPO); reverse_kl is DPO's."""
    f_alpha_divergence_coef: float = field(
        default=0.5, metadata={"must be in [0, 2]": Bounds(at_least=0, at_most=2)}
    )
    """Order of alpha_divergence, in [0, 2]: 0 is forward KL, towards 1 reverse KL."""
    ld_alpha: float | None = field(
        default=None, metadata={"must be in [0, 1]": Bounds(at_least=0, at_most=1)}
    )
    """Weight in [0, 1] of tokens beyond the shorter answer's length (LD-DPO); by default 1."""
    discopop_tau: float = field(default=0.05, metadata=POSITIVE)
    """Temperature of discopop's mixture."""
    simpo_gamma: float = field(default=0.5, metadata=NOT_NEGATIVE)
    """Margin that simpo asks for; it is not multiplied by beta."""
    reference_free: bool = False
    """Leave the reference out (a uniform one). Less stable; there is no step-zero check then."""

    def check(self) -> None:
        """Refuse unknown losses, what none of them reads, and what has no meaning together."""
        check_unused(self, "loss_type", *check_loss_settings(self))
        if self.f_divergence_type != "alpha_divergence":
            check_unused(self, "f_divergence_type", "f_alpha_divergence_coef")


@dataclass(frozen=True)
class OptimizerSettings(SeedSettings):
    """Steps and their size."""

    learning_rate: float = field(
        default=5e-6,
        metadata={"must be > 0": Bounds(above=0), "must be at most 3e38": Bounds(at_most=3e38)},
    )
    """Peak learning rate."""
    num_train_epochs: float = field(default=1.0, metadata=POSITIVE)
    """Passes over the data; 0.5 is half a pass."""
    max_steps: int | None = field(default=None, metadata=COUNT_OR_NONE)
    """Number of optimizer steps; overrides num_train_epochs."""
    batch_size: int = field(default=16, metadata=COUNT)
    """Pairs per optimizer step; a run splits them into micro-batches by itself."""
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    """Shape of the learning rate after warm-up."""
    warmup_ratio: float = field(default=0.1, metadata=SHARE)
    """Share of the steps over which the learning rate rises from 0. Not used by `constant`."""
    warmup_steps: int | None = field(
        default=None, metadata={"must be in [0, 1e9], or left out": Bounds(at_least=0, at_most=1e9)}
    )
    """Steps of warm-up; overrides warmup_ratio."""
    optim: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "sgd"] = "adamw"
    """adamw (torch), adamw_8bit or paged_adamw_8bit (bitsandbytes; the latter on CUDA), or sgd."""
    adam_beta1: float = field(default=0.9, metadata=SHARE)
    """Decay of Adam's first moment."""
    adam_beta2: float = field(default=0.999, metadata=SHARE)
    """Decay of Adam's second moment."""
    adam_epsilon: float = field(default=1e-8, metadata=POSITIVE)
    """Added to Adam's denominator."""
    weight_decay: float = field(default=0.0, metadata=NOT_NEGATIVE)
    """Decoupled weight decay of the adapter's matrices."""
    max_grad_norm: float = field(default=1.0, metadata=NOT_NEGATIVE)
    """Gradients are scaled down to this norm; 0 turns clipping off."""
    shuffle: bool = True
    """Draw a new order of the pairs every epoch."""

    def check(self) -> None:
        """Refuse what would have no effect; no steps of warm-up are a share of 0."""
        if self.warmup_steps == 0 and self.lr_scheduler_type != "constant":
            # Beside a warmup_ratio, other trainers mean by 0 that the ratio counts.
            check_unused(self, "warmup_steps", "warmup_ratio")
            object.__setattr__(self, "warmup_ratio", 0.0)
            object.__setattr__(self, "warmup_steps", None)
        if self.lr_scheduler_type == "constant":
            check_unused(self, "lr_scheduler_type", "warmup_steps")
            if self.warmup_ratio > 0:
                check_unused(self, "lr_scheduler_type", "warmup_ratio")
        if self.warmup_steps is not None:
            check_unused(self, "warmup_steps", "warmup_ratio")
        if self.optim == "sgd":
            check_unused(self, "optim", "adam_beta1", "adam_beta2", "adam_epsilon")


@dataclass(frozen=True)
class AdapterSettings(Settings):
    """The adapter."""

    lora_r: int = field(default=16, metadata=COUNT | {"must be at most 8192": Bounds(at_most=8192)})
    """Rank of the adapter."""
    lora_alpha: float = field(default=16.0, metadata=POSITIVE)
    """The adapter's output is scaled by lora_alpha / lora_r."""
    lora_dropout: float = field(default=0.0, metadata=SHARE)
    """Dropout on the adapter's input. Above 0 there is no step-zero check."""
    lora_target_modules: str | list[str] = "all"
    """Layers that get an adapter: all (every linear in the decoder layers) or [q_proj, v_proj]."""
    use_rslora: bool = False
    """Rank-stabilised scaling: lora_alpha / sqrt(lora_r)."""
    init_adapter: str | None = None
    """PEFT adapter folder to start from; the reference is then the base with that adapter."""

    def check(self) -> None:
        """Refuse an adapter of no layers."""
        if not self.lora_target_modules:
            raise ValueError(
                "lora_target_modules is empty; use all, or names such as q_proj,v_proj"
            )


@dataclass(frozen=True)
class PlaceSettings(Settings):
    """Places in memory; auto: a plan chooses on a card, all stays on a CPU."""

    memory_limit: str | None = None
    """Use no more GPU memory than this, such as 8GB or 7.5GiB. CUDA only."""
    layer_weights: Literal["auto", "device", "host", "disk"] = "auto"
    """Where the layers' NF4 weights stay: device, host memory (CUDA), or disk; streamed by layers.
    """
    embedding_weight: Literal["auto", "device", "host"] = "auto"
    """Where the embedding stays: device, or host memory, from where the rows of tokens come."""
    head_weight: Literal["auto", "device", "host"] = "auto"
    """Where the output head stays: device, or pinned host memory, streamed in slices (CUDA)."""

    def check(self) -> None:
        """Refuse a limit that is no size."""
        if self.memory_limit is not None:
            parse_bytes(self.memory_limit)


@dataclass(frozen=True)
class MemorySettings(PlaceSettings):
    """Memory of a step; auto: a plan chooses on a card, layers run again on a CPU."""

    host_memory_limit: str | None = None
    """Use no more host memory for what is placed there than this; by default what is free."""
    memory_check: Literal["error", "warn"] = "error"
    """A run that does not fit, as rehearsed, is refused (error) or tried all the same (warn)."""
    pack_tokens: int | None = field(
        default=None, metadata=COUNT_OR_NONE | {f"must be at most {2**24}": Bounds(at_most=2**24)}
    )
    """Tokens per micro-batch; by default chosen from the lengths of the pairs."""
    keep_activations: Literal["auto", "nothing", "attention", "all"] = "auto"
    """What layers keep for the backward pass: nothing (they run again), attention's, or all."""
    layer_inputs: Literal["auto", "device", "host"] = "auto"
    """Where layer inputs wait for the backward pass: device, or pinned host memory (CUDA)."""
    optimizer_state: Literal["auto", "device", "host"] = "auto"
    """Where adamw keeps its moments and works: device, or host memory (CUDA)."""
    head_kernel: Literal["auto", "torch", "triton", "fused"] = "auto"
    """How the head is computed: auto chooses by the card; fused never writes logits (CUDA)."""

    def check(self) -> None:
        """Refuse what layers cannot keep."""
        for name in ("layer_inputs", "layer_weights"):
            place = getattr(self, name)
            if self.keep_activations in ("attention", "all") and place in ("host", "disk"):
                raise ValueError(
                    f"{name} {place} is for layers that run again in the backward pass; leave it "
                    f"or keep_activations {self.keep_activations} out"
                )
        if self.host_memory_limit is not None:
            parse_bytes(self.host_memory_limit, "host_memory_limit")


@dataclass(frozen=True)
class RunSettings(OutputSettings):
    """What a run writes, and when."""

    logging_steps: int | None = field(default=None, metadata=COUNT_OR_NONE)
    """Write metrics every so many steps; by default 10, and 1 in runs of fewer than 100 steps."""
    eval_steps: int | None = field(default=None, metadata=COUNT_OR_NONE)
    """Evaluate every so many steps; by default at the end of each epoch."""
    early_stopping_patience: int | None = field(default=None, metadata=COUNT_OR_NONE)
    """Stop after so many evaluations in a row that did not improve; by default never."""
    early_stopping_threshold: float = field(default=0.0, metadata=NOT_NEGATIVE)
    """An evaluation improves if it lowers eval_loss by more than this since the last that did."""
    save_strategy: Literal["epoch", "steps", "no"] = "epoch"
    """When to write a checkpoint; epoch and steps write one at the last step too."""
    save_steps: int | None = field(default=None, metadata=COUNT_OR_NONE)
    """Steps between checkpoints, with save_strategy steps."""
    keep_checkpoints: int = field(default=2, metadata=COUNT)
    """How many checkpoints to keep, the newest."""
    resume: str | None = None
    """auto (output_dir's newest good checkpoint; without one, afresh) or a checkpoint."""
    reference: Literal["auto", "accept"] = "auto"
    """Cached log-probs of the reference from another card or version: score again, or accept."""
    report_to: str | list[str] = "none"
    """Experiment trackers beside metrics.jsonl: none, tensorboard, wandb, trackio, or a list."""

    @property
    def trackers(self) -> list[str]:
        """`report_to` as names; empty for none."""
        names = [self.report_to] if isinstance(self.report_to, str) else self.report_to
        return [name for name in names if name != "none"]

    def check(self) -> None:
        """Refuse unknown trackers and what would have no effect; no tracker is written as none."""
        if not self.trackers:
            object.__setattr__(self, "report_to", "none")
        for name in self.trackers:
            if name not in TRACKERS:
                raise ValueError(
                    f"report_to must be none or of {', '.join(TRACKERS)}, got {name!r}"
                )
        if self.save_strategy == "no":
            check_unused(self, "save_strategy", "keep_checkpoints")
        if self.early_stopping_patience is None:
            check_unused(self, "early_stopping_patience", "early_stopping_threshold")
        if self.save_strategy == "steps" and self.save_steps is None:
            raise ValueError("save_strategy steps needs save_steps, for example save_steps 200")
        if self.save_strategy != "steps" and self.save_steps is not None:
            raise ValueError(
                f"save_steps={self.save_steps} has no effect with "
                f"save_strategy={self.save_strategy}; set save_strategy steps"
            )


@dataclass(frozen=True)
class SamplingSettings(SeedSettings):
    """How answers are drawn."""

    max_new_tokens: int = field(default=256, metadata=COUNT)
    """Longest answer, in tokens."""
    temperature: float = field(default=0.7, metadata=NOT_NEGATIVE)
    """Randomness of sampling; 0 always takes the likeliest token."""
    top_p: float = field(default=0.95, metadata={"must be in (0, 1]": Bounds(above=0, at_most=1)})
    """Sample from the likeliest tokens that together have this probability."""
    top_k: int = field(default=0, metadata=NOT_NEGATIVE)
    """Sample from this many likeliest tokens; 0 for all."""

    def check(self) -> None:
        """Refuse what greedy decoding does not read, and what only rounding tells from it."""
        if 0 < self.temperature < 1e-4:
            raise ValueError(
                f"temperature must be 0 or at least 0.0001, got {self.temperature:g}; use 0, which "
                "always takes the likeliest token"
            )
        if self.temperature == 0:
            check_unused(self, "temperature", "top_p", "top_k", "seed")


def parse_bytes(text: str, setting: str = "memory_limit") -> int:
    """Read a memory size such as `8GB`, `7.5GiB` or `900MiB`; `setting` is for messages.

    Raises:
        ValueError: If the text is no size.
    """
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if not match or float(match[1]) <= 0:
        raise ValueError(f"{setting} must be a size such as 8GB or 7.5GiB, got {text!r}")
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** ("KMGT".index(match[2].upper()) + 1 if match[2] else 0))

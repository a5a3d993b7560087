"""Every setting of every verb: one frozen dataclass a verb, one docstring a field.

The flag, the YAML key, the help text and the README's table all come from the fields below. A
config that exists is valid: `__post_init__` checks bounds and combinations and says how to mend
what is wrong. Whether a file exists or a card is there is not a matter of settings and is checked
where it is used.

Of this package only `settings` and `checks` are imported here, which serve any such dataclass, and
`loss_checks`, the checks of the loss settings.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lowmem_dpo.checks import check, check_seed, check_types, check_unused, split_names
from lowmem_dpo.loss_checks import check_loss_settings
from lowmem_dpo.settings import parse_config

TRACKERS = ("tensorboard", "wandb", "trackio")


@dataclass(frozen=True)
class TrainConfig:
    """Settings of `train` and `precompute`."""

    model: str | None = None
    """A folder or Hugging Face id of a causal language model, or the folder of a PEFT adapter."""
    data: str | None = None
    """Pairs to train on: a .jsonl, .json, .csv or .parquet file, a folder, or a dataset id."""
    eval_data: str | None = None
    """Pairs to evaluate on, from a source of the same kinds."""
    dataset_config: str | None = None
    """Configuration of a dataset that has several."""
    dataset_train_split: str | None = None
    """Split of a dataset or folder to train on; by default train, or the only one."""
    dataset_test_split: str | None = None
    """Split of eval_data to evaluate on; by default test, or the only one."""
    columns: dict[str, str] = field(default_factory=dict)
    """Our names of columns to the file's, such as {prompt: question, chosen: answer_a}."""
    on_bad_row: Literal["error", "skip"] = "error"
    """A row that cannot be read stops the run (error), or is left out and counted (skip)."""
    output_dir: str = "outputs/dpo"
    """Folder that receives the run."""

    beta: float = 0.1
    """Weight of the KL term: small lets the policy move far from the reference, large holds it."""
    loss_type: str | list[str] = "sigmoid"
    """Loss, such as sigmoid (DPO), or several: [sigmoid, bco_pair, sft]; the README lists them."""
    loss_weights: list[float] | None = None
    """Weights of several losses, such as [0.8, 0.2, 1.0] (MPO); by default 1 each."""
    rpo_alpha: float = 0.0
    """Weight of the chosen answers' negative log-likelihood beside a loss (RPO)."""
    label_smoothing: float = 0.0
    """Probability that a label is flipped, in [0, 0.5): sigmoid (cDPO), robust, exo_pair, ..."""
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = (
        "reverse_kl"
    )
    """Distance that holds the policy near the reference (f-DPO); reverse_kl is DPO's."""
    f_alpha_divergence_coef: float = 0.5
    """Order of alpha_divergence, in [0, 2]: 0 is forward KL, towards 1 reverse KL."""
    ld_alpha: float | None = None
    """Weight in [0, 1] of tokens beyond the shorter answer's length (LD-DPO); by default 1."""
    discopop_tau: float = 0.05
    """Temperature of discopop's mixture."""
    simpo_gamma: float = 0.5
    """Margin that simpo asks for; it is not multiplied by beta."""
    reference_free: bool = False
    """Leave the reference out (a uniform one). Less stable; there is no step-zero check then."""
    reference: Literal["auto", "accept"] = "auto"
    """Cached reference numbers of another numerics fingerprint: score again (auto) or accept."""

    learning_rate: float = 5e-6
    """Peak learning rate."""
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    """Shape of the learning rate after warm-up."""
    warmup_ratio: float = 0.1
    """Share of the steps over which the learning rate rises from 0. Not used by `constant`."""
    warmup_steps: int | None = None
    """Steps of warm-up; overrides warmup_ratio."""
    num_train_epochs: float = 1.0
    """Passes over the data; 0.5 is half a pass."""
    max_steps: int | None = None
    """Number of optimizer steps; overrides num_train_epochs."""
    batch_size: int = 16
    """Pairs per optimizer step. How they are split into micro-batches is the plan's business."""
    optim: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "sgd"] = "adamw"
    """adamw (torch), adamw_8bit or paged_adamw_8bit (bitsandbytes; the latter on CUDA), or sgd."""
    adam_beta1: float = 0.9
    """Decay of Adam's first moment."""
    adam_beta2: float = 0.999
    """Decay of Adam's second moment."""
    adam_epsilon: float = 1e-8
    """Added to Adam's denominator."""
    weight_decay: float = 0.0
    """Decoupled weight decay of the adapter's matrices."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 turns clipping off."""
    shuffle: bool = True
    """Draw a new order of the pairs every epoch."""
    seed: int = 42
    """Seeds the adapter's start, the order of the data, dropout and the held-out split."""

    lora_r: int = 16
    """Rank of the adapter."""
    lora_alpha: float = 16.0
    """The adapter's output is scaled by lora_alpha / lora_r."""
    lora_dropout: float = 0.0
    """Dropout on the adapter's input. Above 0 there is no step-zero check."""
    lora_target_modules: str | list[str] = "all"
    """Layers that get an adapter: all (every linear in the decoder layers) or [q_proj, v_proj]."""
    use_rslora: bool = False
    """Rank-stabilised scaling: lora_alpha / sqrt(lora_r)."""
    init_adapter: str | None = None
    """PEFT adapter folder to start from; the reference is then the base with that adapter."""

    max_length: int = 1024
    """Longest sequence (prompt and completion) in tokens; completions are cut from the right."""
    truncate_prompt: bool = False
    """Cut prompts from the left first, down to half of max_length, where a pair is too long."""
    chat_template: str = "auto"
    """auto (the tokenizer's own), none, or the path of a Jinja file."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables for the chat template, such as {enable_thinking: false} for Qwen3."""
    system_prompt: str | None = None
    """System message for conversations that have none."""
    eval_fraction: float = 0.0
    """Share of the pairs, by whole prompts, held out for evaluation when there is no eval_data."""

    quantization: Literal["nf4", "none"] = "nf4"
    """Storage of the base's linear layers: nf4 (4 bits, double quantisation) or none (in dtype)."""
    head_quantization: Literal["none", "nf4", "int8"] = "none"
    """Storage of the output head: none (in dtype), int8 or nf4. Another model than with none."""
    head_weight: Literal["device", "host"] = "device"
    """Where the output head stays: device, or pinned host memory, streamed in slices (CUDA)."""
    head_kernel: Literal["auto", "torch", "triton", "fused"] = "auto"
    """How the head is computed; auto knows the card. fused writes no logits at all (CUDA)."""
    quantized_copy: bool = True
    """Keep the quantised base in cache_dir, so that the next start does not quantise again."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Compute type. auto: bfloat16 where the card has it, else float16; float32 on a CPU."""
    device: str = "auto"
    """auto (the CUDA card; the CPU only where there is none), cpu, cuda or cuda:N."""
    memory_limit: str | None = None
    """Use no more GPU memory than this, such as 8GB or 7.5GiB. CUDA only."""
    pack_tokens: int | None = None
    """Tokens per micro-batch; by default chosen from the lengths of the pairs."""
    layer_inputs: Literal["device", "host"] = "device"
    """Where layer inputs wait for the backward pass: device, or pinned host memory (CUDA)."""

    logging_steps: int | None = None
    """Write metrics every so many steps; by default 10, and 1 in runs of fewer than 100 steps."""
    eval_steps: int | None = None
    """Evaluate every so many steps; by default at the end of each epoch."""
    early_stopping_patience: int | None = None
    """Stop after so many evaluations in a row that did not improve; by default never."""
    early_stopping_threshold: float = 0.0
    """An evaluation improves if it lowers eval_loss by more than this since the last that did."""
    save_strategy: Literal["epoch", "steps", "no"] = "epoch"
    """When to write a checkpoint; epoch and steps write one at the last step too."""
    save_steps: int | None = None
    """Steps between checkpoints, with save_strategy steps."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep."""
    resume: str | None = None
    """auto (output_dir's newest good checkpoint; without one, afresh) or a checkpoint."""
    cache_dir: str | None = None
    """Folder of caches (reference, quantised base); $LOWMEM_DPO_CACHE or ~/.cache/lowmem_dpo."""
    report_to: str | list[str] = "none"
    """Experiment trackers beside metrics.jsonl: none, tensorboard, wandb, trackio, or a list."""

    def __post_init__(self) -> None:
        check_types(self)
        split_names(self, "lora_target_modules")
        self._check_trackers()
        for name in ("beta", "learning_rate", "num_train_epochs", "lora_alpha", "adam_epsilon"):
            check(self, name, getattr(self, name) > 0, "must be > 0")
        for name in ("batch_size", "lora_r", "max_length", "keep_checkpoints"):
            check(self, name, getattr(self, name) >= 1, "must be at least 1")
        optional = ("max_steps", "logging_steps", "eval_steps", "save_steps", "pack_tokens")
        for name in (*optional, "early_stopping_patience"):
            value = getattr(self, name)
            check(self, name, value is None or value >= 1, "must be at least 1, or left out")
        for name in ("warmup_ratio", "lora_dropout", "eval_fraction", "adam_beta1", "adam_beta2"):
            check(self, name, 0 <= getattr(self, name) < 1, "must be in [0, 1)")
        check(self, "warmup_steps", (self.warmup_steps or 0) >= 0, "must be >= 0, or left out")
        for name in ("weight_decay", "max_grad_norm", "early_stopping_threshold"):
            check(self, name, getattr(self, name) >= 0, "must be >= 0")
        check_seed(self)
        for name, most in (("lora_r", 8192), ("pack_tokens", 2**24)):
            check(self, name, (getattr(self, name) or 0) <= most, f"must be at most {most}")
        check_loss_settings(self)
        self._check_combinations()
        if self.memory_limit is not None:
            parse_bytes(self.memory_limit)

    @property
    def trackers(self) -> list[str]:
        """`report_to` as names; empty for none."""
        names = self.report_to
        if isinstance(names, str):
            names = [part.strip() for part in names.strip("[]").split(",")]
        return [name for name in names if name not in ("", "none")]

    def _check_trackers(self) -> None:
        for name in self.trackers:
            if name not in TRACKERS:
                raise ValueError(
                    f"report_to must be none or of {', '.join(TRACKERS)}, got {name!r}"
                )

    def _check_combinations(self) -> None:
        """Refuse settings that would have no effect beside the others."""
        if self.lr_scheduler_type == "constant":
            check_unused(self, "lr_scheduler_type", "warmup_steps")
            if self.warmup_ratio > 0:
                check_unused(self, "lr_scheduler_type", "warmup_ratio")
        if self.warmup_steps is not None:
            check_unused(self, "warmup_steps", "warmup_ratio")
        if self.optim == "sgd":
            check_unused(self, "optim", "adam_beta1", "adam_beta2", "adam_epsilon")
        if self.quantization == "none":
            check_unused(self, "quantization", "quantized_copy")
        if self.save_strategy == "no":
            check_unused(self, "save_strategy", "keep_checkpoints")
        if self.head_quantization != "none" and self.head_weight == "host":
            raise ValueError(
                f"head_quantization={self.head_quantization} keeps the head on the device; "
                "leave it or head_weight host out"
            )
        if self.eval_data and self.eval_fraction:
            raise ValueError("eval_data and eval_fraction are both given; leave one out")
        if self.eval_steps and not (self.eval_data or self.eval_fraction):
            raise ValueError(
                "eval_steps needs something to evaluate on: set eval_data or eval_fraction"
            )
        if self.early_stopping_patience is not None and not (self.eval_data or self.eval_fraction):
            raise ValueError(
                "early_stopping_patience needs something to evaluate on: "
                "set eval_data or eval_fraction"
            )
        if self.early_stopping_patience is None:
            check_unused(self, "early_stopping_patience", "early_stopping_threshold")
        if self.save_strategy == "steps" and self.save_steps is None:
            raise ValueError("save_strategy steps needs save_steps, for example save_steps 200")
        if self.save_strategy != "steps" and self.save_steps is not None:
            raise ValueError(
                f"save_steps={self.save_steps} has no effect with "
                f"save_strategy={self.save_strategy}; set save_strategy steps"
            )
        if self.dataset_test_split and not self.eval_data:
            raise ValueError(
                f"dataset_test_split={self.dataset_test_split} has no effect without eval_data; "
                "name the dataset there too"
            )
        if wrong := [ours for ours, name in self.columns.items() if not isinstance(name, str)]:
            raise ValueError(f"columns: {wrong[0]} must be the name of a column in the file")
        if len(set(self.columns.values())) < len(self.columns):
            raise ValueError("columns names a column of the file twice; give each of ours its own")
        if self.system_prompt is not None and self.chat_template == "none":
            raise ValueError("system_prompt needs a chat template; leave chat_template none out")

    @classmethod
    def from_yaml(cls, path: str | Path) -> "TrainConfig":
        """Read a config from a YAML file.

        Args:
            path: The file; keys are the field names.

        Raises:
            ValueError: If the file is missing, is no YAML mapping, has an unknown key or a wrong
                value.
        """
        return parse_config(cls, ["--config", str(path)])


@dataclass(frozen=True)
class GenerateConfig:
    """Settings of `generate`."""

    model: str | None = None
    """A folder or Hugging Face id of a causal language model, or the folder of a PEFT adapter."""
    adapter: str | None = None
    """PEFT adapter folder; its answers are shown beside the base's."""
    prompt: str | None = None
    """One prompt."""
    prompts: str | None = None
    """A file of prompts: one a line, or .jsonl, .json, .csv or .parquet with a column prompt."""
    max_new_tokens: int = 256
    """Longest answer, in tokens."""
    temperature: float = 0.7
    """Randomness of sampling; 0 always takes the likeliest token."""
    top_p: float = 0.95
    """Sample from the likeliest tokens that together have this probability."""
    top_k: int = 0
    """Sample from this many likeliest tokens; 0 for all."""
    seed: int = 42
    """Seeds sampling; the base and the adapter get the same."""
    compare: bool = True
    """Show the base's answer beside the adapter's."""
    chat_template: str = "auto"
    """auto (the tokenizer's own), none, or the path of a Jinja file."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables for the chat template, such as {enable_thinking: false} for Qwen3."""
    system_prompt: str | None = None
    """System message put before the prompt."""
    quantization: Literal["nf4", "none"] = "nf4"
    """How the base's linear layers are stored: nf4 or none (in dtype)."""
    head_quantization: Literal["none", "nf4", "int8"] = "none"
    """How the output head is stored: none (in dtype), int8 or nf4."""
    quantized_copy: bool = True
    """Keep the quantised base in cache_dir, so that the next start does not quantise again."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Compute type. auto: bfloat16 where the card has it, else float16; float32 on a CPU."""
    device: str = "auto"
    """auto (the CUDA card; the CPU only where there is none), cpu, cuda or cuda:N."""
    cache_dir: str | None = None
    """Folder of the quantised base; by default $LOWMEM_DPO_CACHE or ~/.cache/lowmem_dpo."""

    def __post_init__(self) -> None:
        check_types(self)
        check(self, "max_new_tokens", self.max_new_tokens >= 1, "must be at least 1")
        check(self, "temperature", self.temperature >= 0, "must be >= 0")
        check(self, "top_p", 0 < self.top_p <= 1, "must be in (0, 1]")
        check(self, "top_k", self.top_k >= 0, "must be >= 0")
        check_seed(self)
        if self.temperature == 0:
            check_unused(self, "temperature", "top_p", "top_k", "seed")
        if self.quantization == "none":
            check_unused(self, "quantization", "quantized_copy")
        if self.prompt is not None and not self.prompt.strip():
            raise ValueError("prompt is empty; give it some text")
        if self.prompt is not None and self.prompts is not None:
            raise ValueError("prompt and prompts are both given; leave one out")


@dataclass(frozen=True)
class DemoConfig:
    """Settings of `demo`."""

    output_dir: str = "outputs/demo"
    """Folder that receives the demo's model, pairs and run; an earlier demo is replaced."""
    seed: int = 42
    """Seeds everything random."""
    device: str = "cpu"
    """cpu, cuda or cuda:N. The demo's model is so small that a CPU suits it best."""

    def __post_init__(self) -> None:
        check_types(self)
        check_seed(self)


def parse_bytes(text: str) -> int:
    """Read a memory size such as `8GB`, `7.5GiB` or `900MiB`.

    Raises:
        ValueError: If the text is no size.
    """
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if not match or float(match[1]) <= 0:
        raise ValueError(f"memory_limit must be a size such as 8GB or 7.5GiB, got {text!r}")
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** ("KMGT".index(match[2].upper()) + 1 if match[2] else 0))

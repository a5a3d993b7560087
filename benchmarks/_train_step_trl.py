"""TRL's DPOTrainer over PEFT and bitsandbytes for `train_step.py`, on a random model."""

import argparse
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from _common import StepClock, peak_mib, reset_peak
from _random_models import random_model
from bitsandbytes.functional import QuantState, create_dynamic_map, get_4bit_type
from datasets import Dataset
from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel, TrainerCallback
from trl import DPOConfig, DPOTrainer

from lowmem_dpo.demo.byte_tokenizer import byte_tokenizer
from lowmem_dpo.linears.lora import LoraLinear
from lowmem_dpo.linears.nf4 import BLOCK, BLOCK2, Nf4Weight
from lowmem_dpo.tokens.trees import TokenPair


class PreTokenisedTrainer(DPOTrainer):
    """DPOTrainer for a dataset of token ids, which its own preparation would tokenise again."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset


class Steps(TrainerCallback):
    """Times the steps from the first forward pass to the optimizer's end, logging left out."""

    def __init__(self, device: torch.device) -> None:
        self.clock = StepClock(device)

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Forget the memory of the setup."""
        reset_peak(self.clock.device)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Begin a step."""
        self.clock.start()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """End it."""
        self.clock.stop()


def run(options: argparse.Namespace, pairs: list[TokenPair], scratch: Path) -> dict[str, Any]:
    """Take the steps; arguments and result as in `_train_step_ours.run`."""
    precompute = options.worker == "trl-precompute"
    steps = Steps(options.device)
    lora = LoraConfig(
        r=options.rank,
        lora_alpha=options.rank,
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    trainer = PreTokenisedTrainer(
        model=random_peft_base(options),
        args=settings(options, scratch, precompute),
        train_dataset=Dataset.from_list([columns(pair) for pair in pairs]),
        processing_class=byte_tokenizer(),
        peft_config=lora,
        callbacks=[steps],
    )
    assert trainer.model is not None
    start_like_ours(trainer.model, options)
    trainer.train()
    peak = peak_mib(options.device)
    reference_clock = StepClock(options.device)
    if precompute:
        reference_clock.start()
        for batch in trainer.get_train_dataloader():
            trainer.compute_ref_log_probs(trainer.model, batch)
        reference_clock.stop()
    return {
        "steps_ms": steps.clock.steps_ms,
        "ref_ms": sum(reference_clock.steps_ms),
        "peak_mib": peak,
        "metrics_0": trainer.state.log_history[0],
    }


def settings(options: argparse.Namespace, scratch: Path, precompute: bool) -> DPOConfig:
    """TRL's defaults but for what the comparison fixes."""
    on_cuda = options.device.type == "cuda"
    return DPOConfig(
        output_dir=str(scratch),
        per_device_train_batch_size=options.trl_micro_batch,
        gradient_accumulation_steps=options.num_pairs // options.trl_micro_batch,
        max_steps=options.num_steps,
        max_length=options.length,
        learning_rate=options.learning_rate,
        lr_scheduler_type="constant",
        optim="adamw_8bit" if on_cuda else "adamw_torch_fused",
        gradient_checkpointing=True,
        precompute_ref_log_probs=precompute,
        bf16=options.dtype == torch.bfloat16,
        fp16=options.dtype == torch.float16,
        use_cpu=not on_cuda,
        seed=options.seed,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def columns(pair: TokenPair) -> dict[str, list[int]]:
    """A pair as TRL's collator wants it."""
    return {
        "prompt_ids": list(pair.chosen_ids[: pair.chosen_start]),
        "chosen_ids": list(pair.chosen_ids[pair.chosen_start :]),
        "rejected_ids": list(pair.rejected_ids[pair.rejected_start :]),
    }


def random_peft_base(options: argparse.Namespace) -> PreTrainedModel:
    """The random model with plain or bitsandbytes linears, as PEFT takes it."""

    def make_linear(
        path: str, weight: Nf4Weight | nn.Parameter, bias: nn.Parameter | None
    ) -> nn.Module:
        if isinstance(weight, Nf4Weight):
            return bitsandbytes_linear(weight, bias, options.dtype)
        with torch.device("meta"):
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        linear.weight, linear.bias = weight, bias  # type: ignore[assignment]
        return linear

    model = random_model(
        options.shape,
        make_linear,
        quantization=options.quantization,
        dtype=options.dtype,
        device=options.device,
    )
    if options.quantization == "nf4":
        # By this PEFT and TRL know a quantised model.
        model.is_loaded_in_4bit = True  # type: ignore[assignment]
    return model


def bitsandbytes_linear(
    weight: Nf4Weight, bias: nn.Parameter | None, dtype: torch.dtype
) -> nn.Module:
    """The same codes as a bitsandbytes layer, double quantised."""
    device = weight.packed.device
    state = QuantState(
        absmax=weight.absmax,
        shape=torch.Size(weight.shape),
        code=get_4bit_type("nf4", device=device),
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=dtype,
        offset=weight.offset,
        state2=QuantState(
            absmax=weight.absmax2,
            code=create_dynamic_map().to(device),
            blocksize=BLOCK2,
            dtype=torch.float32,
        ),
    )
    out_features, in_features = weight.shape
    linear = bitsandbytes.nn.Linear4bit(
        in_features, out_features, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta"
    )
    linear.weight = bitsandbytes.nn.Params4bit(
        weight.packed.view(-1, 1),
        quant_state=state,
        blocksize=BLOCK,
        quant_type="nf4",
        module=linear,
        bnb_quantized=True,
    )
    linear.quant_state = state
    linear.bias = bias  # type: ignore[assignment]
    return linear


@torch.no_grad()
def start_like_ours(model: nn.Module, options: argparse.Namespace) -> None:
    """Give PEFT's adapters the A matrices that ours begin with, so that gradients compare."""
    for path, module in model.named_modules():
        if hasattr(module, "lora_A"):
            stored = module.lora_A["default"].weight
            name = path.removeprefix("base_model.model.")
            ours = LoraLinear(name, nn.Parameter(torch.empty(1, stored.shape[1])))
            ours.add_adapter(options.rank, scaling=1.0, dropout=0.0, seed=options.seed)
            assert ours.lora_a is not None
            stored.copy_(ours.lora_a)

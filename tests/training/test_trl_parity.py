"""Every number of a run against TRL's DPOTrainer with PEFT's LoRA, step by step, in fp32.

Both train the same model on the same pairs in the same order from the same adapter. Ours packs
trees and caches the reference; TRL pads pairs and scores the reference at every step.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowmem_dpo.linears.lora import lora_parameters
from lowmem_dpo.settings.configs import TrainConfig
from lowmem_dpo.trainer import Trainer
from lowmem_dpo.weights.adapters import ADAPTER_WEIGHTS_FILE, save_adapter
from tests.conftest import random_pairs
from tests.policies import policy_for
from tests.tiny import save_tiny_model
from tests.training.conftest import read_metrics, read_record, write_rows

peft = pytest.importorskip("peft", reason="needs PEFT, TRL's adapters")
trl = pytest.importorskip("trl", reason="needs TRL to compare with")
pytestmark = pytest.mark.usefixtures("without_plots")

BATCH_SIZE = 4
NUM_PAIRS = 30  # the eighth and last batch holds two
MAX_LENGTH = 48  # cuts some of the sequences
SHARED = {
    "beta": 0.1,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "cosine",
    "weight_decay": 0.1,
    "max_grad_norm": 1.0,
    "max_length": MAX_LENGTH,
}
WARMUP_RATIO = 0.2  # steps 1 and 2 have learning rates 0 and half the peak
EXACT = ("rewards/accuracies", "num_tokens")
ROUNDED = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "grad_norm",
)

Row = dict[str, Any]
Outcome = tuple[list[dict[str, float]], dict[str, Tensor]]
"""The logged metrics of each step, and the adapter at the end."""


class OfflineDPOTrainer(trl.DPOTrainer):
    def _send_telemetry(self) -> None:
        """Nothing leaves a test."""


def as_messages(row: Row) -> Row:
    """A row of plain strings as TRL's conversational format has it."""
    if not isinstance(row["prompt"], str):
        return row
    answers = {
        side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")
    }
    return {"prompt": [{"role": "user", "content": row["prompt"]}], **answers}


def conversations(num_pairs: int) -> list[Row]:
    """Message lists with a system message, earlier turns, or both."""
    rows = [as_messages(row) for row in random_pairs(num_pairs, seed=1)]
    for i, row in enumerate(rows):
        if i % 3:
            earlier = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
            row["prompt"] = [*earlier, *row["prompt"]]
        if i % 2:
            row["prompt"] = [{"role": "system", "content": "hi"}, *row["prompt"]]
    return rows


def config_for(model: Path, output: Path, **settings: Any) -> TrainConfig:
    return TrainConfig(
        model=str(model),
        output_dir=str(output),
        cache_dir=str(output.parent / "cache"),
        quantization="none",
        dtype="float32",
        device="cpu",
        batch_size=BATCH_SIZE,
        warmup_ratio=WARMUP_RATIO,
        shuffle=False,
        logging_steps=1,
        save_strategy="no",
        lora_r=4,
        lora_alpha=8.0,
        **SHARED,
        **settings,
    )


@pytest.fixture(scope="module")
def starts(llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_starts(llama_dir, tmp_path_factory.mktemp("starts"))


def save_starts(model: Path, directory: Path) -> dict[str, Path]:
    """Adapter folders: the one that a run with our default seed starts from, and a trained one."""
    policy = policy_for(config_for(model, directory / "unused"))

    def save(name: str) -> Path:
        save_adapter(
            directory / name,
            policy.model.network,
            base_model=policy.base,
            settings=policy.adapter,
        )
        return directory / name

    fresh = save("fresh")
    generator = torch.Generator().manual_seed(1)
    for name, parameter in lora_parameters(policy.model.network).items():
        if name.endswith("lora_b"):
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return {"fresh": fresh, "trained": save("trained")}


@pytest.fixture
def train_both(
    llama_dir: Path, starts: dict[str, Path], tmp_path: Path
) -> Callable[..., tuple[Outcome, Outcome]]:
    def train(
        rows: list[Row],
        loss_type: str | list[str],
        *,
        start: str = "fresh",
        micro_batches: int = 1,
        model: Path | None = None,
        attention: str = "sdpa",
        **settings: Any,
    ) -> tuple[Outcome, Outcome]:
        data = write_rows(tmp_path / "pairs.jsonl", rows)
        folder = (save_starts(model, tmp_path) if model else starts)[start]
        model = model or llama_dir
        init = None if start == "fresh" else str(folder)
        settings["loss_type"] = loss_type
        config = config_for(model, tmp_path / "ours", init_adapter=init, **settings)
        messages = [as_messages(row) for row in rows]
        theirs = train_with_trl(model, folder, messages, micro_batches, attention, settings)
        return train_with_ours(config, data), theirs

    return train


def train_with_ours(config: TrainConfig, data: Path) -> Outcome:
    output = Trainer(config).fit(data).output_dir
    facts = read_record(output)["data"]
    assert facts["num_kept"] == NUM_PAIRS and facts["num_truncated"] > 0
    adapter = safetensors.torch.load_file(output / "adapter" / ADAPTER_WEIGHTS_FILE)
    return read_metrics(output), adapter


def train_with_trl(
    model: Path,
    start: Path,
    rows: list[Row],
    micro_batches: int,
    attention: str,
    loss: dict[str, Any],
) -> Outcome:
    """TRL takes a copy of the adapter it is given as the reference."""
    base = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation=attention
    )
    policy = peft.PeftModel.from_pretrained(base, start, is_trainable=True)
    settings = trl.DPOConfig(
        output_dir=str(start.parent / "trl"),
        per_device_train_batch_size=BATCH_SIZE // micro_batches,
        gradient_accumulation_steps=micro_batches,
        num_train_epochs=1,
        warmup_steps=WARMUP_RATIO,
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        **SHARED,
        **loss,
    )
    trainer = OfflineDPOTrainer(
        model=policy,
        args=settings,
        processing_class=AutoTokenizer.from_pretrained(model),
        train_dataset=Dataset.from_list(rows),
    )
    trainer.train()
    steps = [line for line in trainer.state.log_history if "loss" in line]
    return steps, peft.get_peft_model_state_dict(policy)


def assert_equal_outcomes(ours: Outcome, theirs: Outcome) -> None:
    """Metrics agree to 2e-5 (large ones to 1e-6 of their size), adapters to 1e-3 of their norm.

    What an adapter's smallest gradients leave to rounding, Adam's normalisation makes larger.
    """
    (our_steps, our_adapter), (their_steps, their_adapter) = ours, theirs
    assert len(our_steps) == len(their_steps) == 8
    for number, (step, wanted) in enumerate(zip(our_steps, their_steps, strict=True), 1):
        for name in EXACT:
            assert step[name] == wanted[name], (number, name)
        assert step["learning_rate"] == pytest.approx(wanted["learning_rate"], rel=1e-12)
        for name in ROUNDED:
            assert step[name] == pytest.approx(wanted[name], rel=1e-6, abs=2e-5), (number, name)
    assert max(abs(step["rewards/margins"]) for step in our_steps) > 0.05  # it did train
    assert any(step["grad_norm"] > SHARED["max_grad_norm"] for step in our_steps)  # and clip
    assert our_adapter.keys() == their_adapter.keys() and len(our_adapter) == 2 * 7 * 2
    for name, tensor in our_adapter.items():
        error = (tensor - their_adapter[name]).norm() / their_adapter[name].norm()
        assert error < 1e-3, (name, error)


# Every loss alone is held against TRL's code in tests/test_losses_trl.py.
@pytest.mark.parametrize(
    "loss_type",
    [
        "sigmoid",
        "ipo",
        *(pytest.param(x, marks=pytest.mark.slow) for x in ("hinge", "apo_zero", "aot_unpaired")),
    ],
)
def test_fit_on_plain_strings_equals_trl_at_every_step(train_both, loss_type):
    assert_equal_outcomes(*train_both(random_pairs(NUM_PAIRS), loss_type))


def test_fit_with_weighted_losses_and_tails_equals_trl_at_every_step(train_both):
    settings = {"loss_weights": [0.8, 0.2], "ld_alpha": 0.5}
    assert_equal_outcomes(*train_both(random_pairs(NUM_PAIRS), ["sigmoid", "bco_pair"], **settings))


def test_fit_on_conversations_equals_trl_at_every_step(train_both):
    assert_equal_outcomes(*train_both(conversations(NUM_PAIRS), "sigmoid"))


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_fit_from_a_trained_adapter_has_the_reference_and_the_numbers_of_trl(train_both, loss_type):
    outcomes = train_both(random_pairs(NUM_PAIRS), loss_type, start="trained")
    assert_equal_outcomes(*outcomes)
    first_step = outcomes[0][0][0]
    assert first_step["rewards/chosen"] == first_step["rewards/rejected"] == 0.0


def test_fit_in_one_batch_equals_trl_accumulating_two_micro_batches(train_both):
    assert_equal_outcomes(*train_both(random_pairs(NUM_PAIRS), "sigmoid", micro_batches=2))


def test_fit_with_windows_soft_caps_and_scaled_embeddings_equals_trl(train_both, tmp_path):
    model = save_tiny_model(tmp_path / "gemma2", "gemma2")
    outcomes = train_both(random_pairs(NUM_PAIRS), "sigmoid", model=model, attention="eager")
    assert_equal_outcomes(*outcomes)

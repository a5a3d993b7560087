"""What only a CUDA card can show: whole runs on one. Skipped elsewhere."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lowmem_dpo import TrainConfig, Trainer
from lowmem_dpo.linears.nf4 import quantize_nf4

pytestmark = pytest.mark.gpu

DTYPES = ["bfloat16", "float16", "float32"]


@pytest.fixture
def config(llama_dir, pairs_file, tmp_path) -> TrainConfig:
    return TrainConfig(
        model=str(llama_dir),
        data=str(pairs_file(14)),
        output_dir=str(tmp_path / "out"),
        device="cuda",
        batch_size=4,
        learning_rate=1e-3,
        num_train_epochs=2,
        save_strategy="steps",
        save_steps=2,
        keep_checkpoints=9,
    )


def losses(directory: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (directory / "metrics.jsonl").open()]


@pytest.mark.parametrize("dtype", DTYPES)
def test_run_on_a_card_has_an_exact_step_zero_and_learns(config, dtype):
    result = Trainer(replace(config, dtype=dtype)).fit()
    record = json.loads((result.output_dir / "run.json").read_text())
    assert record["step_zero"]["exact"], record["step_zero"]
    assert result.metrics["rewards/margins"] > 0


@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit"])
def test_resume_on_a_card_goes_on_to_the_same_losses(config, tmp_path, optim):
    config = replace(config, optim=optim)
    whole = Trainer(config).fit()
    middle = whole.output_dir / "checkpoints" / "step-000004"
    resumed = replace(config, output_dir=str(tmp_path / "b"), resume=str(middle))
    result = Trainer(resumed).fit()
    assert losses(result.output_dir) == pytest.approx(losses(whole.output_dir)[4:], abs=1e-3)


def test_layer_inputs_on_the_host_change_nothing(config, tmp_path):
    adapters = []
    for place in ("device", "host"):
        run = replace(config, layer_inputs=place, output_dir=str(tmp_path / place))
        result = Trainer(run).fit()
        adapters.append(load_file(result.output_dir / "adapter" / "adapter_model.safetensors"))
    for name, tensor in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], tensor, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_optimizer_on_the_host_trains_as_on_the_card(config, tmp_path, dtype):
    """Its update is rounded otherwise, and small differences grow with the steps."""
    found = {}
    for place in ("device", "host"):
        run = replace(config, optimizer_state=place, dtype=dtype, max_steps=3)
        found[place] = Trainer(replace(run, output_dir=str(tmp_path / place))).fit().output_dir
    assert losses(found["host"]) == pytest.approx(losses(found["device"]), abs=2e-3)
    record = json.loads((found["host"] / "run.json").read_text())
    assert record["plan"]["levers"]["optimizer_on_host"]


def test_a_run_goes_on_with_its_optimizer_elsewhere(config, tmp_path):
    for first, then in (("device", "host"), ("host", "device")):
        run = replace(config, optimizer_state=first, output_dir=str(tmp_path / first))
        whole = Trainer(run).fit()
        middle = whole.output_dir / "checkpoints" / "step-000004"
        out = str(tmp_path / f"then {then}")
        resumed = Trainer(replace(run, optimizer_state=then, output_dir=out, resume=str(middle)))
        found = resumed.fit().output_dir
        assert losses(found) == pytest.approx(losses(whole.output_dir)[4:], abs=2e-3)


@pytest.mark.parametrize("loss_type", ["sigmoid", "aot"])  # aot scores a step without gradient too
def test_layer_weights_in_host_memory_change_nothing(config, tmp_path, loss_type):
    adapters = []
    for place in ("device", "host"):
        run = replace(config, quantization="nf4", layer_weights=place, loss_type=loss_type)
        run = replace(run, embedding_weight=place)
        result = Trainer(replace(run, output_dir=str(tmp_path / place))).fit()
        adapters.append(load_file(result.output_dir / "adapter" / "adapter_model.safetensors"))
    for name, tensor in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], tensor, atol=1e-5, rtol=1e-3)


def test_cards_and_cpus_agree(config, tmp_path):
    config = replace(config, dtype="float32", max_steps=4)
    on_card = Trainer(config).fit()
    on_cpu = Trainer(replace(config, device="cpu", output_dir=str(tmp_path / "cpu"))).fit()
    assert losses(on_card.output_dir) == pytest.approx(losses(on_cpu.output_dir), abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_nf4_codes_of_a_card_are_those_of_the_cpu(dtype):
    weight = torch.randn(384, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    here, there = quantize_nf4(weight), quantize_nf4(weight.cuda())
    assert torch.equal(here.packed, there.packed.cpu())
    torch.testing.assert_close(here.dequantize(dtype), there.dequantize(dtype).cpu())


def test_memory_limit_is_held_to(config):
    from lowmem_dpo.memory.limits import limit_memory

    limit_memory(10**9, torch.device("cuda"))
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(2 * 10**9, dtype=torch.uint8, device="cuda")
    torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_run_is_planned_and_its_memory_is_as_rehearsed(config, capsys):
    result = Trainer(config).fit()
    memory = json.loads((result.output_dir / "run.json").read_text())["memory"]
    printed = capsys.readouterr().out
    assert "layers keep all" in printed and "rehearsed (" in printed
    # A tiny model's segments are of 2 MiB each, and kernels of the first launch take some.
    difference = abs(memory["peak_reserved_bytes"] - memory["rehearsed_reserved_bytes"])
    assert difference <= 0.05 * memory["rehearsed_reserved_bytes"] + 8 * 2**20, memory


def test_what_does_not_fit_on_a_card_is_refused_before_the_model_is_loaded(config, capsys):
    with pytest.raises(ValueError, match="does not fit with pairs of"):
        Trainer(replace(config, memory_limit="1MiB")).fit()
    torch.cuda.set_per_process_memory_fraction(1.0)
    assert "quantised; the next start" not in capsys.readouterr().out

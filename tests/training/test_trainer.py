import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from lowmem_dpo import TrainConfig, Trainer
from lowmem_dpo.cli import main
from lowmem_dpo.linears.lora import adapters_disabled
from lowmem_dpo.settings.groups import TemplateSettings
from lowmem_dpo.stopping import RunStopped
from lowmem_dpo.tokens.encoding import render_prompt
from tests.training.conftest import read_metrics, read_record

pytestmark = pytest.mark.usefixtures("without_plots")

PROMPT = "0 abc"
GREEDY = {"max_new_tokens": 12, "temperature": 0.0}


@pytest.fixture
def config(llama_dir: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    def make(**settings: Any) -> TrainConfig:
        defaults = {
            "model": str(llama_dir),
            "output_dir": str(tmp_path / "out"),
            "quantization": "none",
            "device": "cpu",
            "batch_size": 4,
            "lora_r": 4,
            "learning_rate": 1e-2,
            "save_strategy": "no",
        }
        return TrainConfig(**(defaults | settings))

    return make


def test_fit_returns_the_last_metrics_and_leaves_a_complete_run(config, pairs_file, tmp_path):
    result = Trainer(config(max_steps=8)).fit(str(pairs_file(12)))
    last = read_metrics(result.output_dir)[-1]
    assert result.num_steps == last["step"] == 8
    assert result.final_loss == result.metrics["loss"] == last["loss"] < math.log(2)
    assert result.output_dir == tmp_path / "out"
    record = read_record(result.output_dir)
    assert record["finished"] is True and record["step_zero"]["exact"] is True
    for name in ("config.yaml", "adapter/adapter_config.json", "best/adapter_model.safetensors"):
        assert (result.output_dir / name).is_file(), name


def test_fit_takes_the_file_by_keyword_or_from_the_config(config, pairs_file, tmp_path):
    path = pairs_file(8)
    by_keyword = Trainer(config()).fit(prompts=path, data_format="preferences")
    elsewhere = config(data=str(path), output_dir=str(tmp_path / "again"))
    from_config = Trainer(elsewhere).fit()
    assert by_keyword.num_steps == 2
    assert by_keyword.final_loss == from_config.final_loss


def test_fit_refuses_what_it_cannot_use_and_writes_nothing(config, pairs_file, tmp_path):
    path = pairs_file(8)
    for problem, call in (
        ("no data given", lambda trainer: trainer.fit()),
        ("data_format must be preferences", lambda trainer: trainer.fit(path, data_format="sft")),
        ("no such file", lambda trainer: trainer.fit(tmp_path / "missing.jsonl")),
    ):
        with pytest.raises(ValueError, match=problem) as caught:
            call(Trainer(config()))
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out" / "config.yaml").exists()


def test_fit_refuses_a_folder_that_holds_a_run(config, pairs_file, tmp_path):
    path = pairs_file(4)
    Trainer(config()).fit(path)
    before = (tmp_path / "out" / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match="holds a run already"):
        Trainer(config()).fit(path)
    assert (tmp_path / "out" / "metrics.jsonl").read_bytes() == before


def test_fit_result_holds_the_last_evaluation(config, pairs_file):
    result = Trainer(config(eval_fraction=0.25, num_train_epochs=2.0)).fit(pairs_file(16))
    evaluations = [line for line in read_metrics(result.output_dir) if "eval_loss" in line]
    assert [line["step"] for line in evaluations] == [3, 6]
    assert result.metrics["eval_loss"] == evaluations[-1]["eval_loss"]
    assert result.metrics["eval_rewards/margins"] == evaluations[-1]["eval_rewards/margins"] != 0


def test_add_step_callback_gives_the_function_back_and_calls_it_after_every_step(
    config, pairs_file
):
    trainer = Trainer(config(max_steps=4))
    seen = []

    def function(result):
        seen.append(result)

    assert trainer.add_step_callback(function) is function

    @trainer.add_step_callback
    def count(result):
        seen.append(result.step)

    output = trainer.fit(pairs_file(12)).output_dir
    assert [item for item in seen if isinstance(item, int)] == [1, 2, 3, 4]
    results = seen[::2]
    for result, line in zip(results, read_metrics(output), strict=True):
        metrics = result.metrics
        assert result.step == metrics["step"] == line["step"]
        assert metrics["loss"] == line["loss"]
        for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
            assert metrics[name] == line[name]
    assert results[0].metrics["rewards/margins"] == 0.0 != results[-1].metrics["rewards/margins"]


def test_fit_scores_no_reference_that_precompute_has_scored(config, pairs_file):
    path = pairs_file(10)
    assert Trainer(config()).precompute(path) == 10
    result = Trainer(config()).fit(path)
    record = read_record(result.output_dir)
    assert record["reference"]["num_scored"] == 0
    assert record["reference"]["recheck_rms"] == 0.0


def test_generate_before_fit_is_refused(config):
    with pytest.raises(ValueError, match="call fit or load_checkpoint first") as caught:
        Trainer(config()).generate(PROMPT)
    assert "\n" not in str(caught.value)


def test_load_checkpoint_refuses_a_folder_without_an_adapter(config, tmp_path):
    with pytest.raises(ValueError, match=r"no adapter_config\.json in it"):
        Trainer(config()).load_checkpoint(tmp_path)


@pytest.mark.slow
def test_load_checkpoint_in_a_fresh_process_generates_what_the_trained_policy_does(
    config, pairs_file, tmp_path
):
    trainer = Trainer(config(max_steps=10))
    best = trainer.fit(pairs_file(12)).output_dir / "best"
    answer = trainer.generate(PROMPT, **GREEDY)
    assert trainer.policy is not None
    with adapters_disabled(trainer.policy.model.network):
        assert trainer.generate(PROMPT, **GREEDY) != answer != ""

    script = (
        "import json, sys\n"
        "from lowmem_dpo import TrainConfig, Trainer\n"
        "config = TrainConfig(quantization='none', device='cpu')\n"
        "trainer = Trainer(config).load_checkpoint(sys.argv[1])\n"
        "answer = trainer.generate(sys.argv[2], **json.loads(sys.argv[3]))\n"
        "print(json.dumps(answer))\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", script, str(best), PROMPT, json.dumps(GREEDY)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout.splitlines()[-1]) == answer


def test_generate_refuses_settings_that_are_no_sampling_settings(config, pairs_file):
    trainer = Trainer(config(max_steps=1))
    trainer.fit(str(pairs_file(4)))
    with pytest.raises(ValueError, match="generate has no setting system_prompt"):
        trainer.generate("hello", system_prompt="x")
    with pytest.raises(ValueError, match="top_p must be in"):
        trainer.generate("hello", top_p=2.0)


def test_a_run_of_one_step_trains(config, pairs_file):
    result = Trainer(config(batch_size=64)).fit(str(pairs_file(6)))
    assert result.num_steps == 1 and result.metrics["learning_rate"] == 1e-2
    weights = load_file(result.output_dir / "adapter" / "adapter_model.safetensors")
    assert all(tensor.any() for name, tensor in weights.items() if "lora_B" in name)


def test_numbers_that_are_none_are_never_saved(config, pairs_file, tmp_path):
    wild = {"optim": "sgd", "learning_rate": 3e38, "lr_scheduler_type": "constant"}
    wild |= {"beta": 1000.0, "max_grad_norm": 0.0, "max_steps": 1}
    with pytest.raises(RunStopped, match="NaN or infinite"):
        Trainer(config(**wild)).fit(str(pairs_file(8)))
    assert not (tmp_path / "out" / "adapter").exists()
    assert not (tmp_path / "out" / "best").exists()


def test_config_yaml_of_a_run_from_python_repeats_it(config, pairs_file, tmp_path):
    first = Trainer(config(max_steps=2)).fit(str(pairs_file(8)))
    words = ["train", "--config", str(first.output_dir / "config.yaml")]
    assert main([*words, "--output_dir", str(tmp_path / "again")]) == 0
    assert read_metrics(tmp_path / "again")[-1]["loss"] == first.final_loss


def test_token_ids_beyond_the_embedding_are_named_before_weights_are_read(
    config, pairs_file, llama_dir, tmp_path, monkeypatch
):
    broken = tmp_path / "model"
    shutil.copytree(llama_dir, broken)
    described = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(described | {"vocab_size": 100}))
    with pytest.raises(ValueError, match="the model's embedding has 100 rows"):
        Trainer(config(model=str(broken))).fit(str(pairs_file(4)))


def test_the_template_of_a_run_goes_with_its_adapter(config, pairs_file, tmp_path):
    template = tmp_path / "own.jinja"
    template.write_text(
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    settings = config(chat_template=str(template), max_steps=1)
    trainer = Trainer(settings)
    result = trainer.fit(str(pairs_file(4)))
    later = Trainer(TrainConfig(device="cpu")).load_checkpoint(result.output_dir / "best")
    rendered = render_prompt(later.policy.tokenizer, "hi", TemplateSettings())
    assert later.policy.tokenizer.decode(rendered) == "[user]hi<|end|>[assistant]"
    assert trainer.policy.tokenizer.chat_template != template.read_text()  # its own is untouched


def test_load_checkpoint_of_a_run_that_began_from_an_adapter_folder(config, pairs_file, tmp_path):
    first = Trainer(config(max_steps=2)).fit(str(pairs_file(8)))
    start = str(first.output_dir / "adapter")
    settings = config(model=start, output_dir=str(tmp_path / "second"), max_steps=2)
    second = Trainer(settings)
    result = second.fit(str(pairs_file(8)))
    later = Trainer(settings).load_checkpoint(result.output_dir / "best")
    assert later.generate(PROMPT, **GREEDY) == second.generate(PROMPT, **GREEDY)


def test_second_start_reads_the_quantised_copy_and_computes_the_same(
    config, pairs_file, tmp_path, monkeypatch, capsys
):
    path = pairs_file(8)
    first = Trainer(config(quantization="nf4", max_steps=3)).fit(path)
    printed = " ".join(capsys.readouterr().out.split())
    assert "quantised; the next start reads the copy" in printed and "8 to score" in printed
    monkeypatch.setattr(
        "lowmem_dpo.weights.loading.quantize_nf4", lambda weight: pytest.fail("quantised again")
    )
    again = config(quantization="nf4", max_steps=3, output_dir=str(tmp_path / "again"))
    second = Trainer(again).fit(path)
    printed = " ".join(capsys.readouterr().out.split())
    assert "read from its quantised copy" in printed and "0 to score" in printed
    assert read_record(second.output_dir)["step_zero"]["exact"] is True
    assert second.final_loss == first.final_loss
    weights = [
        load_file(result.output_dir / "adapter" / "adapter_model.safetensors")
        for result in (first, second)
    ]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])


def test_fit_trains_on_a_bitsandbytes_checkpoint(config, pairs_file, tmp_path, llama_dir, capsys):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["lm_head", "q_proj"]
    )
    folder = tmp_path / "bnb"
    shutil.copytree(llama_dir, folder)
    (folder / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(llama_dir, quantization_config=settings).save_pretrained(
        folder
    )
    trainer = Trainer(config(model=str(folder), quantization="nf4", max_steps=2))
    result = trainer.fit(pairs_file(8))
    assert read_record(result.output_dir)["step_zero"]["exact"] is True
    assert "is quantised already and taken as it is; 2 of its 14" in capsys.readouterr().out
    again = Trainer(config(model=str(folder), quantization="nf4"))
    again.load_checkpoint(result.output_dir / "adapter")
    assert again.generate(PROMPT, **GREEDY) == trainer.generate(PROMPT, **GREEDY)
    with pytest.raises(ValueError, match="quantization none cannot give its full precision"):
        Trainer(config(model=str(folder), output_dir=str(tmp_path / "x"))).fit(pairs_file(8))

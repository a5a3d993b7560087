import json
import re
from dataclasses import replace

import pytest

from lowmem_dpo.cli import main
from lowmem_dpo.demo.byte_tokenizer import byte_tokenizer
from lowmem_dpo.pipeline import plan as plan_verb
from lowmem_dpo.pipeline.plan import find_longest
from tests.errors import one_line_error
from tests.tiny import save_tiny_model


def plan(model, *words):
    return main(["plan", "--model", str(model), *words])


@pytest.fixture(scope="module")
def config_only(tmp_path_factory):
    """A model folder with nothing but config.json."""
    folder = save_tiny_model(tmp_path_factory.mktemp("m"), num_hidden_layers=3)
    for path in folder.iterdir():
        if path.name != "config.json":
            path.unlink()
    return folder


def test_plan_prints_a_table_from_config_json_alone(config_only, capsys):
    assert plan(config_only, "--card", "rtx 3060", "--max_length", "64") == 0
    printed = capsys.readouterr().out
    assert "on RTX 3060 12 GB (12.0 GiB): fits" in printed
    assert "rehearsed on tensors without memory, not measured" in printed
    assert "CUDA's context (assumed)" in printed and "│ all" in printed
    assert (
        "longest max_length that fits, with the least on the card: 512" in printed
    )  # all positions that it has
    assert max(map(len, printed.splitlines()[2:])) <= 80


@pytest.mark.slow
def test_plan_as_json_is_one_object(config_only, capsys):
    words = ["--card", "T4", "--max_length", "32", "--batch_size", "3", "--json", "true"]
    assert plan(config_only, *words, "--optim", "adamw_8bit") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["card"] == "T4" and found["fits"] is True and found["is_measured"] is False
    assert found["plan"]["optim"] == "adamw_8bit" and found["plan"]["max_length"] == 32
    assert found["plan"]["pack_tokens"] % 128 == 0
    low, high = found["seconds_per_step"]
    assert 0 < low < high
    assert 0 < found["peak_allocated_bytes"] <= found["peak_reserved_bytes"]
    assert 0 < sum(found["components"].values()) <= found["peak_allocated_bytes"]
    assert found["longest_max_length"] == 512


@pytest.mark.slow
def test_plan_says_what_would_make_a_step_fit(tmp_path, capsys):
    model = save_tiny_model(tmp_path / "m", vocab_size=200_000)
    words = ["--card", "3090", "--max_length", "64", "--lora_r", "1", "--json", "true"]

    def planned(*more):
        assert plan(model, *words, *more) == 0
        return json.loads(capsys.readouterr().out)

    here, there = planned(), planned("--head_weight", "host")
    assert here["fits"] and here["remedy"] is None
    assert there["plan"]["head_on_host"] and not there["plan"]["embedding_on_host"]
    between = f"{(here['peak_reserved_bytes'] + there['peak_reserved_bytes']) // 2}B"
    by_itself = planned("--memory_limit", between)
    assert by_itself["fits"] and by_itself["plan"]["embedding_on_host"]
    held = planned("--memory_limit", between, "--embedding_weight=device", "--head_weight=device")
    assert not held["fits"]
    assert held["remedy"] == "leave embedding_weight, head_weight out"
    nothing = planned("--memory_limit", "20MiB")
    assert (nothing["fits"], nothing["remedy"], nothing["longest_max_length"]) == (
        False,
        None,
        None,
    )


@pytest.mark.slow
def test_plan_of_all_cards_says_which_lengths_fit(tmp_path, capsys, monkeypatch):
    model = save_tiny_model(tmp_path / "m", vocab_size=200_000, max_position_embeddings=1024)
    cards = {card.name: card for card in plan_verb.CARDS}
    small = 60 * 2**20 + plan_verb.CONTEXT_BYTES  # less than embedding and head
    tiny = [replace(cards[name], memory_bytes=small) for name in ("T4", "RTX 3060 12 GB")]
    full = replace(cards["RTX 4090"], memory_bytes=plan_verb.CONTEXT_BYTES)
    monkeypatch.setattr(plan_verb, "CARDS", (*tiny, full, cards["RTX 3090"]))
    assert plan(model, "--all_cards", "true", "--lora_r", "1", "--json", "true") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["RTX 3090"] == {"512": "yes", "1024": "yes"}
    assert found["RTX 4090"] == {"512": "no", "1024": "no"}
    assert found["T4"] == found["RTX 3060 12 GB"] == {"512": "host", "1024": "host"}
    assert plan(model, "--all_cards", "true", "--lora_r", "1") == 0
    printed = capsys.readouterr().out
    assert re.search(r"RTX 3060 12 GB +│ host +│ host", printed)
    assert max(map(len, printed.splitlines()[2:])) <= 80


@pytest.mark.slow
def test_smallest_puts_on_the_host_what_can_be_there(config_only, tmp_path, capsys):
    words = ["--card", "3060", "--max_length", "64", "--smallest", "true", "--json", "true"]
    assert plan(config_only, *words) == 0
    found = json.loads(capsys.readouterr().out)["plan"]
    assert found["optim"] == "adamw_8bit" and found["num_slots"] == 2
    places = ("inputs_on_host", "embedding_on_host", "head_on_host")
    assert all(found[name] for name in places)
    tied = save_tiny_model(tmp_path / "tied", "llama-tied")
    assert plan(tied, *words, "--quantization", "none") == 0
    found = json.loads(capsys.readouterr().out)["plan"]
    assert [found[name] for name in places] == [True, False, False] and found["num_slots"] is None


def test_plan_refuses_what_is_missing_or_without_effect(config_only, tmp_path, capsys):
    for words, message in (
        (["--card", "3080"], "may be RTX 3080 10 GB or RTX 3080 12 GB; say which"),
        (["--card", "potato"], "card 'potato' is not known; near names:"),
        (["--card", "3060", "--device", "cpu"], "device=cpu has no effect on a plan"),
        (["--card", "3060", "--pack_tokens", "128"], "pack_tokens 128 is less than"),
        (["--card", "3060", "--max_length", "1"], "max_length must be at least 2"),
        (
            ["--card", "3060", "--smallest", "true", "--keep_activations", "all"],
            "keep_activations=all has no effect with smallest=True",
        ),
        (
            ["--card", "3060", "--smallest", "true", "--optimizer_state", "host"],
            "optimizer_state=host has no effect with smallest=True",
        ),
        (["--all_cards", "true", "--card", "3060"], "card=3060 has no effect with all_cards=True"),
        (["--card", "T4", "--dtype", "bfloat16"], "the card has no bfloat16"),
        (
            ["--card", "3060", "--quantization", "none", "--layer_weights", "host"],
            "layer_weights host is for NF4",
        ),
        (
            ["--card", "3060", "--kernels", "norms", "--head_kernel", "fused"],
            "head_kernel fused is not among kernels",
        ),
    ):
        assert plan(config_only, *words) == 2
        assert message in one_line_error(capsys)
    assert main(["plan", "--card", "3060"]) == 2
    assert "no model given" in one_line_error(capsys)
    tied = save_tiny_model(tmp_path / "tied", "llama-tied")
    assert plan(tied, "--card", "3060", "--head_weight", "host") == 2
    assert "head_weight host cannot be" in one_line_error(capsys)


@pytest.mark.parametrize("per_token", [1, 7, 1000])
@pytest.mark.parametrize("base", [0, 5_000, 900_000])
@pytest.mark.parametrize("start", [64, 1024, 3000])
@pytest.mark.parametrize("step", [0, 3000])
def test_find_longest_ends_below_the_limit_and_close_to_it(per_token, base, start, step):
    """Memory that grows with the length, with jumps."""
    limit, bound, asked = 1_000_000, 100_000, []

    def needs(length):
        asked.append(length)
        nbytes = base + per_token * length + (length // 512) * step
        return nbytes, nbytes <= limit

    longest = find_longest(needs, (start, needs(start)), bound, limit)
    assert len(asked) <= (4 if step == 0 and limit - base > 500_000 else 10)
    lengths = range(64, bound + 1, 64)
    exact = max((n for n in (*lengths, start) if needs(n)[1]), default=None)
    if exact is None:
        assert longest is None
    else:
        assert longest is not None and needs(longest)[1]
        assert exact - longest <= max(64, longest / 25)


@pytest.fixture(scope="module")
def preferences(tmp_path_factory):
    folder = tmp_path_factory.mktemp("with_tokenizer")
    model = save_tiny_model(folder / "m", num_hidden_layers=3, vocab_size=300)
    byte_tokenizer().save_pretrained(model)
    (model / "model.safetensors").unlink()
    rows = [{"prompt": "p" * n, "chosen": "c" * 9, "rejected": "r" * n} for n in range(3, 23)]
    data = folder / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return model, data


def test_plan_of_a_file_of_pairs_forecasts_the_run(preferences, capsys, tmp_path):
    model, data = preferences
    picture = tmp_path / "memory.png"
    words = ["--data", str(data), "--card", "3060", "--batch_size", "4", "--num_train_epochs", "3"]
    words += ["--cache_dir", str(tmp_path), "--picture", str(picture)]
    assert plan(model, *words, "--json", "true") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["num_steps"] == 15
    assert 0 < found["reference_seconds"][0] < found["reference_seconds"][1]
    assert found["plan"]["micro_batches_per_step"] >= 1
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert plan(model, *words) == 0
    printed = capsys.readouterr().out
    assert f"20 pairs of {data}, the longest of" in printed
    assert "a run of 15 steps takes" in printed and "the reference's pass included" in printed


def test_plan_takes_the_settings_file_of_a_run(preferences, capsys, tmp_path):
    model, data = preferences
    file = tmp_path / "run.yaml"
    file.write_text(f"model: {model}\ndata: {data}\nlearning_rate: 1.0e-4\nsave_strategy: 'no'\n")
    words = ["plan", "--config", str(file), "--card", "3060", "--cache_dir", str(tmp_path)]
    assert main(words) == 0
    assert "20 pairs of" in capsys.readouterr().out


def test_find_longest_goes_on_where_longer_needs_no_more():
    """As in tiny models, and where a micro-batch is no longer than its smallest size."""
    for start in (32, 64, 100, 1000):
        assert find_longest(lambda length: (5, True), (start, (5, True)), 4096, 10) == 4096
    assert find_longest(lambda length: (50, False), (1000, (50, False)), 4096, 10) is None

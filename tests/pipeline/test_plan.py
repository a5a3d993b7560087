import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest

from lowmem_dpo.cli import main
from lowmem_dpo.demo.byte_tokenizer import byte_tokenizer
from lowmem_dpo.machine.card_table import find_card
from lowmem_dpo.pipeline import plan as plan_verb
from lowmem_dpo.pipeline.plan import find_longest
from lowmem_dpo.settings.configs import PlanConfig
from lowmem_dpo.weights.folders import load_config
from tests.errors import one_line_error
from tests.rehearsals import follow_once
from tests.tiny import save_tiny_model


def plan(model, *words):
    return main(["plan", "--model", str(model), *words])


@pytest.fixture(autouse=True)
def _followed_once(monkeypatch):
    follow_once(monkeypatch)


@pytest.fixture(scope="module")
def config_only(tmp_path_factory):
    """A model folder with nothing but config.json."""
    folder = save_tiny_model(tmp_path_factory.mktemp("m"), num_hidden_layers=1)
    for path in folder.iterdir():
        if path.name != "config.json":
            path.unlink()
    return folder


def test_plan_prints_a_table_from_config_json_alone(config_only, capsys):
    words = ["--max_length", "64", "--batch_size", "2"]
    assert plan(config_only, "--card", "rtx 3060", *words) == 0
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
            ["--card", "3060", "--layer_weights", "disk", "--quantized_copy", "false"],
            "leave it or quantized_copy false out",
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
    model = save_tiny_model(folder / "m", num_hidden_layers=1, vocab_size=300)
    byte_tokenizer().save_pretrained(model)
    (model / "model.safetensors").unlink()
    rows = [{"prompt": "p" * n, "chosen": "c" * 9, "rejected": "r" * n} for n in range(3, 23)]
    data = folder / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return model, data


@pytest.mark.slow
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


def test_the_references_pass_is_of_the_pairs_that_need_it(preferences, monkeypatch, tmp_path):
    """Not of pairs that no step takes, and of none where the losses have no reference."""
    model, data = preferences
    config = PlanConfig(model=str(model), data=str(data), batch_size=4, cache_dir=str(tmp_path))
    taken = SimpleNamespace(levers=None, pack_tokens=0, fits=True, seconds=(1.0, 2.0))
    taken.take, taken.best = lambda *_: taken, lambda: taken
    monkeypatch.setattr(plan_verb, "planner_of", lambda *_: taken)
    monkeypatch.setattr(plan_verb, "longest_length", lambda *_: None)
    monkeypatch.setattr(plan_verb, "replace", lambda planner, **_: planner)

    def seconds(**changes):
        settings = replace(config, **changes)
        found = plan_verb.forecast_of(load_config(str(model)), None, None, settings, str(model))
        return found.reference_seconds

    assert seconds() == (5.0, 10.0)
    assert seconds(max_steps=2) == (2.0, 4.0)
    assert seconds(reference_free=True) is None


def test_the_card_here_is_planned_with_the_host_memory_that_is_here(monkeypatch):
    monkeypatch.setattr(plan_verb, "this_machine", lambda: SimpleNamespace(cards=[1]))
    monkeypatch.setattr(plan_verb.torch, "zeros", lambda *_, **__: None)
    monkeypatch.setattr(plan_verb, "card_of", lambda device: find_card("3060"))
    monkeypatch.setattr(plan_verb, "free_bytes", lambda device: 2**33)
    monkeypatch.setattr(plan_verb, "available_host_bytes", lambda: 2**34)
    assert plan_verb._card_and_room(PlanConfig())[1] == (2**33, 2**34)
    limits = PlanConfig(memory_limit="1GiB", host_memory_limit="2GiB")
    assert plan_verb._card_and_room(limits)[1] == (2**30, 2**31)
    card, room = plan_verb._card_and_room(PlanConfig(card="3060"))
    assert room == (card.memory_bytes - plan_verb.CONTEXT_BYTES, None)


def test_plan_counts_no_pass_of_a_reference_where_none_is_taken(preferences, capsys, tmp_path):
    model, data = preferences
    words = ["--data", str(data), "--card", "3060", "--cache_dir", str(tmp_path)]
    assert plan(model, *words, "--reference_free", "true", "--json", "true") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["num_steps"] == 2 and found["reference_seconds"] is None
    assert plan(model, *words, "--reference_free", "true") == 0
    printed = capsys.readouterr().out
    assert "a run of 2 steps takes" in printed and "reference's pass" not in printed


def test_plan_takes_the_settings_file_of_a_run(preferences, capsys, tmp_path):
    model, data = preferences
    file = tmp_path / "run.yaml"
    file.write_text(f"model: {model}\ndata: {data}\nlearning_rate: 1.0e-4\nsave_strategy: 'no'\n")
    words = ["plan", "--config", str(file), "--card", "3060", "--cache_dir", str(tmp_path)]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "20 pairs of" in printed and "the reference's pass included" in printed


def test_find_longest_goes_on_where_longer_needs_no_more():
    """As in tiny models, and where a micro-batch is no longer than its smallest size."""
    for start in (32, 64, 100, 1000):
        assert find_longest(lambda length: (5, True), (start, (5, True)), 4096, 10) == 4096
    assert find_longest(lambda length: (50, False), (1000, (50, False)), 4096, 10) is None


def test_json_stands_alone_whatever_is_said_on_the_way(config_only, capsys):
    words = ["--card", "3060", "--max_length", "64", "--pack_tokens", "200", "--json", "true"]
    assert plan(config_only, *words) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["plan"]["pack_tokens"] == 256
    assert "pack_tokens 200: 256, on a card it is a multiple of 128" in printed.err


@pytest.mark.slow
def test_plan_that_fits_names_a_longest_length_though_the_host_is_short(tmp_path, capsys):
    """The smallest plan needs the host; the one that fits does not."""
    model = save_tiny_model(tmp_path / "m", vocab_size=20_000, max_position_embeddings=256)
    words = ["--card", "3060", "--max_length", "64", "--lora_r", "1"]
    assert plan(model, *words, "--host_memory_limit", "1MiB", "--json", "true") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] and not found["plan"]["embedding_on_host"]
    assert found["longest_max_length"] == 256
    assert plan(model, *words, "--host_memory_limit", "1KiB") == 0
    printed = capsys.readouterr().out
    assert "does not fit" in printed and "and host_memory_limit is 1KiB" in printed
    assert "no max_length fits in so little host memory" in printed


def test_find_longest_where_the_bytes_do_not_tell_why_a_length_does_not_fit():
    """As where it is the host that is short."""
    asked = []

    def needs(length):
        asked.append(length)
        return length, length <= 5000

    longest = find_longest(needs, (64, needs(64)), 100_000, 50_000)
    assert longest is not None and 4500 < longest <= 5000
    assert len(asked) <= 10


@pytest.mark.slow
def test_a_micro_batch_that_is_too_large_is_what_is_named(tmp_path, capsys):
    model = save_tiny_model(tmp_path / "m", max_position_embeddings=64)
    words = ["--card", "3060", "--max_length", "64", "--memory_limit", "8MiB", "--json", "true"]
    assert plan(model, *words, "--pack_tokens", "20000") == 0
    found = json.loads(capsys.readouterr().out)
    assert not found["fits"] and found["remedy"] == "leave pack_tokens out"
    assert plan(model, *words) == 0
    assert json.loads(capsys.readouterr().out)["fits"]


def test_plan_refuses_numbers_beyond_all_sense(config_only, capsys):
    words = ["--card", "3060", "--max_length"]
    assert plan(config_only, *words, "1000000000") == 2
    assert "max_length 1000000000 is more than the 1048576 tokens" in one_line_error(capsys)
    assert plan(config_only, *words, "64", "--memory_limit", "13GB") == 2
    assert "memory_limit 13.0GB is more than the card has (12.9GB)" in one_line_error(capsys)


def test_plan_says_which_lengths_a_model_was_not_made_for(config_only, capsys):
    assert plan(config_only, "--card", "3060", "--max_length", "600") == 0
    said = "the longest sequence has 600 tokens, the model was made for 512; set max_length 512"
    assert said in capsys.readouterr().out


def test_a_place_for_the_picture_is_looked_at_before_anything_is_rehearsed(
    config_only, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(plan_verb, "forecast_of", None)
    for place, why in ((tmp_path / "no" / "x.png", "is in no folder"), (tmp_path, "is no file")):
        assert plan(config_only, "--card", "3060", "--picture", str(place)) == 2
        assert f"picture {place} {why}" in one_line_error(capsys)

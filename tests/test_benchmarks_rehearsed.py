"""The benchmarks of rehearsals run, and their searches find what is there."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
HAS_PEERS = all(map(importlib.util.find_spec, ("trl", "peft", "bitsandbytes")))
TINY = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_hidden_layers": 7,
    "vocab_size": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture
def tiny_config(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "path", list(sys.path))  # the benchmarks add to it
    config = json.loads((BENCHMARKS / "configs" / "llama-3.1-8b" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | TINY))
    return str(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_PEERS, reason="needs trl, peft and bitsandbytes")
def test_rehearsed_peers_counts_the_products_of_both_sides(tiny_config, tmp_path, capsys):
    import rehearsed_peers

    words = ["--model", tiny_config, "--lengths", "64", "--pairs", "2", "--batches", "1,2"]
    output = tmp_path / "peers.json"
    rehearsed_peers.main([*words, "--cards", "RTX 3090", "--output", str(output)])
    (result,) = json.loads(output.read_text())["results"]
    rows = {row["impl"]: row for row in result["rows"]}
    # Four sequences of 64 tokens, through linears three times; a reference is once more.
    linears = 7 * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 256)
    once = 2 * 4 * 64 * linears
    before = rows["TRL, 2 a micro-batch, reference before"]["flops"]
    assert 3 * once < before < 5 * once  # adapters, head and attention
    assert rows["TRL, 2 a micro-batch, reference in the step"]["flops"] > before + once
    assert rows["TRL, 1 a micro-batch, reference before"]["flops"] == pytest.approx(
        before, rel=0.01
    )
    ours = min(row["flops"] for row in rows.values())
    assert ours < before
    assert "rehearsed, not measured" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(not HAS_PEERS, reason="needs trl, peft and bitsandbytes")
def test_a_peer_extended_from_one_layer_agrees_with_one_extended_from_five(tiny_config):
    from _peer_steps import PeerStep, peer_work, shortest, totals_of_peer, trace_peer
    from _rehearsals import TreeShape, model_config, rehearsed

    from lowmem_dpo.machine.card_table import find_card

    config, card = model_config(tiny_config), find_card("3090")
    step = PeerStep((TreeShape(20, 30, 25), TreeShape(10, 5, 40)), with_reference=True)
    found = rehearsed(trace_peer(config, step), card)
    parts = totals_of_peer(7, card, peer_work(shortest(config), step))
    assert sum(part.flops for part in parts) == pytest.approx(found.flops, rel=1e-12)
    assert sum(part.launches for part in parts) == found.launches
    assert sum(part.nbytes for part in parts) == pytest.approx(found.bytes_moved, rel=1e-3)


def test_longest_within_takes_few_rehearsals(tiny_config):
    import max_context

    asked = []

    def follow(length):
        asked.append(length)
        return 1000 + 10 * length

    def longest(limit):
        return max_context.longest_within(limit, {}, follow, 4096, 131072)

    assert 96_000 < longest(1_001_000) <= 100_000
    assert len(asked) <= 4
    assert longest(10_000_000) == 131072
    assert longest(40_000) is None


@pytest.mark.slow
def test_max_context_says_how_long_a_pair_may_be(tiny_config, tmp_path, capsys):
    import max_context

    output = tmp_path / "context.json"
    words = ["--model", tiny_config, "--parts", "lengths", "--limits", "4", "--levers", "streamed"]
    words += ["--first", "128", "--most", "512", "--output", str(output)]
    max_context.main(words)
    (result,) = json.loads(output.read_text())["results"]
    assert result["longest"] == 512 and result["is_most"]
    assert "at least 512 tokens" in capsys.readouterr().out

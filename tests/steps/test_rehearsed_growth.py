"""What the memory of a step grows with: tokens of a micro-batch alone, and by how much.

At the shape of Llama-3.1-8B. One layer says it of all: with layer inputs on the host no other layer
has anything on the card but its weights. On the card an input takes 8 kB a token and layer more.
"""

import pytest
from transformers import AutoConfig

from lowmem_dpo.machine.card_table import find_card
from lowmem_dpo.memory.levers import LEAST_SLOTS, Levers
from lowmem_dpo.model.layer import TILE_ROWS
from lowmem_dpo.steps.rehearsed import TreeShape, rehearse, tree_of_shape
from tests.steps.test_rehearsed_card import SHAPE_8B, settings_of

BYTES_PER_TOKEN = 98_000
USUAL = Levers()
RESIDENT = Levers(inputs_on_host=True, embedding_on_host=True, head_on_host=True)
STREAMED = Levers(
    inputs_on_host=True, embedding_on_host=True, head_on_host=True, num_slots=LEAST_SLOTS
)


def step(levers, num_tokens, *, pairs=1, vocab_size=SHAPE_8B["vocab_size"]):
    """A step of micro-batches of a pair, prompt as long as each completion."""
    shape = SHAPE_8B | {"num_hidden_layers": 1, "vocab_size": vocab_size}
    third = num_tokens // 3
    tree = tree_of_shape(TreeShape(third, third, third))
    config, settings = AutoConfig.for_model(**shape), settings_of(optim="adamw_8bit")
    packs = [[tree]] * pairs
    return rehearse(config, find_card("3090"), settings, levers, packs, pack_tokens=num_tokens)


def test_memory_is_a_line_in_tokens_of_at_most_98_kb_each():
    few, more, most = (step(RESIDENT, n * TILE_ROWS).peak_allocated_bytes for n in (2, 3, 4))
    assert most - few <= 2 * TILE_ROWS * BYTES_PER_TOKEN
    assert most - more == pytest.approx(more - few, rel=0.02)


def test_memory_grows_by_at_most_98_kb_a_token_where_weights_are_streamed():
    few, more = (step(STREAMED, n * TILE_ROWS).peak_allocated_bytes for n in (2, 3))
    assert more - few <= TILE_ROWS * BYTES_PER_TOKEN


def test_memory_does_not_grow_with_the_vocabulary_beside_embedding_and_head():
    small, large = (step(USUAL, 1536, vocab_size=n) for n in (32_000, 256_000))
    weights = [found.components["embedding"] + found.components["head"] for found in (small, large)]
    assert weights[1] == 8 * weights[0]
    beside = [f.peak_allocated_bytes - w for f, w in zip((small, large), weights, strict=True)]
    assert beside[0] == beside[1]


def test_memory_grows_with_the_pairs_of_a_step_by_a_few_numbers_each():
    few, many = (step(RESIDENT, 384, pairs=n) for n in (2, 5))
    assert abs(many.peak_allocated_bytes - few.peak_allocated_bytes) <= 3 * 8192

from dataclasses import replace

import pytest

from lowmem_dpo.tokens.encoding import TokenPair
from lowmem_dpo.tokens.split import prompt_key, split_by_prompt


def pairs(*prompts: int) -> list[TokenPair]:
    return [TokenPair(i, (p, 50, i), (p, 51, i), 1, 1) for i, p in enumerate(prompts)]


@pytest.mark.parametrize("seed", range(5))
def test_split_by_prompt_never_puts_a_prompt_on_both_sides(seed):
    given = pairs(*[i % 9 for i in range(60)])
    train, held_out = split_by_prompt(given, 0.2, seed)
    prompts = [{p.chosen_ids[0] for p in side} for side in (train, held_out)]
    assert not prompts[0] & prompts[1]
    assert sorted(p.row for p in train + held_out) == list(range(60))
    assert 12 <= len(held_out) <= 12 + 7  # at most one prompt's pairs more than asked


@pytest.mark.parametrize("seed", range(5))
def test_split_by_prompt_goes_by_the_key_where_ids_differ(seed):
    given = [replace(p, prompt_key=f"key {p.row % 4}") for p in pairs(*range(40))]
    train, held_out = split_by_prompt(given, 0.2, seed)
    assert not {p.prompt_key for p in train} & {p.prompt_key for p in held_out}
    assert len(held_out) == 10


def test_split_by_prompt_depends_on_the_seed_alone():
    given = pairs(*range(40))
    assert split_by_prompt(given, 0.25, 1) == split_by_prompt(given, 0.25, 1)
    assert split_by_prompt(given, 0.25, 1) != split_by_prompt(given, 0.25, 2)


def test_split_by_prompt_of_nothing_holds_nothing_out():
    given = pairs(1, 2, 3)
    assert split_by_prompt(given, 0.0, 1) == (given, [])


def test_split_by_prompt_refuses_to_leave_a_side_empty():
    with pytest.raises(ValueError, match="leaves one side empty"):
        split_by_prompt(pairs(7, 7, 7), 0.5, 1)


def test_prompt_key_falls_back_to_the_ids_before_the_answer():
    one, other = pairs(1, 2)
    assert prompt_key(one) == prompt_key(replace(one, row=9, rejected_ids=(1, 7)))
    assert prompt_key(one) != prompt_key(other)
    assert prompt_key(replace(one, prompt_key="k")) == "k"

from dataclasses import replace

import pytest

from lowmem_dpo.tokens.split import split_by_prompt
from lowmem_dpo.tokens.trees import TokenPair, Tree, build_tree


def pairs(*prompts: int) -> list[Tree]:
    sides = [([p, 50, i], [p, 51, i]) for i, p in enumerate(prompts)]
    return [
        build_tree(TokenPair(i, *ids, 1, 1, f"{ids[0][0]:032x}")) for i, ids in enumerate(sides)
    ]


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

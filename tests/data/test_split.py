import pytest

from lowmem_dpo.data.split import prompt_ids, split_by_prompt
from lowmem_dpo.data.templates import TokenPair


def pairs(*prompts: int) -> list[TokenPair]:
    return [TokenPair(i, (p, 50, i), (p, 51, i), 1, 1) for i, p in enumerate(prompts)]


@pytest.mark.parametrize("seed", range(5))
def test_split_by_prompt_never_puts_a_prompt_on_both_sides(seed):
    given = pairs(*[i % 9 for i in range(60)])
    train, held_out = split_by_prompt(given, 0.2, seed)
    assert not {prompt_ids(p) for p in train} & {prompt_ids(p) for p in held_out}
    assert sorted(p.row for p in train + held_out) == list(range(60))
    assert 12 <= len(held_out) <= 12 + 7  # at most one prompt's pairs more than asked


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

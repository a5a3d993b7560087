from dataclasses import dataclass, field

import pytest

from lowmem_dpo.settings.fields import (
    COUNT,
    COUNT_OR_NONE,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    Bounds,
    Settings,
    check_unused,
)


@dataclass(frozen=True)
class Values(Settings):
    rate: float = field(default=0.5, metadata=POSITIVE)
    decay: float = field(default=0.0, metadata=NOT_NEGATIVE)
    share: float = field(default=0.25, metadata=SHARE)
    rank: int = field(default=16, metadata=COUNT | {"must be at most 64": Bounds(at_most=64)})
    steps: int | None = field(default=None, metadata=COUNT_OR_NONE)
    names: str | list[str] = "all"


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("rate", 0, "rate must be > 0, got 0.0; the usual value is 0.5"),
        ("decay", -1e-9, "decay must be >= 0, got -1e-09; the usual value is 0.0"),
        ("share", -0.1, "share must be in [0, 1), got -0.1; the usual value is 0.25"),
        ("share", 1, "share must be in [0, 1), got 1.0; the usual value is 0.25"),
        ("rank", 0, "rank must be at least 1, got 0; the usual value is 16"),
        ("rank", 65, "rank must be at most 64, got 65; the usual value is 16"),
        ("steps", 0, "steps must be at least 1, or left out, got 0"),
    ],
)
def test_settings_refuse_what_is_out_of_bounds(name, value, rule):
    with pytest.raises(ValueError) as error:
        Values(**{name: value})
    assert str(error.value) == rule


def test_settings_take_what_lies_on_a_bound_that_is_within():
    values = Values(rate=1e-16, decay=0, share=0, rank=64, steps=1)
    assert (values.decay, type(values.decay), values.rank, values.steps) == (0.0, float, 64, 1)
    assert Values(rank=1, steps=None).steps is None


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("all", "all"),
        ("q", ["q"]),
        ("q, v", ["q", "v"]),
        ("[q,v]", ["q", "v"]),
        ("", []),
        (["q"], ["q"]),
        ("[q]", ["q"]),
        ('["q", "v"]', ["q", "v"]),
        (["all"], "all"),
        ("[all]", "all"),
    ],
)
def test_settings_turn_names_in_a_text_into_a_list_but_for_the_default(given, expected):
    assert Values(names=given).names == expected


def test_check_unused_refuses_what_differs_from_the_default():
    check_unused(Values(rank=4), "rank", "rate", "steps")
    with pytest.raises(ValueError, match=r"rate=2\.0 has no effect with rank=4; leave one out"):
        check_unused(Values(rank=4, rate=2), "rank", "steps", "rate")

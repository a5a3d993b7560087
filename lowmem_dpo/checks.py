"""What the checks of every config dataclass share: types, bounds, settings without effect.

A check raises ValueError with the setting, what it got and how to mend it.
"""

import dataclasses
import math
import os
import sys
from typing import Any, Literal, get_args, get_origin

# Settings that name a file or folder (or a model): never empty; os.PathLike is taken too.
_PATHS = {"model", "data", "eval_data", "output_dir", "init_adapter", "resume", "cache_dir"}
_PATHS |= {"adapter", "prompts"}


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Where a number must lie: above or at_least this, below or at_most that."""

    above: float = -math.inf
    at_least: float = -math.inf
    below: float = math.inf
    at_most: float = math.inf


# What stands beside a field as its metadata: rules in words, and the bounds that they mean.
POSITIVE = {"must be > 0": Bounds(above=0)}
NOT_NEGATIVE = {"must be >= 0": Bounds(at_least=0)}
SHARE = {"must be in [0, 1)": Bounds(at_least=0, below=1)}
COUNT = {"must be at least 1": Bounds(at_least=1)}
COUNT_OR_NONE = {"must be at least 1, or left out": Bounds(at_least=1)}


def check_values(config: Any) -> None:
    """Hold every value against its field's type and bounds, and bring it into shape.

    Paths become text, and whole numbers floats where a float is asked for. Where one name or a list
    is asked for, another text than the default becomes the list of the names in it.
    """
    for f in dataclasses.fields(config):
        value, kinds = getattr(config, f.name), get_args(f.type) or (f.type,)
        if f.name in _PATHS:
            value = os.fspath(value) if isinstance(value, os.PathLike) else value
            if isinstance(value, str) and not value.strip():
                raise ValueError(f"{f.name} is empty; give a path, or leave it out")
        if get_origin(f.type) is Literal:
            if value not in kinds:
                raise ValueError(f"{f.name} must be one of {', '.join(kinds)}, got {value!r}")
            continue
        if f.type == str | list[str] and isinstance(value, str) and value != f.default:
            value = [name.strip() for name in value.strip("[] ").split(",") if name.strip()]
        kinds = (dict,) if get_origin(f.type) is dict else tuple(get_origin(k) or k for k in kinds)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if float in kinds and is_number:
            if not abs(value) <= sys.float_info.max:  # of an int too, and of nan
                raise ValueError(f"{f.name} must be a finite number, got {str(value)[:20]}")
            value = float(value)
        elif not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise ValueError(f"{f.name} must be {type_name(f.type)}, got {value!r}")
        for rule, bounds in f.metadata.items() if value is not None else ():
            is_above = value > bounds.above and value >= bounds.at_least
            if not (is_above and value < bounds.below and value <= bounds.at_most):
                hint = "" if f.default is None else f"; the usual value is {f.default}"
                raise ValueError(f"{f.name} {rule}, got {value}{hint}")
        object.__setattr__(config, f.name, value)


def check_unused(config: Any, cause: str, *names: str) -> None:
    """Refuse settings that were changed although the value of `cause` leaves them no effect."""
    defaults = {f.name: f.default for f in dataclasses.fields(config)}
    for name in names:
        value = getattr(config, name)
        if value != defaults[name]:
            raise ValueError(
                f"{name}={value} has no effect with {cause}={getattr(config, cause)}; leave one out"
            )


def type_name(annotation: Any) -> str:
    """An annotation in words, for messages and tables."""
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(map(str, get_args(annotation)))
    if get_args(annotation):
        return str(annotation).replace("typing.", "")
    return annotation.__name__

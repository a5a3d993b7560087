"""What the checks of every config dataclass share: types, bounds, settings without effect.

A check raises ValueError with the setting, what it got and how to mend it.
"""

import dataclasses
import os
import sys
from typing import Any, Literal, get_args, get_origin

# Settings that name a file or folder (or a model): never empty; os.PathLike is taken too.
_PATHS = {"model", "data", "eval_data", "output_dir", "init_adapter", "resume", "cache_dir"}
_PATHS |= {"adapter", "prompts"}


def check_types(config: Any) -> None:
    """Hold every value against its annotation, for configs built in Python."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if f.name in _PATHS:
            value = _path_text(f.name, value)
            object.__setattr__(config, f.name, value)
        if get_origin(f.type) is Literal:
            choices = get_args(f.type)
            if value not in choices:
                raise ValueError(f"{f.name} must be one of {', '.join(choices)}, got {value!r}")
            continue
        kinds = tuple(get_origin(kind) or kind for kind in get_args(f.type) or (f.type,))
        if get_origin(f.type) is dict:
            kinds = (dict,)
        if float in kinds and isinstance(value, int) and not isinstance(value, bool):
            object.__setattr__(config, f.name, _finite(f.name, value))
        elif not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise ValueError(f"{f.name} must be {type_name(f.type)}, got {value!r}")
        elif isinstance(value, float):
            _finite(f.name, value)


def type_name(annotation: Any) -> str:
    """An annotation in words, for messages and tables."""
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(map(str, get_args(annotation)))
    if get_args(annotation):
        return str(annotation).replace("typing.", "")
    return annotation.__name__


def _path_text(name: str, value: Any) -> Any:
    """A path as text; what is no path is left for the check of types."""
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str) and not value.strip():
        raise ValueError(f"{name} is empty; give a path, or leave it out")
    return value


def _finite(name: str, value: float) -> float:
    if not abs(value) <= sys.float_info.max:  # of an int too, and of nan
        raise ValueError(f"{name} must be a finite number, got {str(value)[:20]}")
    return float(value)


def check(config: Any, name: str, holds: bool, rule: str) -> None:
    """Refuse a value that breaks its rule, naming the usual value."""
    if not holds:
        usual = _default(config, name)
        hint = "" if usual is None else f"; the usual value is {usual}"
        raise ValueError(f"{name} {rule}, got {getattr(config, name)}{hint}")


def check_unused(config: Any, cause: str, *names: str) -> None:
    """Refuse settings that were changed although the value of `cause` leaves them no effect."""
    for name in names:
        value = getattr(config, name)
        if value != _default(config, name):
            raise ValueError(
                f"{name}={value} has no effect with {cause}={getattr(config, cause)}; leave one out"
            )


def _default(config: Any, name: str) -> Any:
    return next(f.default for f in dataclasses.fields(config) if f.name == name)


def split_names(config: Any, name: str) -> None:
    """Turn "q_proj,v_proj" into a list, and the word "all" in any list into "all"."""
    value = getattr(config, name)
    if isinstance(value, str) and value != "all":
        value = split_list(value)
    if not value:
        raise ValueError(f"{name} is empty; use all, or names such as q_proj,v_proj")
    object.__setattr__(config, name, value)


def split_list(text: str) -> list[str]:
    """The names in "a,b" or "[a, b]"."""
    return [part.strip() for part in text.strip("[] ").split(",") if part.strip()]

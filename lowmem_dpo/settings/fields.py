"""What becomes of every setting: read from words or YAML, held against its field, written as YAML.

A setting is a field of a frozen dataclass (`groups`): its annotation is its type, the metadata
beside it are its bounds. A name is held against the fields first, so that a wrong one gets the
nearest right one. Then each value becomes one of its field's annotation: defaults, then the file,
then flags. The dataclass checks itself when it is built, by a file, by words or in Python; a check
raises ValueError with the setting, what it got and how to mend it.
"""

import difflib
import inspect
import math
import os
import re
import reprlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, Field, dataclass, fields
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml

from lowmem_dpo.settings.other_trainers import (
    NAMES_WITH_THEIR_VALUES,
    is_foreign,
    left_to_defaults,
    our_name,
    to_our_settings,
    to_our_value,
)
from lowmem_dpo.settings.yaml_text import read_mapping, read_yaml

# Settings that name a file or folder (or a model): never empty; os.PathLike is taken too.
_PATHS = {"model", "data", "eval_data", "output_dir", "init_adapter", "resume", "cache_dir"}
_PATHS |= {"adapter", "prompts"}

# Names that a newcomer may try and whose nearest name here would be a wrong hint, or none.
_ALIASES = {
    alias: name
    for name, aliases in {
        "learning_rate": "lr lr_rate",
        "lora_r": "rank",
        "lora_alpha": "alpha",
        "init_adapter": "lora_weights adapter_dir",
        "num_train_epochs": "epochs epoch",
        "max_samples": "limit max_train_samples max_eval_samples num_train_samples sample_size",
        "max_length": "max_tokens context_length",
        "max_grad_norm": "gradient_clipping gradient_clip_val clip_grad max_norm",
        "batch_size": "accumulation_steps grad_accum batch_size_per_device",
        "beta": "orpo_alpha",
        "output_dir": "save_dir checkpoint_dir",
        "save_steps": "save_interval",
        "eval_steps": "eval_interval",
        "logging_steps": "log_interval",
        "chat_template": "prompt_template template_type",
        "chat_template_kwargs": "enable_thinking",
        "shuffle": "dataset_shuffle",
    }.items()
    for alias in aliases.split()
}


@dataclass(frozen=True)
class Bounds:
    """Where a number must lie: above or at_least this, below or at_most that."""

    above: float = -math.inf
    at_least: float = -math.inf
    below: float = math.inf
    at_most: float = math.inf


# What stands beside a field as its metadata: rules in words, and the bounds that they mean.
# What lies outside of these is nobody's wish, and float32 or a library cannot take it.
_WITHIN_REASON = {"must be at most 1000000000": Bounds(at_most=10**9)}
POSITIVE = {"must be > 0": Bounds(above=0), "must be at least 1e-16": Bounds(at_least=1e-16)}
POSITIVE |= _WITHIN_REASON
NOT_NEGATIVE = {"must be >= 0": Bounds(at_least=0)} | _WITHIN_REASON
SHARE = {"must be in [0, 1)": Bounds(at_least=0, below=1)}
COUNT = {"must be at least 1": Bounds(at_least=1)} | _WITHIN_REASON
COUNT_OR_NONE = {"must be at least 1, or left out": Bounds(at_least=1)} | _WITHIN_REASON


class Faults(ValueError):
    """Several faults of the user's settings at once.

    Attributes:
        faults: A line each.
    """

    def __init__(self, faults: Sequence[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = list(faults)


@dataclass(frozen=True)
class Settings:
    """What every group and config shares: values as they are declared, and every group's check.

    Paths become text, and whole numbers floats where a float is asked for. Where one name or a list
    is asked for, another text than the default becomes the list of the names in it.
    """

    def __post_init__(self) -> None:
        changed = set()
        for f in fields(self):
            value = getattr(self, f.name)
            if value != default_value(f):
                changed.add(f.name)
            object.__setattr__(self, f.name, _checked(f, value))
        faults: list[str] = []
        for group in reversed(type(self).__mro__):
            if faults and group is type(self):
                break  # it holds groups against each other, and counts on each
            own = inspect.get_annotations(group).keys()
            # A group at its defaults has nothing to refuse; a config, of many groups, may.
            if "check" in vars(group) and (group is type(self) or changed & own):
                try:
                    vars(group)["check"](self)
                except ValueError as error:
                    faults.append(str(error))
        if faults:
            raise Faults(faults)


def default_value(f: Field[Any]) -> Any:
    """What a field holds where nothing is given."""
    return f.default if f.default_factory is MISSING else f.default_factory()


def _checked(f: Field[Any], value: Any) -> Any:
    """The value of a field as it is declared.

    Raises:
        ValueError: If it is of another type, or out of bounds.
    """
    if f.name in _PATHS:
        value = os.fspath(value) if isinstance(value, os.PathLike) else value
        if isinstance(value, str) and not value.strip("\0 \t\r\n"):
            raise ValueError(f"{f.name} is empty; give a path, or leave it out")
    if isinstance(value, str) and re.search("[\0\ud800-\udfff]", value):
        raise ValueError(f"{f.name} must be plain UTF-8 text, got {value!r}")
    if get_origin(f.type) is Literal:
        if value not in (choices := get_args(f.type)):
            raise ValueError(f"{f.name} must be one of {', '.join(choices)}, got {value!r}")
        return value
    if f.type == str | list[str]:
        value = _names(f, value)
    annotations = get_args(f.type) if isinstance(f.type, UnionType) else (f.type,)
    kinds = tuple(get_origin(kind) or kind for kind in annotations)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if float in kinds and is_number:
        if not abs(value) <= sys.float_info.max:  # of an int too, and of nan
            raise ValueError(f"{f.name} must be a finite number, got {_short(value)}")
        value = float(value)
    elif not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise _wrong_type(f.name, f.type, value)
    for rule, bounds in f.metadata.items() if value is not None else ():
        is_above = value > bounds.above and value >= bounds.at_least
        if not (is_above and value < bounds.below and value <= bounds.at_most):
            hint = "" if f.default is None else f"; the usual value is {f.default}"
            raise ValueError(f"{f.name} {rule}, got {_short(value)}{hint}")
    return value


def _names(f: Field[Any], value: Any) -> Any:
    """The default, or a list of names: a text may hold several, with brackets as in YAML or none.

    Raises:
        ValueError: If some are no names.
    """
    given = value
    if isinstance(value, str) and value != f.default:
        if "[" in value or "]" in value:
            with suppress(ValueError):
                value = read_yaml(value)
        else:
            value = [name.strip() for name in value.split(",") if name.strip()]
    if value in (f.default, [f.default]):
        return f.default
    wrong = [given]
    if isinstance(value, list):
        wrong = [name for name in value if not isinstance(name, str) or not name.strip()]
    if wrong:
        raise _wrong_type(f.name, f.type, wrong[0])
    return value


Config = TypeVar("Config", bound=Settings)


def parse_config(cls: type[Config], words: list[str]) -> Config:
    """Build a config from command-line words: defaults, then `--config FILE`, then flags.

    The names of other trainers are understood in both; see `other_trainers`. Those that have no
    effect here are said on stderr.

    Args:
        cls: A dataclass of settings, such as those of `configs`.
        words: Such as `["--beta", "0.2", "--config", "run.yaml", "--reference_free"]`. Hyphens in
            flag names count as underscores; a boolean flag needs no value.

    Raises:
        ValueError: If the file cannot be read.
        Faults: With all names that are unknown, values that do not fit their fields, ...
    """
    path, flags, foreign = _read_flags(cls, words)
    by_name = {field.name: field for field in fields(cls)}
    mapping = {} if path is None else read_mapping(path)
    given = mapping | flags | foreign
    mapping = {name: value for name, value in mapping.items() if name not in foreign}
    of_flags = to_our_settings(foreign, set(by_name), given)
    of_file = to_our_settings(mapping, set(by_name), given, flags.keys() | of_flags.values.keys())
    where = "" if path is None else f"{path}: "
    faults = [where + fault for fault in of_file.faults] + of_flags.faults
    for name in of_flags.values.keys() & flags.keys():
        faults.append(f"--{name} and --{of_flags.origin[name]} are both given; leave one out")
    origin = of_file.origin | of_flags.origin
    values: dict[str, Any] = {}
    unknown: list[str] = []
    for name, value in (of_file.values | of_flags.values | flags).items():
        if name not in by_name:
            unknown.append(str(origin[name]))
        if name not in by_name or value is None:  # the default
            continue
        try:
            values[name] = _checked(by_name[name], _field_value(name, by_name[name].type, value))
        except ValueError as error:
            is_flag = name in of_flags.values or name in flags
            theirs = {} if name in flags else origin
            faults.append(("" if is_flag else where) + _with_their_names(str(error), theirs))
    faults += [where + fault for fault in _unknown(cls, unknown)]
    if values.get("save_steps") is not None and "save_strategy" in by_name:
        values.setdefault("save_strategy", "steps")
    try:
        config = cls(**values)
    except Faults as error:
        # With flags about, the file may not be to blame. Beside other faults, what does not go
        # together may do so without them; what is wrong by itself is said.
        where = "" if flags or foreign else where
        found = [fault for fault in error.faults if not faults or " must be " in fault]
        faults += [where + _with_their_names(fault, origin) for fault in found]
    if faults:
        raise Faults(faults)
    notes = of_file.notes + of_flags.notes + left_to_defaults(mapping, values, config)
    if notes:
        from lowmem_dpo.console import note

        for line in dict.fromkeys(notes):
            note(line)
    return config


def _with_their_names(fault: str, origin: Mapping[str, str]) -> str:
    """A fault, with the names that another trainer's file has for the settings in it."""
    theirs = [
        f"{ours} is {name} there"
        for ours, name in origin.items()
        if name != ours and re.search(rf"\b{ours}\b", fault)
    ]
    return f"{fault} ({', '.join(theirs)})" if theirs else fault


def to_yaml(config: Any) -> str:
    """The resolved settings as YAML, group by group; `--config` reads it back."""
    groups = [group for _, group in settings_by_group(type(config))]
    values = {field.name: getattr(config, field.name) for group in groups for field in group}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _read_flags(
    cls: type[Settings], words: Iterable[str]
) -> tuple[str | None, dict[str, Any], dict[str, Any]]:
    """Sort command-line words into settings.

    Returns:
        The settings file, or None; our flags, each spelt and with a value as its field has it;
        other trainers' flags, with the value that their text has in YAML.
    """
    types = {field.name: field.type for field in fields(cls)}
    path: str | None = None
    own: dict[str, Any] = {}
    foreign: dict[str, Any] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise ValueError(f"unexpected argument {word!r}; settings are given as --name value")
        name, equals, text = word[2:].partition("=")
        name = name.replace("-", "_")
        of_other_trainer = name not in types and is_foreign(name)
        if name != "config" and name not in types and not of_other_trainer:
            raise Faults(_unknown(cls, [name]))
        if not equals:
            may_stand_alone = types.get(name) is bool or of_other_trainer
            if rest and not rest[0].startswith("--"):
                text = rest.pop(0)
            elif may_stand_alone:
                text = "true"
            else:
                raise ValueError(f"--{name} needs a value; one that begins with -- as --{name}=...")
        if re.search("[\ud800-\udfff]", text):
            raise ValueError(f"--{name} must be UTF-8 text, got {_short(repr(text))}")
        if name == "config" and not text.strip():
            raise ValueError("--config is empty; give a settings file, or leave it out")
        if name == "config" and path is not None:
            raise ValueError(f"--config is given twice, {path} and {text}; give one file")
        if name == "config":
            path = text
        elif of_other_trainer:
            foreign[name] = _field_value(name, Any, text)
        elif (text in ("null", "~") and name != "prompt") or (name, text) == ("max_steps", "-1"):
            own[name] = None  # the default, whatever the file has
        else:
            name = our_name(name, _field_value(name, Any, text))
            value = to_our_value(name, text) if name in NAMES_WITH_THEIR_VALUES else text
            own[name] = _field_value(name, types[name], value)
    return path, own, foreign


def _field_value(name: str, annotation: Any, value: Any) -> Any:
    """Turn a flag's text, or a value from a file, into one of its field's annotation.

    Where text is asked for it stays as it is, also if it looks like a number. Other text is read as
    YAML: that of a flag, or in a file what YAML 1.1 takes for text, such as 1e-4. A list may lack
    its brackets.

    Raises:
        ValueError: If the value cannot be one; it names the field.
    """
    given, origin, kinds = value, get_origin(annotation), get_args(annotation)
    if value is False and annotation == str | list[str]:
        value = "off"  # which YAML 1.1 takes for it
    fault = ""
    if origin is UnionType:
        for kind in kinds:
            with suppress(ValueError):
                return _field_value(name, kind, value)
    if isinstance(value, str) and origin is not Literal and annotation not in (str, NoneType):
        text = f"[{value}]" if origin is list and value[:1] != "[" else value
        try:
            value = read_yaml(text)
        except ValueError as error:
            fault = f" (not valid YAML: {error})" if value[:1] in ("{", "[") or "_" in value else ""
        if isinstance(value, str) and annotation in (int, float) and "_" not in value:
            with suppress(ValueError):
                return annotation(value)
    if origin is list and isinstance(value, list):
        return [_field_value(name, kinds[0], item) for item in value]
    if origin is dict and isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return value
    if origin is Literal:
        fits = value in kinds
    else:
        is_whole_number = annotation is float and type(value) is int
        fits = annotation is Any or type(value) is annotation or is_whole_number
    if not fits:
        raise _wrong_type(name, annotation, given, fault)
    return value


def _unknown(cls: type[Settings], names: Sequence[str]) -> list[str]:
    """That some names are no fields of `cls`: those with a near one each, the others together."""
    known = [field.name for _, group in settings_by_group(cls) for field in group]
    groups = Settings.__subclasses__()
    for group in groups:  # which grows
        groups += group.__subclasses__()
    elsewhere = {field.name for group in groups for field in fields(group)}
    faults, strange = [], []
    if len(others := [name for name in names if name in elsewhere]) > 3:  # another verb's file
        names = [name for name in names if name not in elsewhere]
        faults.append(
            f"{', '.join(others[:3])} and {len(others) - 3} more are settings of another verb; "
            "leave them out, or give this one a file of its own"
        )
    for name in names:
        parts = set(name.split("_"))
        near = [each for each in (_ALIASES.get(name), name.partition(".")[0]) if each in known]
        near = near or difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.82)
        near = near or [each for each in known if parts <= set(each.split("_"))]
        if 0 < len(near) < 3:
            faults.append(f"unknown setting {name!r}; did you mean {' or '.join(near)}?")
        else:
            strange.append(repr(name))
    if strange:
        plural, them = ("s", "them") if len(strange) > 1 else ("", "it")
        faults.append(
            f"unknown setting{plural} {', '.join(strange)}; leave {them} out; --help_all shows all "
            "there are"
        )
    return faults


def settings_by_group(config: type[Settings]) -> list[tuple[type[Settings], list[Field[Any]]]]:
    """A config's fields under the class that declares them: its own first, then group by group."""
    by_name = {f.name: f for f in fields(config)}
    groups = []
    for cls in config.__mro__:
        declared = [by_name.pop(name) for name in inspect.get_annotations(cls) if name in by_name]
        if declared:
            groups.append((cls, declared))
    return groups


def check_unused(config: Any, cause: str, *names: str) -> None:
    """Refuse settings that were changed although the value of `cause` leaves them no effect."""
    defaults = {f.name: default_value(f) for f in fields(config)}
    found = getattr(config, cause)
    beside = f"with {cause}={found}; leave one out"
    if found is None:
        beside = f"without {cause}; set {cause}, or leave it out"
    for name in names:
        value = getattr(config, name)
        if value != defaults[name]:
            raise ValueError(f"{name}={value} has no effect {beside}")


def type_name(annotation: Any) -> str:
    """An annotation in words, for messages and tables."""
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(map(str, get_args(annotation)))
    if get_args(annotation):
        return str(annotation).replace("typing.", "")
    return annotation.__name__


def _wrong_type(name: str, annotation: Any, value: Any, fault: str = "") -> ValueError:
    """That a value is not of an annotation, for whoever has given it."""
    kinds = [annotation]
    if get_origin(annotation) is UnionType:
        kinds = [kind for kind in get_args(annotation) if kind is not NoneType]
    words: dict[Any, str] = {
        **{bool: "true or false", int: "a whole number", float: "a number", str: "text in quotes"},
        **{list: "numbers such as [0.8, 0.2]", dict: "of the form '{name: value}'"},
    }
    what = words.get(get_origin(kinds[0]) or kinds[0]) or type_name(kinds[0])
    what = what if len(kinds) == 1 else "a name, or several such as [a, b]"
    return ValueError(f"{name} must be {what}, got {_short(value)}{fault}")


def _short(value: Any) -> str:
    """A value in a line of a message."""
    text = value if isinstance(value, str) else reprlib.repr(value)
    text = " ".join(text.split()) or "nothing"
    return text if len(text) <= 60 else f"{text[:57]}..."

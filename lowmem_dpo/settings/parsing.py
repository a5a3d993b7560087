"""From words and YAML to any config dataclass, and back: defaults, then the file, then flags.

A name is held against the fields first, so that a wrong one gets the nearest right one. Then each
value becomes one of its field's annotation, and the dataclass checks itself when it is built.
"""

import difflib
import functools
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin

from lowmem_dpo.checks import type_name
from lowmem_dpo.settings.groups import Settings, settings_by_group
from lowmem_dpo.settings.other_trainers import is_foreign, to_our_settings, to_our_value

Config = TypeVar("Config", bound=Settings)

# Names that a newcomer may try and whose nearest name here would be a wrong hint, or none.
_ALIASES = {
    "lr": "learning_rate",
    "rank": "lora_r",
    "alpha": "lora_alpha",
    "epochs": "num_train_epochs",
}


def parse_config(cls: type[Config], words: list[str]) -> Config:
    """Build a config from command-line words: defaults, then `--config FILE`, then flags.

    The names of other trainers are understood in both; see `other_trainers`. Those that have no
    effect here are said on stderr.

    Args:
        cls: A dataclass of settings, such as those of `configs`.
        words: Such as `["--beta", "0.2", "--config", "run.yaml", "--reference_free"]`. Hyphens in
            flag names count as underscores; a boolean flag needs no value.

    Raises:
        ValueError: If the file cannot be read, a name is unknown or a value does not fit its field.
    """
    path, own, foreign = _read_flags(cls, words)
    where = "" if path is None else f"{path}: "
    mapping = {} if path is None else _read_mapping(path)
    types = _types(cls)
    flags = {name: _flag_value(name, types[name], text) for name, text in own.items()}
    given = mapping | flags | foreign
    blamed = "" if own or foreign else where  # with flags about, the file may not be to blame
    try:
        mapping, notes = to_our_settings(mapping, set(types), given)
    except ValueError as error:
        raise ValueError(f"{blamed}{error}") from None
    theirs, more_notes = to_our_settings(foreign, set(types), given)
    for name in theirs.keys() & flags.keys():
        raise ValueError(f"--{name} and another trainer's flag for it are both given")
    mapping |= theirs
    _check_names(cls, mapping, where)
    try:
        values = {name: _field_value(name, types[name], value) for name, value in mapping.items()}
        config = cls(**(values | flags))
    except ValueError as error:
        raise ValueError(f"{blamed}{error}") from None
    if notes or more_notes:
        from lowmem_dpo.console import note

        for line in dict.fromkeys([*notes, *more_notes]):
            note(line)
    return config


def to_yaml(config: Any) -> str:
    """The resolved settings as YAML, group by group; `--config` reads it back."""
    import yaml

    values = {name: getattr(config, name) for name in _types(type(config))}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _types(cls: type[Settings]) -> dict[str, Any]:
    """The annotation of every field, group by group."""
    return {field.name: field.type for _, group in settings_by_group(cls) for field in group}


def _read_flags(
    cls: type[Settings], words: Iterable[str]
) -> tuple[str | None, dict[str, str], dict[str, Any]]:
    """Sort command-line words into settings.

    Returns:
        The settings file, or None; our flags, each spelt as its field, with their text; other
        trainers' flags, with the value that their text has in YAML.
    """
    types = _types(cls)
    path: str | None = None
    own: dict[str, str] = {}
    foreign: dict[str, Any] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise ValueError(f"unexpected argument {word!r}; settings are given as --name value")
        name, equals, text = word[2:].partition("=")
        name = name.replace("-", "_")
        of_other_trainer = name not in types and is_foreign(name)
        if name != "config" and not of_other_trainer:
            _check_names(cls, [name], "")
        if not equals:
            may_stand_alone = types.get(name) is bool or of_other_trainer
            if rest and not rest[0].startswith("--"):
                text = rest.pop(0)
            elif may_stand_alone:
                text = "true"
            else:
                raise ValueError(f"--{name} needs a value; one that begins with -- as --{name}=...")
        if name == "config" and path is not None:
            raise ValueError(f"--config is given twice, {path} and {text}; give one file")
        if name == "config":
            path = text
        elif of_other_trainer:
            foreign[name] = _yaml_value(text)
        else:
            own[name] = text
    return path, own, foreign


def _flag_value(name: str, annotation: Any, text: str) -> Any:
    """The value of one of our flags; null unsets a setting that may be left out."""
    if text in ("null", "~") and NoneType in get_args(annotation):
        return None
    return _field_value(name, annotation, to_our_value(name, text))


def _field_value(name: str, annotation: Any, value: Any) -> Any:
    """A value as its field takes it; what does not fit is refused by name."""
    try:
        return _as_declared(annotation, value)
    except ValueError:
        example = "; for example '{name: value}'" if get_origin(annotation) is dict else ""
        got = " ".join(str(value).split())
        raise ValueError(f"{name} must be {type_name(annotation)}, got {got}{example}") from None


def _as_declared(annotation: Any, value: Any) -> Any:
    """Turn a flag's text, or a value from a file, into one of the annotation.

    Where text is asked for it stays as it is, also if it looks like a number. Other text is read as
    YAML: that of a flag, or in a file what YAML 1.1 takes for text, such as 1e-4. A list may lack
    its brackets.

    Raises:
        ValueError: If the value cannot be one.
    """
    origin, kinds = get_origin(annotation), get_args(annotation)
    if origin is UnionType:
        for kind in kinds:
            with suppress(ValueError):
                return _as_declared(kind, value)
    if isinstance(value, str) and origin is not Literal and annotation not in (str, Any, NoneType):
        value = _yaml_value(f"[{value}]" if origin is list and value[:1] != "[" else value)
        if isinstance(value, str) and annotation in (int, float):
            return annotation(value)
    if origin is list and isinstance(value, list):
        return [_as_declared(kinds[0], item) for item in value]
    if origin is dict and isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _as_declared(kinds[1], item) for key, item in value.items()}
    if origin is Literal:
        fits = value in kinds
    else:
        is_whole_number = annotation is float and type(value) is int
        fits = annotation is Any or type(value) is annotation or is_whole_number
    if not fits:
        raise ValueError
    return value


def _yaml_value(text: str) -> Any:
    """What a text means in YAML; itself, where it is none."""
    import yaml

    try:
        return yaml.load(text, _strict_loader())
    except yaml.YAMLError:
        return text


def _check_names(cls: type[Settings], names: Iterable[Any], where: str) -> None:
    """Refuse names that are no field of `cls`, and name the nearest one."""
    fields = _types(cls)
    for name in map(str, names):
        if name not in fields:
            near = [alias for alias in [_ALIASES.get(name)] if alias in fields]
            near = near or difflib.get_close_matches(name, fields, n=1, cutoff=0.65)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(fields)}"
            raise ValueError(f"{where}unknown setting {name!r}; {hint}")


def _read_mapping(path: str) -> dict[str, Any]:
    """The names and values of a settings file."""
    import yaml

    try:
        mapping = yaml.load(Path(path).read_text(encoding="utf-8"), _strict_loader())
    except OSError as error:
        raise ValueError(f"cannot read the settings file {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is not valid YAML: {reason}") from None
    if mapping is None:
        return {}
    if not isinstance(mapping, dict):
        raise ValueError(f"{path} must hold `name: value` lines, got a {type(mapping).__name__}")
    return mapping


@functools.cache
def _strict_loader() -> Any:
    """A safe YAML loader that refuses what would be read otherwise than it was meant."""
    import yaml

    class StrictLoader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            names = [self.construct_object(key, deep=True) for key, _ in node.value]
            for name in names:
                if names.count(name) > 1:
                    raise yaml.constructor.ConstructorError(
                        problem=f"{name} is given twice", problem_mark=node.start_mark
                    )
            return super().construct_mapping(node, deep)

        def construct_yaml_int(self, node: Any) -> Any:
            if re.fullmatch(r"[-+]?0[0-9_]+|.*:.*", node.value):  # octal, sexagesimal
                raise yaml.constructor.ConstructorError(
                    problem=f"{node.value} means another number in YAML; write it plainly",
                    problem_mark=node.start_mark,
                )
            return super().construct_yaml_int(node)

    StrictLoader.add_constructor("tag:yaml.org,2002:int", StrictLoader.construct_yaml_int)
    return StrictLoader

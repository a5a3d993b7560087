"""From words and YAML to any config dataclass, and back: defaults, then the file, then flags.

Names are checked before values, so that a wrong one gets the nearest right one; jsonargparse turns
text into values of a field's type.
"""

import argparse
import dataclasses
import difflib
import logging
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin

from lowmem_dpo.other_trainers import known, native_value, translate

if TYPE_CHECKING:
    import jsonargparse

Config = TypeVar("Config")

# Names that a newcomer may try and whose nearest name here would be a wrong hint, or none.
_ALIASES = {"lr": "learning_rate", "rank": "lora_r", "alpha": "lora_alpha"}

logger = logging.getLogger(__name__)


def parse_config(
    cls: type[Config], arguments: list[str], say: Callable[[str], None] = logger.warning
) -> Config:
    """Build a config from command-line words: defaults, then `--config FILE`, then flags.

    The names of other trainers are understood in both; see `other_trainers`.

    Args:
        cls: A dataclass of settings, such as those of `config`.
        arguments: Words such as `["--beta", "0.2", "--config", "run.yaml", "--reference_free"]`.
            Hyphens in flag names count as underscores; a boolean flag needs no value.
        say: Receives a line for every foreign setting that has no effect here.

    Raises:
        ValueError: If the file cannot be read, a name is unknown or a value does not fit its field.
    """
    path, words, foreign = _split_arguments(cls, arguments)
    where = f"{path}: " if path is not None else ""
    mapping = _read_mapping(path) if path is not None else {}
    names = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    try:
        mapping, notes = translate({**mapping, **foreign}, names)
    except ValueError as error:
        raise ValueError(f"{'' if foreign else where}{error}") from None
    _check_names(cls, mapping, where)
    where = "" if words else where  # with flags about, the file may not be to blame
    parser = settings_parser(cls)
    try:
        values = parser.parse_args(words, namespace=parser.parse_object(mapping))
        config = cls(**{name: values[name] for name in names})
    except argparse.ArgumentError as error:
        raise ValueError(where + _one_line(cls, str(error))) from None
    except (ValueError, OverflowError) as error:  # the latter of an int beyond every float
        raise ValueError(f"{where}{error}") from None
    for note in notes:
        say(note)
    return config


def settings_parser(cls: type) -> "jsonargparse.ArgumentParser":
    """The jsonargparse parser whose flags and help are the fields of `cls`."""
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(exit_on_error=False, add_help=False, print_config=None)
    parser.add_argument(
        "--config", action="config", help="YAML file of settings; flags override it."
    )
    parser.add_argument(  # acted upon by the command line, before anything is parsed
        "--print_config",
        action="store_true",
        default=argparse.SUPPRESS,
        help="Print the resolved settings as YAML and stop.",
    )
    parser.add_class_arguments(cls, None)
    return parser


def type_name(annotation: Any) -> str:
    """An annotation in words, for messages and tables."""
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(map(str, get_args(annotation)))
    if get_args(annotation):
        return str(annotation).replace("typing.", "")
    return annotation.__name__


def to_yaml(config: Any) -> str:
    """The resolved settings as YAML; `--config` reads it back."""
    import yaml

    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)


def _split_arguments(
    cls: type, arguments: list[str]
) -> tuple[str | None, list[str], dict[str, Any]]:
    """Take the settings file and other trainers' flags out of the words.

    Returns:
        The file, or None; our flags, each spelt as its field and with a value; the others' flags
        and their values.
    """
    names = {f.name for f in dataclasses.fields(cls)}
    booleans = {f.name for f in dataclasses.fields(cls) if f.type in (bool, "bool")}
    lists = {
        f.name
        for f in dataclasses.fields(cls)
        if any(get_origin(kind) is list for kind in get_args(f.type))
    }
    path: str | None = None
    words: list[str] = []
    foreign: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise ValueError(f"unexpected argument {word!r}; settings are given as --name value")
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        is_foreign = name not in names and known(name)
        if name != "config" and not is_foreign:
            _check_names(cls, [name.partition(".")[0]], "")
        if not equals:
            may_stand_alone = name in booleans or is_foreign
            if may_stand_alone and (not rest or rest[0].startswith("--")):
                value = "true"
            elif rest and not rest[0].startswith("--"):
                value = rest.pop(0)
            else:
                raise ValueError(f"--{name} needs a value; one that begins with -- as --{name}=...")
        if name in lists and "," in value and "[" not in value:
            value = f"[{value}]"
        if name == "config":
            path = value
        elif is_foreign:
            foreign[name] = _yaml_value(name, value)
        else:
            words.append(f"--{name}={native_value(name, value)}")
    return path, words, foreign


def _yaml_value(name: str, text: str) -> Any:
    """A flag's text as the value that a settings file would hold."""
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise ValueError(f"--{name} has a value that is no valid YAML: {text!r}") from None


def _check_names(cls: type, names: Iterable[Any], where: str) -> None:
    """Refuse names that are no field of `cls`, and name the nearest one."""
    known = [f.name for f in dataclasses.fields(cls)]
    for name in map(str, names):
        if name not in known:
            near = [alias for alias in [_ALIASES.get(name)] if alias in known]
            near = near or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
            raise ValueError(f"{where}unknown setting {name!r}; {hint}")


def _read_mapping(path: str) -> dict[str, Any]:
    import yaml

    try:
        mapping = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
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


def _one_line(cls: type, message: str) -> str:
    """Shorten jsonargparse's explanation to what was expected and what was given."""
    key = re.search(r'key "(\w+)', message)
    given = re.findall(r"(?:Got|Given) value: (.*)", message)
    if not key or not given:
        return " ".join(message.split())
    annotation = next(f.type for f in dataclasses.fields(cls) if f.name == key[1])
    return f"{key[1]} must be {type_name(annotation)}, got {given[-1]}"

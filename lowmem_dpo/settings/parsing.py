"""From words and YAML to any config dataclass, and back: defaults, then the file, then flags.

Names are checked before values, so that a wrong one gets the nearest right one; jsonargparse turns
text into values of a field's type.
"""

import argparse
import dataclasses
import difflib
import functools
import logging
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin

from lowmem_dpo.checks import type_name
from lowmem_dpo.settings.other_trainers import known, native_value, translate

if TYPE_CHECKING:
    import jsonargparse

Config = TypeVar("Config")

# Names that a newcomer may try and whose nearest name here would be a wrong hint, or none.
_ALIASES = {
    "lr": "learning_rate",
    "rank": "lora_r",
    "alpha": "lora_alpha",
    "epochs": "num_train_epochs",
}

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
    path, own, foreign = _split_arguments(cls, arguments)
    where = f"{path}: " if path is not None else ""
    mapping = _read_mapping(path) if path is not None else {}
    names = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    flags = {name: _yaml_value(name, text) for name, text in (own | foreign).items()}
    given = mapping | flags
    try:
        mapping, notes = translate(mapping, names, given)
    except ValueError as error:
        raise ValueError(f"{'' if flags else where}{error}") from None
    theirs, more_notes = translate({name: flags[name] for name in foreign}, names, given)
    for name in theirs.keys() & own.keys():
        raise ValueError(f"--{name} and another trainer's flag for it are both given")
    mapping |= theirs
    _check_names(cls, mapping, where)
    words = [f"--{name}={native_value(name, text)}" for name, text in own.items()]
    where = "" if flags else where  # with flags about, the file may not be to blame
    parser = settings_parser(cls)
    try:
        values = parser.parse_args(words, namespace=parser.parse_object(mapping))
        config = cls(**{name: values[name] for name in names})
    except argparse.ArgumentError as error:
        raise ValueError(where + _one_line(cls, str(error))) from None
    except (ValueError, OverflowError) as error:  # the latter of an int beyond every float
        raise ValueError(f"{where}{error}") from None
    for note in dict.fromkeys([*notes, *more_notes]):
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


def to_yaml(config: Any) -> str:
    """The resolved settings as YAML; `--config` reads it back."""
    import yaml

    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)


def _split_arguments(
    cls: type, arguments: list[str]
) -> tuple[str | None, dict[str, str], dict[str, str]]:
    """Take the settings file and other trainers' flags out of the words.

    Returns:
        The file, or None; our flags, each spelt as its field, and the others', with their text.
    """
    types = {f.name: f.type for f in dataclasses.fields(cls)}
    path: str | None = None
    own: dict[str, str] = {}
    foreign: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise ValueError(f"unexpected argument {word!r}; settings are given as --name value")
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        is_foreign = name not in types and known(name)
        if name != "config" and not is_foreign:
            _check_names(cls, [name.partition(".")[0]], "")
        if not equals:
            may_stand_alone = types.get(name) in (bool, "bool") or is_foreign
            if may_stand_alone and (not rest or rest[0].startswith("--")):
                value = "true"
            elif rest and not rest[0].startswith("--"):
                value = rest.pop(0)
            else:
                raise ValueError(f"--{name} needs a value; one that begins with -- as --{name}=...")
        if name == "config" and path is not None:
            raise ValueError(f"--config is given twice, {path} and {value}; give one file")
        if name == "config":
            path = value
        elif is_foreign:
            foreign[name] = value
        else:
            own[name] = _as_list(types.get(name), value)
    return path, own, foreign


def _as_list(annotation: Any, text: str) -> str:
    """A flag's text with the brackets that a list needs: around `a,b`, and around one number."""
    kinds = get_args(annotation)
    takes_list = any(get_origin(kind) is list for kind in kinds)
    if not takes_list or "[" in text or text in ("null", "None", ""):
        return text
    return f"[{text}]" if "," in text or str not in kinds else text


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
            near = near or difflib.get_close_matches(name, known, n=1, cutoff=0.65)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
            raise ValueError(f"{where}unknown setting {name!r}; {hint}")


def _read_mapping(path: str) -> dict[str, Any]:
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
        mapping = yaml.load(text, _strict_loader())
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


def _one_line(cls: type, message: str) -> str:
    """Shorten jsonargparse's explanation to what was expected and what was given."""
    key = re.search(r'key "(\w+)', message)
    given = re.findall(r"(?:Got|Given) value: (.*)", message)
    if not key or not given:
        return " ".join(message.split())
    annotation = next(f.type for f in dataclasses.fields(cls) if f.name == key[1])
    if given[-1].lower().strip("+-.") in ("nan", "inf", "infinity"):
        return f"{key[1]} must be a finite number, got {given[-1]}"
    example = "; for example '{name: value}'" if get_origin(annotation) is dict else ""
    return f"{key[1]} must be {type_name(annotation)}, got {given[-1]}{example}"

"""Text as YAML, for files and flags alike: what would be read otherwise than it was meant fails."""

import re
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError

# Octal and sexagesimal numbers, and underscores that do not part thousands.
_ANOTHER_NUMBER = re.compile(r"[-+]?0[0-9_]+|.*:.*|.*_(?!\d{3}(?!\d)).*")


def read_yaml(text: str) -> Any:
    """The value that a text means.

    Raises:
        ValueError: Saying in one line what is wrong, and in which line of the text.
    """
    try:
        return yaml.load(text, _StrictLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}: " if mark and "\n" in text.strip() else ""
        problem = str(error.problem).replace("'<stream end>'", "the end")
        raise ValueError(where + problem) from None
    except yaml.reader.ReaderError as error:
        raise ValueError(f"the character {chr(int(error.character))!r} cannot be there") from None
    except RecursionError:
        raise ValueError("its brackets are nested too deep") from None


def read_mapping(path: str) -> dict[str, Any]:
    """The names and values of a settings file."""
    try:
        mapping = read_yaml(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read the settings file {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text; save it as UTF-8") from None
    except ValueError as error:
        where = repr(path) if "\0" in path else path
        raise ValueError(f"{where} is not valid YAML: {error}") from None
    if mapping is None:
        return {}
    if not isinstance(mapping, dict):
        raise ValueError(f"{path} must hold `name: value` lines, got a {type(mapping).__name__}")
    return mapping


class _StrictLoader(yaml.SafeLoader):
    """A safe YAML loader that takes numbers, dates and names as people mean them."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if tag := getattr(event, "tag", None):
            tag = tag.replace("tag:yaml.org,2002:", "!!")
            raise ConstructorError(
                problem=f"types such as {tag} are not read; leave it out",
                problem_mark=event.start_mark,
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        names = []
        for key, _ in node.value:  # before merge keys (<<) add theirs, which may be given anew
            name = "<<" if key.tag.endswith(":merge") else self.construct_object(key, deep=True)
            if name in names:
                raise ConstructorError(
                    problem=f"{name} is given twice", problem_mark=key.start_mark
                )
            names.append(name)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: Any) -> Any:
        if _ANOTHER_NUMBER.fullmatch(node.value):
            problem = f"{node.value} means another number in YAML; write it plainly"
            raise ConstructorError(problem=problem, problem_mark=node.start_mark)
        if len(node.value) > 1000:
            problem = f"a number of {len(node.value)} digits; write a smaller one"
            raise ConstructorError(problem=problem, problem_mark=node.start_mark)
        if node.tag.endswith(":int"):
            return self.construct_yaml_int(node)
        return self.construct_yaml_float(node)

    def construct_date(self, node: Any) -> Any:
        return node.value  # no setting is a date object; a date stays text


for _kind in ("int", "float"):
    _StrictLoader.add_constructor(f"tag:yaml.org,2002:{_kind}", _StrictLoader.construct_number)
_StrictLoader.add_constructor("tag:yaml.org,2002:timestamp", _StrictLoader.construct_date)

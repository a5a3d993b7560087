"""What `--help` and `--help_all` print: made of the fields, their docstrings and their groups."""

import ast
import dataclasses
import functools
import inspect
import itertools
import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

from lowmem_dpo.settings.fields import Settings, default_value, settings_by_group, type_name

_ALWAYS = """\
  --config FILE.yaml  settings from a file; flags override it
  --print_config      print the resolved settings as YAML and stop
  --help_all          show every setting, by groups
"""


def short_help(verb: str, summary: str, config: type[Settings], first: Sequence[str]) -> str:
    """The settings that a newcomer needs first, and where the others are.

    Args:
        verb: Its name.
        summary: What it does.
        config: Its settings.
        first: The names of those to show, in this order.
    """
    fields = {field.name: field for field in dataclasses.fields(config)}
    docs = field_docs(config)
    parts = [_head(verb, summary), *(_entry(fields[name], docs[name]) for name in first)]
    if others := len(fields) - len(first):
        titles = [group_title(group).rstrip(".") for group, _ in settings_by_group(config)]
        parts += ["", _wrap(f"--help_all shows {others} more, by groups: {'; '.join(titles)}.")]
    return "\n".join([*parts, "", _ALWAYS])


def full_help(verb: str, summary: str, config: type[Settings]) -> str:
    """Every setting of a verb, by groups."""
    docs = field_docs(config)
    parts = [_head(verb, summary).rstrip()]
    for group, fields in settings_by_group(config):
        parts += ["", group_title(group)]
        parts += [_entry(field, docs[field.name]) for field in fields]
    return "\n".join([*parts, "", _ALWAYS])


def group_title(group: type[Settings]) -> str:
    """What a group is about: the first line of its docstring."""
    return (group.__doc__ or "").splitlines()[0]


def field_docs(config: type[Settings]) -> dict[str, str]:
    """The docstring under each field, by its name; a config's own go before its groups'."""
    docs: dict[str, str] = {}
    for cls in reversed(config.__mro__[:-1]):
        body = _class_bodies(cls.__module__)[cls.__name__]
        for field, doc in itertools.pairwise(body):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(doc, ast.Expr)
                and isinstance(doc.value, ast.Constant)
            ):
                docs[field.target.id] = " ".join(str(doc.value.value).split())
    return docs


@functools.cache
def _class_bodies(module: str) -> dict[str, list[ast.stmt]]:
    """The statements of each class of a module: Python drops what stands under a field."""
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {node.name: node.body for node in tree.body if isinstance(node, ast.ClassDef)}


def default_text(field: dataclasses.Field[Any]) -> str:
    """A field's default as a settings file spells it; empty for none."""
    value = default_value(field)
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _head(verb: str, summary: str) -> str:
    usage = f"usage: python -m lowmem_dpo {verb} [--config FILE.yaml] [--name value ...]"
    return f"{usage}\n\n{_wrap(summary)}\n"


def _entry(field: dataclasses.Field[Any], doc: str) -> str:
    """A setting: name, type and default, and its meaning below."""
    default = default_text(field)
    kind = type_name(field.type).removesuffix(" | None")
    line = f"--{field.name}  {kind}" + (f"; default {default}" if default else "")
    return f"{_wrap(line, '  ', '      ')}\n{_wrap(doc, '      ')}"


def _wrap(text: str, first: str = "", rest: str | None = None) -> str:
    """Text in lines of the terminal's width, at most 100; without a terminal 80."""
    width = min(shutil.get_terminal_size().columns, 100)
    return textwrap.fill(
        text,
        max(width, 40),
        initial_indent=first,
        subsequent_indent=first if rest is None else rest,
        break_on_hyphens=False,
        break_long_words=False,
    )

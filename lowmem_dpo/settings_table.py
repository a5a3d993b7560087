"""The tables of settings and formats in the docs, made by `python -m lowmem_dpo.settings_table`.

The text between the markers `<!-- settings NAME -->`, `<!-- formats -->` or `<!-- losses -->` and
`<!-- end -->` is replaced; NAME is a config's, or that of a table of other trainers' names.
"""

import dataclasses
import json
import re
from pathlib import Path

from lowmem_dpo.checks import type_name
from lowmem_dpo.data.formats import formats_table
from lowmem_dpo.losses.types import losses_table
from lowmem_dpo.settings.configs import DemoConfig, GenerateConfig, TrainConfig
from lowmem_dpo.settings.other_trainers import FIXED, NO_EFFECT, RENAMED, RULES

CONFIGS = {cls.__name__: cls for cls in (TrainConfig, GenerateConfig, DemoConfig)}


def settings_table(cls: type) -> str:
    """A Markdown table of a config's fields: name, type, default, meaning."""
    from docstring_parser import parse_from_object

    docs = {p.arg_name: p.description or "" for p in parse_from_object(cls).params}
    lines = ["| setting | type | default | meaning |", "|---|---|---|---|"]
    for field in dataclasses.fields(cls):
        default = field.default
        if default is dataclasses.MISSING:
            default = field.default_factory()  # type: ignore[misc, operator]
        kind = type_name(field.type).replace("|", "\\|")
        shown = "" if default is None else f"`{default}`"
        meaning = " ".join(docs[field.name].split()).replace("|", "\\|")
        lines.append(f"| `{field.name}` | {kind} | {shown} | {meaning} |")
    return "\n".join(lines)


def foreign_table(kind: str) -> str:
    """A Markdown table of other trainers' names: those renamed, fixed, or without effect."""
    if kind == "renamed":
        rows = [(name, f"`{ours}`") for name, ours in RENAMED.items()]
        rows += [(name, text) for name, (text, _) in RULES.items()]
        head = "| theirs | ours |"
    elif kind == "fixed":
        rows = [
            (name, f"{', '.join(map(_yaml, values)) or 'no value'} | {why}")
            for name, (values, why) in FIXED.items()
        ]
        head = "| theirs | accepted | why no other value |"
    else:
        rows, head = list(NO_EFFECT.items()), "| theirs | why it has no effect |"
    rule = "|---" * (head.count("|") - 1) + "|"
    return "\n".join([head, rule, *(f"| `{name}` | {text} |" for name, text in sorted(rows))])


def _yaml(value: object) -> str:
    """A value as a settings file spells it."""
    return f"`{value if value and isinstance(value, str) else json.dumps(value)}`"


def with_tables(text: str) -> str:
    """A document with its tables brought up to date."""

    def table(match: re.Match[str]) -> str:
        kind, name = match[2], match[3]
        if kind == "settings":
            content = settings_table(CONFIGS[name]) if name in CONFIGS else foreign_table(name)
        else:
            content = formats_table() if kind == "formats" else losses_table()
        return f"{match[1]}\n{content}\n<!-- end -->"

    marker = r"(<!-- (settings|formats|losses) ?(\w*) -->)"
    return re.sub(marker + r"\n.*?<!-- end -->", table, text, flags=re.DOTALL)


if __name__ == "__main__":
    for document in map(Path, ("README.md", "docs/other-trainers.md")):
        text = with_tables(document.read_text(encoding="utf-8"))
        document.write_text(text, encoding="utf-8")

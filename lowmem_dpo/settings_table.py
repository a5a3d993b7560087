"""The README's tables of settings, made by `python -m lowmem_dpo.settings_table`.

The text between the markers `<!-- settings NAME -->` and `<!-- end -->` is replaced.
"""

import dataclasses
import re
from pathlib import Path

from lowmem_dpo.config import DemoConfig, GenerateConfig, TrainConfig
from lowmem_dpo.settings import type_name

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


def with_tables(text: str) -> str:
    """A README with its tables brought up to date."""

    def table(match: re.Match[str]) -> str:
        return f"{match[1]}\n{settings_table(CONFIGS[match[2]])}\n<!-- end -->"

    return re.sub(r"(<!-- settings (\w+) -->)\n.*?<!-- end -->", table, text, flags=re.DOTALL)


if __name__ == "__main__":
    readme = Path("README.md")
    readme.write_text(with_tables(readme.read_text(encoding="utf-8")), encoding="utf-8")

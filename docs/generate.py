"""Brings the tables in the docs up to date with the code: `python docs/generate.py`.

What stands between `<!-- table NAME -->` and `<!-- end -->` is replaced; the names are the keys of
`TABLES`.
"""

import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path

DOCS = Path(__file__).parent
# This checkout comes first, before one that is installed.
sys.path[:0] = [str(DOCS.parent), str(DOCS.parent / "kernels")]

from lowmem_dpo.data.formats import FORMATS
from lowmem_dpo.losses.types import LOSS_TYPES, span
from lowmem_dpo.settings.configs import (
    CacheConfig,
    DemoConfig,
    GenerateConfig,
    PlanConfig,
    TrainConfig,
)
from lowmem_dpo.settings.conversions import CONVERTED
from lowmem_dpo.settings.fields import Settings, settings_by_group, type_name
from lowmem_dpo.settings.help import default_text, field_docs, group_title
from lowmem_dpo.settings.other_names import FIXED, NO_EFFECT, RENAMED


def table(head: str, rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table; `head` names its columns, divided by bars."""
    columns = head.split(" | ")
    lines = [f"| {head} |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def settings_tables(config: type[Settings], *, own: bool = False) -> str:
    """Every setting of a config, or only its own: a heading and a table a group."""
    docs = field_docs(config)
    parts = []
    for group, fields in settings_by_group(config):
        if own and group is not config:
            continue
        rows = [
            (f"`{field.name}`", type_name(field.type), _code(default_text(field)), docs[field.name])
            for field in fields
        ]
        parts.append(f"### {group_title(group).rstrip('.')}\n")
        parts.append(table("setting | type | default | meaning", rows) + "\n")
    return "\n" + "\n".join(parts)


def losses_table() -> str:
    """Every loss: formula, use, and what is usual."""
    rows = []
    for name, loss in LOSS_TYPES.items():
        beta = "" if loss.usual_beta is None else span(loss.usual_beta)
        rate = span(loss.usual_learning_rate)
        rows.append((f"`{name}`", loss.formula, loss.use, beta, rate))
    return table("loss_type | loss of a pair | when | usual beta | usual learning rate", rows)


def formats_table() -> str:
    """Every format of a row, and what other trainers call it."""
    rows = [(known.name, f"`{known.example}`", known.peers) for known in FORMATS]
    return table("format | a row | elsewhere", rows)


def renamed_table() -> str:
    """Other trainers' names that have another one here."""
    rows = {name: f"`{ours}`" for name, ours in RENAMED.items()}
    rows |= {name: meaning for name, (meaning, _) in CONVERTED.items()}
    return table("theirs | ours", [(f"`{name}`", text) for name, text in sorted(rows.items())])


def fixed_table() -> str:
    """Other trainers' names that are accepted with some values only, those of a kind together."""
    names: dict[tuple[str, str], list[str]] = {}
    for name, (values, why) in sorted(FIXED.items()):
        texts = dict.fromkeys(
            "empty" if value in (None, [], {}, "") else f"`{_in_yaml(value)}`" for value in values
        )
        names.setdefault((", ".join(texts) or "no value", why), []).append(f"`{name}`")
    rows = [(", ".join(each), *kind) for kind, each in names.items()]
    return table("theirs | accepted | why no other value", rows)


def no_effect_table() -> str:
    """Other trainers' names that have no effect, those of a kind together."""
    names: dict[str, list[str]] = {}
    for name, why in sorted(NO_EFFECT.items()):
        names.setdefault(why, []).append(f"`{name}`")
    return table(
        "theirs | why it has no effect", [(", ".join(each), why) for why, each in names.items()]
    )


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _in_yaml(value: object) -> str:
    """A value as a settings file spells it."""
    return value if value and isinstance(value, str) else json.dumps(value)


TABLES = {
    "train": lambda: settings_tables(TrainConfig),
    "generate": lambda: settings_tables(GenerateConfig),
    "cache": lambda: settings_tables(CacheConfig),
    "plan": lambda: settings_tables(PlanConfig, own=True),
    "demo": lambda: settings_tables(DemoConfig),
    "losses": losses_table,
    "formats": formats_table,
    "renamed": renamed_table,
    "fixed": fixed_table,
    "no_effect": no_effect_table,
}


def with_tables(text: str) -> str:
    """A document with its tables brought up to date."""
    return re.sub(
        r"(<!-- table (\w+) -->)\n.*?<!-- end -->",
        lambda match: f"{match[1]}\n{TABLES[match[2]]()}\n<!-- end -->",
        text,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    for document in sorted(DOCS.glob("*.md")):
        text = document.read_text(encoding="utf-8")
        document.write_text(with_tables(text), encoding="utf-8")

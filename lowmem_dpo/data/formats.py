"""Formats: what a row may look like, and how it becomes a `Preference`.

`FORMATS` is the one table of them: a row has the first format whose columns it has and whose
`holds` is true of it; error texts and the table in docs/data.md are made of it too. What is not
known is refused by name: a file that is guessed at trains on the wrong text in silence.

A column that any format takes for the prompt is read, or says only what is read already, or the row
is refused. All other columns are left out, and told by name.
"""

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

from lowmem_dpo.data.messages import (
    CALL_ROLES,
    ROLES,
    UNSUPPORTED,
    Notes,
    has_system,
    keys_in_words,
    looks_like_messages,
    read_template_kwargs,
    read_tools,
)
from lowmem_dpo.data.rows import RowFault, printable_line, read_text, type_in_words
from lowmem_dpo.data.sides import (
    SIDES,
    Columns,
    Content,
    Sides,
    all_strings,
    begins_with_prompt,
    is_hh,
    read_context,
    read_conversations,
    read_hh,
    read_joined,
    read_message_lists,
    read_parts,
    read_rejected_messages,
    read_strings,
)

# Read in every format. tools and chat_template_kwargs go to the chat template.
COMMON_COLUMNS = ("system", "tools", "chat_template_kwargs")
ANSWER_COLUMNS = {
    *SIDES,
    *("preferred_output", "non_preferred_output"),
    *("response", "rejected_response", "rejected_messages"),
}
ANSWER_ROLES = [role for role, ours in ROLES.items() if ours == "assistant"]
# Of data with one answer a row.
LABELS = ("label", "kto_tag")
CLOSE_NAMES = 0.85  # of difflib: rejcted is rejected, prompt_id is not prompt


@dataclass(frozen=True)
class Preference:
    """One row: a prompt and two answers to it.

    Attributes:
        prompt: Plain text, or messages.
        chosen: The better answer; plain text where `prompt` is, else messages.
        rejected: The worse answer, likewise.
        row: Line in a file of lines, place in a list or data set; counted from 1.
        system: System message for a plain-text prompt; messages hold their own.
        tools: JSON schemas of the tools that the chat template shows the model.
        chat_template_kwargs: The row's own variables for the chat template.
    """

    prompt: Content
    chosen: Content
    rejected: Content
    row: int
    system: str = ""
    tools: list[dict[str, Any]] = field(default_factory=list)
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Format:
    """A layout of rows.

    Attributes:
        name: For messages.
        columns: What a row must have; with dots within objects.
        example: A row, for docs/data.md.
        peers: Where it comes from, and what other trainers call it; for docs/data.md.
        read: Prompt, chosen and rejected of a row.
        holds: What must be true of the values besides.
        parts: Further columns that are read where they are.
    """

    name: str
    columns: tuple[str, ...]
    example: str
    peers: str
    read: Callable[[Columns, Notes], Sides]
    holds: Callable[[Columns], bool] = lambda row: True
    parts: tuple[str, ...] = ()


def parse_row(value: Any, row: int, notes: Notes | None = None) -> tuple[Preference, Format]:
    """Read a row.

    Args:
        value: From the file, under our names of columns.
        row: Its number.
        notes: Takes what is left out of messages.

    Returns:
        The preference, and the format it was found to have.

    Raises:
        RowFault: The row cannot be read; says why and how to mend it.
    """
    if not isinstance(value, dict):
        raise RowFault(
            f"a row must be a JSON object, got {type_in_words(value)}; {known_formats()}"
        )
    if None in value.values():
        value = {name: item for name, item in value.items() if item is not None}
    found = next((f for f in _formats_with(frozenset(value)) if f.holds(value)), None)
    if found is None:
        raise RowFault(_what_is_missing(value))
    for column in UNSUPPORTED:
        if value.get(column):
            raise RowFault(f"the column {column} is not supported yet; remove it")
    sides = found.read(value, notes or Notes())
    _check_nothing_is_lost(value, found, sides)
    prompt, chosen, rejected = sides
    system = read_text(value.get("system") or "", "system")
    system = system if system.strip() else ""
    if system and not isinstance(prompt, str):
        if has_system(prompt):
            raise RowFault("a system column and a system message; keep one of them")
        prompt, system = [{"role": "system", "content": system}, *prompt], ""
    tools = value.get("tools", value.get("input.tools") if "input.tools" in found.parts else None)
    name = "chat_template_kwargs"
    variables = read_template_kwargs(value[name]) if name in value else {}
    tools = read_tools(tools) if tools else []
    return Preference(prompt, chosen, rejected, row, system, tools, variables), found


@lru_cache(maxsize=1000)
def _formats_with(names: frozenset[str]) -> tuple["Format", ...]:
    """The formats whose columns are among some names."""
    return tuple(known for known in FORMATS if names.issuperset(known.columns))


def _check_nothing_is_lost(value: Columns, found: Format, sides: Sides) -> None:
    """Refuse a column of a conversation that is not read and says more than what is read."""
    unread = (value.keys() & PROMPT_COLUMNS).difference(found.columns, found.parts)
    if found.read is read_joined:  # it has no prompt of its own: any column of messages may be it
        unread |= {name for name, item in value.items() if _is_messages(item)}
    if not unread:
        return
    read = " ".join(text for part in (*sides, value.get("system")) for text in _texts(part))
    for name in sorted(unread):
        says = value[name]
        if says in (value.get(side) for side in SIDES):
            continue
        while isinstance(says, list) and says and _role(says[-1]) in ANSWER_ROLES:
            says = says[:-1]
        if all(text in read for text in _texts(says)):
            continue
        first = found.columns[0]
        leave_it = f"{{{first}: {first}}} to leave it out, " if first in PROMPT_COLUMNS else ""
        raise RowFault(
            f"the column {name} beside {first} is not supported; put it into the prompt, or set "
            f"columns {leave_it}{{prompt: {name}}} to read it instead"
        )


def _texts(value: Any) -> list[str]:
    """The texts of a column: what is said, without white space that varies."""
    if isinstance(value, str):
        return [" ".join(value.split())]
    if _role(value):
        content = value.get("value" if "from" in value else "content")
        return [] if _role(value) in CALL_ROLES else _texts(content)
    return [text for item in value for text in _texts(item)] if isinstance(value, list) else []


def _role(value: Any) -> Any:
    """The role of a message; None of anything else."""
    return value.get("from", value.get("role")) if isinstance(value, dict) else None


def _is_messages(value: Any) -> bool:
    """Whether a column holds a list of messages, as it is or as text."""
    if isinstance(value, list):
        return bool(value) and _role(value[0]) is not None
    return looks_like_messages(value)


def _what_is_missing(value: Columns) -> str:
    """What a row that has no format lacks, and how to mend it."""
    if {"completion", "label"} <= value.keys() or _has_label(value):
        return (
            "unpaired preferences (KTO data: one answer a row, with a label) are not supported; "
            "join two rows of the same prompt into one: prompt, chosen (the answer whose label is "
            "true), rejected (the one whose label is false)"
        )
    lacking = [key for key in ("prompt", *SIDES) if key not in value]
    if "prompt" in lacking and PROMPT_COLUMNS & value.keys():
        lacking.remove("prompt")
    hints = {name: close_name(name, value[name], tuple(lacking)) for name in list(value)[:50]}
    hints = {name: hint for name, hint in hints.items() if hint}
    found = f"missing {', '.join(lacking)}; found {keys_in_words(value)}"
    if not hints:
        return f"{found}; {known_formats()}; name other columns with columns {{chosen: NAME}}"
    meant = " and ".join(f"{hint} by {printable_line(name)}" for name, hint in hints.items())
    names = ", ".join(f"{hint}: {printable_line(name)}" for name, hint in hints.items())
    return f"{found}; did you mean {meant}? then set columns {{{names}}}"


def _has_label(value: Columns) -> bool:
    """Whether a row has a label of one answer, and no second answer."""
    labels = [str(value[name]).lower() for name in LABELS if name in value]
    return "rejected" not in value and any(x in ("true", "false", "0", "1") for x in labels)


def known_formats() -> str:
    """The columns of every format in one line."""
    beside: dict[str, list[str]] = {}
    for known in FORMATS:
        if known.columns[-2:] == SIDES:
            beside.setdefault(", ".join(SIDES), []).extend(known.columns[:-2])
        else:
            beside[", ".join(known.columns)] = []
    parts = [
        f"{sides}, alone or with {'/'.join(dict.fromkeys(names))}" if names else sides
        for sides, names in beside.items()
    ]
    return "known are " + "; ".join(parts)


def close_name(name: str, item: Any, known: tuple[str, ...]) -> str:
    """Which of some known names a column may be meant by: written almost so, or within its name."""
    return _close_name(name, known) if isinstance(item, str | list | dict) else ""


@lru_cache(maxsize=1000)
def _close_name(name: str, known: tuple[str, ...]) -> str:
    words = re.split(r"[\W_]+", name.lower()[:80])
    within = [other for other in known if other in words]
    close = difflib.get_close_matches(name.lower()[:80], known, 1, CLOSE_NAMES)
    return next(iter(within + close), "")


FORMATS = (
    Format(
        "ShareGPT ranking",
        ("conversations", *SIDES),
        '{"conversations": [{"from": "human", "value": ...}, ...], "chosen": {"from": "gpt", ...}, '
        '"rejected": ...}',
        "LLaMA-Factory: `formatting: sharegpt`, `ranking: true`",
        partial(read_message_lists, name="conversations"),
    ),
    Format(
        "Anthropic HH text",
        SIDES,
        r'{"chosen": "\n\nHuman: ...\n\nAssistant: ...", "rejected": ...}',
        "Anthropic/hh-rlhf, the code of the DPO paper",
        read_hh,
        is_hh,
        ("prompt",),
    ),
    Format(
        "prompt/chosen/rejected strings",
        ("prompt", *SIDES),
        '{"prompt": "...", "chosen": "...", "rejected": "..."}',
        "TRL: standard; axolotl: `chatml.prompt_pairs`; OpenRLHF: `prompt_key`",
        read_strings,
        all_strings,
    ),
    Format(
        "prompt and whole conversations",
        ("prompt", *SIDES),
        '{"prompt": "...", "chosen": [{"role": "user", ...}, {"role": "assistant", ...}], '
        '"rejected": [...]}',
        "UltraFeedback (alignment-handbook); axolotl: `chatml.ultra`",
        read_conversations,
        begins_with_prompt,
    ),
    Format(
        "message lists",
        ("prompt", *SIDES),
        '{"prompt": [{"role": "user", "content": "..."}], "chosen": [...], "rejected": [...]}',
        "TRL: conversational",
        read_message_lists,
    ),
    Format(
        "instruction and input",
        ("instruction", *SIDES),
        '{"instruction": "...", "input": "...", "history": [["...", "..."]], "chosen": "...", '
        '"rejected": "..."}',
        "LLaMA-Factory: `formatting: alpaca`, `ranking: true`",
        lambda row, notes: read_parts(row, notes, "instruction", "input"),
        parts=("input", "history"),
    ),
    Format(
        "question",
        ("question", *SIDES),
        '{"system": "...", "question": "...", "chosen": "...", "rejected": "..."}',
        "Orca pairs; axolotl: `chatml.intel`",
        partial(read_context, name="question"),
        parts=("history",),
    ),
    Format(
        "input",
        ("input", *SIDES),
        '{"input": "...", "chosen": "...", "rejected": "..."}',
        "axolotl: `chatml.icr`",
        partial(read_context, name="input"),
        parts=("history",),
    ),
    Format(
        "OpenAI preference",
        ("input.messages", "preferred_output", "non_preferred_output"),
        '{"input": {"messages": [{"role": "user", ...}], "tools": [...]}, "preferred_output": '
        '[{"role": "assistant", ...}], "non_preferred_output": [...]}',
        "OpenAI: preference fine-tuning",
        partial(
            read_context,
            name="input.messages",
            sides=("preferred_output", "non_preferred_output"),
        ),
        parts=("input.tools",),
    ),
    Format(
        "messages and rejected_messages",
        ("messages", "rejected_messages"),
        '{"messages": [..., {"role": "assistant", "content": "..."}], "rejected_messages": [...]}',
        "ms-swift",
        partial(read_rejected_messages, rejected="rejected_messages"),
    ),
    Format(
        "messages and rejected_response",
        ("messages", "rejected_response"),
        '{"messages": [..., {"role": "assistant", "content": "..."}], "rejected_response": "..."}',
        "ms-swift",
        partial(read_rejected_messages, rejected="rejected_response"),
    ),
    Format(
        "query and responses",
        ("query", "response", "rejected_response"),
        '{"query": "...", "response": "...", "rejected_response": "...", '
        '"history": [["...", "..."]]}',
        "ms-swift, its older form",
        partial(read_context, name="query", sides=("response", "rejected_response")),
        parts=("history",),
    ),
    *(
        Format(
            f"{name} and answers",
            (name, *SIDES),
            f'{{"{name}": [{{"role": "user", "content": "..."}}], '
            '"chosen": "...", "rejected": "..."}',
            peers,
            partial(read_context, name=name),
            lambda row: not begins_with_prompt(row),
            parts=("history",),
        )
        for name, peers in (
            ("messages", "axolotl: `chat_template.default`"),
            ("conversation", "the same under other names"),
            ("context", "the same"),
            ("query", "the same; ms-swift's older name of a prompt"),
        )
    ),
    Format(
        "implicit prompt, whole conversations",
        SIDES,
        '{"chosen": [{"role": "user", ...}, {"role": "assistant", ...}], "rejected": [...]}',
        "TRL: conversational, implicit prompt; axolotl: `chatml.argilla_chat`",
        read_conversations,
        lambda row: isinstance(row["chosen"], list) or isinstance(row["rejected"], list),
    ),
    Format(
        "implicit prompt, strings",
        SIDES,
        '{"chosen": "What is rain? Water.", "rejected": "What is rain? Wind."}',
        "TRL: standard, implicit prompt",
        read_joined,
        all_strings,
    ),
)
# Columns of which a row's prompt is made.
PROMPT_COLUMNS = frozenset(
    name
    for known in FORMATS
    for name in (*known.columns, *known.parts)
    if name not in ANSWER_COLUMNS and name != "input.tools"
)
COLUMNS = tuple(
    dict.fromkeys([c for known in FORMATS for c in known.columns + known.parts] + [*COMMON_COLUMNS])
)

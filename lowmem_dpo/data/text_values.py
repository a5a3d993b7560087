"""Values that stand in a file as text: JSON, or a list or dict as Python prints it.

Tables hold lists of messages so, and whole data sets were made by tools that wrote them so. Nothing
is evaluated: Python's notation is read by `ast.literal_eval`, and only what JSON could hold too.
"""

import ast
import json
import re
import warnings
from typing import Any

# How a message or a list of them begins; NumPy's too, to be refused by name.
MESSAGES_OPENING = re.compile(r"""\s*(?:array\()?\[?\s*\{\s*["']""")
PYTHON_OPENING = re.compile(r"""\s*(?:array\()?[\[({]""")
ROLE_OF_MESSAGE = re.compile(
    r"""["'](?:role|from)["']\s*:\s*["'](?:user|human|assistant|gpt|system|developer|"""
    r"""tool|tool_call|tool_response|function_call|observation)["']"""
)
NO_COMMAS = re.compile(r"\}\s+\{")


def looks_like_messages(value: Any) -> bool:
    """Whether a value is text that begins as a message or a list of them, and names a role."""
    return (
        isinstance(value, str)
        and MESSAGES_OPENING.match(value) is not None
        and ROLE_OF_MESSAGE.search(value) is not None
    )


def value_of_text(text: str) -> tuple[Any, str]:
    """Read a value.

    Args:
        text: From a column.

    Returns:
        The value as JSON has it, and the notation: JSON or Python.

    Raises:
        ValueError: The text is neither; says why, to stand behind "is text, but".
    """
    try:
        return json.loads(text), "JSON"
    except (RecursionError, ValueError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "too deep or too long"
        if not (PYTHON_OPENING.match(text) and "'" in text):
            raise ValueError(f"no JSON ({reason})") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd escapes in the text
            value = ast.literal_eval(text.strip())
        return json.loads(json.dumps(value)), "Python"
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        reason = " (NumPy prints arrays without commas)" if NO_COMMAS.search(text) else ""
        raise ValueError(
            f"neither JSON nor a Python list or dict{reason}; write it with json.dumps"
        ) from None

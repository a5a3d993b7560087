"""Prompts from a file, for what only answers."""

from pathlib import Path

from lowmem_dpo.data.messages import looks_like_messages
from lowmem_dpo.data.reading import is_single_file
from lowmem_dpo.data.rows import Row, read_rows, read_text_lines


def read_prompts(path: str) -> list[str]:
    """Prompts from a file: `prompt` of each row, or one a line in files that hold no rows.

    Raises:
        ValueError: If the file cannot be read, or holds no prompts.
    """
    if is_single_file(path):
        prompts = [_prompt_of(row) for row in read_rows(Path(path))]
    else:
        try:
            prompts = [_text_of(row) for row in read_text_lines(Path(path))]
        except OSError as error:
            raise ValueError(
                f"cannot read the prompts in {path}: {error.strerror}; give a file of prompts"
            ) from None
    if not prompts:
        raise ValueError(f"{path} holds no prompts; write one a line")
    return prompts


def _text_of(row: Row) -> str:
    if row.fault:
        raise ValueError(f"{row.place}: {row.fault}")
    return row.value


def _prompt_of(row: Row) -> str:
    prompt = row.value.get("prompt") if isinstance(row.value, dict) else None
    prompt = None if looks_like_messages(prompt) else prompt
    if row.fault or not isinstance(prompt, str) or not prompt.strip():
        fault = row.fault or "every row must be an object with text, not messages, in `prompt`"
        raise ValueError(f"{row.place}: {fault}")
    return prompt

"""An answer behind its prompt: where it begins in what a template writes, and what is left out.

The context of an answer is the prompt as it is at inference; the answer is what the template writes
for it. Most templates write a conversation as its prompt with the answer behind it. Some do not:

- the prompt at inference opens a thought that is not written in front of answers (R1: `<think>`);
- the prompt is written otherwise once an answer follows (Mistral's system message in the last
  user's turn, as long as that turn is last);
- the answer is not written whole (reasoning, tool calls).

Here the answer is put behind the prompt all the same, and each such difference gets a note with
the text it is about. What differs is found by rendering the conversation without an answer, and
with one known beforehand.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from lowmem_dpo.data.messages import Message

ASSISTANT_PROBE = "AssistantProbe"
THOUGHT_OPEN = re.compile(r"(<think(?:ing)?>|<thought>|<reasoning>|\[THINK\])\s*\Z")
THOUGHT_BEGIN = re.compile(r"(<think(?:ing)?>|<thought>|<reasoning>|\[THINK\])\s*")
THOUGHT_CLOSE = re.compile(r"(</think(?:ing)?>|</thought>|</reasoning>|\[/THINK\])\s*")
# What begins like a tag and is cut before its end.
HALF_TAG = re.compile(r"[<\[][^<>\[\]]*\Z")
MAX_QUOTED = 80  # characters of an example
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")

# What can be said of a pair: the end of "N pairs ...", with a text from the first of them.
NOTES = {
    "opened": "have a prompt that ends in {text} at inference only, and so here: the chat template "
    "does not write it in front of answers",
    "moved": "have a prompt that the chat template writes otherwise once an answer follows "
    "({text} goes or moves): it stays as at inference",
    "closed": "have reasoning in the answer, {text}, where the prompt has closed the thought: it "
    "is left out; change chat_template_kwargs, or set keep_reasoning yes if it is in the content",
    "content": "lose text of an answer in the chat template: {text}; "
    "keep_reasoning yes writes answers as they stand",
    "in turns": "lose text of an answer in the chat template: {text}; "
    "name a template that writes it with --chat_template FILE",
    "reasoning": "lose reasoning in the chat template, which writes none of {text}; put it into "
    "the content, in <think>...</think>, and set keep_reasoning yes",
    "tool calls": "lose tool calls in the chat template, such as {text}; "
    "name a template that writes them with --chat_template FILE",
    "prompt calls": "lose tool calls of the prompt in the chat template, at inference too, such as "
    "{text}; name a template that writes them with --chat_template FILE",
    "apart": "have a prompt whose last tokens, {text}, merge with an answer's first: prompt and "
    "answer become tokens apart, as at inference",
    "kept": "keep text of an answer that the chat template would leave out or write twice, "
    "{text}: written as it stands; keep_reasoning no leaves it to the template",
}
LOSSES = ("closed", "content", "in turns", "reasoning", "tool calls")


# Renders messages; with opens_answer=True, what opens an answer behind them.
Write = Callable[..., str]


@dataclass
class Answer:
    """What stands behind a prompt.

    Attributes:
        text: The answer, end of turn included.
        notes: Name of a note to the text it is about.
    """

    text: str
    notes: dict[str, str] = field(default_factory=dict)


def write_answer(
    write: Write, messages: list[Message], prompt: str, answer: list[Message], keep: str
) -> Answer:
    """What a template writes for an answer, put behind the prompt.

    Args:
        write: Renders messages.
        messages: The prompt's.
        prompt: The prompt as it is at inference.
        answer: The answer's messages.
        keep: The setting keep_reasoning.

    Raises:
        ValueError: The template refuses the messages, or nothing tells where the answer begins.
    """
    written = write(messages + answer)
    if written.startswith(prompt):
        found = Answer(written[len(prompt) :])
    else:
        found = _behind_prompt(write, messages, prompt, answer, written)
    if "closed" not in found.notes:
        opened = THOUGHT_OPEN.search(prompt)
        shown = (opened[0] if opened else "") + found.text
        found.notes |= _left_out(write, messages, answer, written, shown)
    content = answer[0].get("content")
    if len(answer) > 1 or answer[0].get("tool_calls") or not isinstance(content, str):
        if "content" in found.notes:
            found.notes["in turns"] = found.notes.pop("content")
        return found
    lost = found.notes.get("closed") or found.notes.get("content", "")
    lost = lost if lost in content else ""  # and not in reasoning_content
    thoughts = list(THOUGHT_CLOSE.finditer(content))
    if thoughts and len(THOUGHT_CLOSE.findall(found.text)) > len(thoughts):
        lost, wanted = content[: thoughts[0].end()], keep != "no"  # written behind an empty thought
    else:
        wanted = keep == "yes" or (keep == "auto" and THOUGHT_OPEN.search(prompt) is not None)
    whole = _as_it_stands(write, messages, prompt, content) if lost and wanted else None
    if whole is None:
        return found
    moved = {name: text for name, text in found.notes.items() if name == "moved"}
    return Answer(whole, moved | {"kept": lost.strip()})


def _behind_prompt(
    write: Write, messages: list[Message], prompt: str, answer: list[Message], written: str
) -> Answer:
    """The answer where the template does not write it behind the prompt as it is at inference.

    Args:
        write: Renders messages.
        messages: The prompt's.
        prompt: The prompt as it is at inference.
        answer: The answer's messages.
        written: The whole conversation.
    """
    context = write(messages)
    context = prompt[: _common_length(context, prompt)]
    before = _before_probe(write, messages, answer)
    end, notes = len(context), {}
    if not before.startswith(context):
        # Alike in front up to some place, or behind from some place on: the nearer to the answer.
        same, tail = _common_length(context, before), _longest_tail(context, before)
        tail_end = before.rfind(tail) + len(tail) if tail else 0
        end = max(same, tail_end)
        kept = 0 if end == same else len(tail)
        moved = context[same : max(len(context) - kept, same)] or before[same:end]
        notes["moved"] = moved
        if not end:
            raise ValueError("nothing tells where the answer begins in what the template writes")
    if not written.startswith(before[:end]):
        raise ValueError("the chat template writes the prompt otherwise for every answer")
    opening, text = prompt[len(context) :], written[end:]
    shared = _common_length(opening, text)
    unwritten, text = opening[shared:], text[shared:]
    closing = THOUGHT_CLOSE.search(text)
    in_thought = THOUGHT_OPEN.search(opening[:shared]) and THOUGHT_CLOSE.search(unwritten)
    if closing and in_thought:
        notes["closed"], text = text[: closing.start()].strip(), text[closing.end() :]
    elif unwritten:
        notes["opened"] = unwritten
    if unwritten[-1:].isspace():
        text = text.lstrip()
    return Answer(text, notes)


def _before_probe(write: Write, messages: list[Message], answer: list[Message]) -> str:
    """The conversation up to the words of an answer known beforehand, in place of the first."""
    words = ASSISTANT_PROBE
    while words in f"{messages}{answer}":
        words += "0"
    probe = {"role": "assistant", "content": words}
    try:
        text = write([*messages, probe, *answer[1:]])
    except ValueError:  # what follows belongs to the answer's own first message
        text = write([*messages, probe])
    return text.partition(words)[0]


def _common_length(text: str, other: str) -> int:
    """Characters that two texts share at the front, no half of a tag among them."""
    shorter = min(len(text), len(other))
    length = _largest(shorter, lambda n: text[:n] == other[:n])
    return length if length == shorter else len(HALF_TAG.sub("", text[:length]))


def _longest_tail(text: str, other: str) -> str:
    """The longest end of a text that occurs in another."""
    return text[len(text) - _largest(len(text), lambda n: text[len(text) - n :] in other) :]


def _largest(limit: int, holds: Callable[[int], bool]) -> int:
    """The largest number up to a limit of which something holds that holds of all smaller ones."""
    low = 0
    while low < limit:
        middle = (low + limit + 1) // 2
        low, limit = (middle, limit) if holds(middle) else (low, middle - 1)
    return low


def _left_out(
    write: Write, messages: list[Message], answer: list[Message], written: str, text: str
) -> dict[str, str]:
    """What an answer's messages hold and the template does not write."""
    notes: dict[str, str] = {}
    for i, message in enumerate(answer):
        if message["role"] != "assistant":
            continue
        content = message.get("content")
        if isinstance(content, str) and not _holds(text, content):
            tail = _longest_tail(content.strip(), text)
            lost = content.strip().removesuffix(tail).strip()
            notes.setdefault("content", lost or content)
        reasoning = next((message[key] for key in REASONING_KEYS if message.get(key)), "")
        if isinstance(reasoning, str) and not _holds(text, reasoning):
            notes.setdefault("reasoning", reasoning.strip())
        if call := lost_call(write, messages + answer, len(messages) + i, written):
            notes.setdefault("tool calls", call)
    return notes


def lost_call(write: Write, messages: list[Message], place: int, written: str) -> str:
    """The first tool call of a message, if the template writes none of them; else empty.

    Args:
        write: Renders messages.
        messages: A conversation.
        place: Of the message in it.
        written: The conversation as it is written.
    """
    message = messages[place]
    if not message.get("tool_calls"):
        return ""
    bare = {name: item for name, item in message.items() if name != "tool_calls"}
    bare["content"] = bare.get("content") or ""
    try:
        without = write([*messages[:place], bare, *messages[place + 1 :]])
    except ValueError:  # it cannot do without them
        return ""
    return str(message["tool_calls"][0]) if without == written else ""


def _holds(text: str, part: str) -> bool:
    """Whether a text holds another, white space aside."""
    return part.strip() in text or "".join(part.split()) in "".join(text.split())


def _as_it_stands(write: Write, messages: list[Message], prompt: str, content: str) -> str | None:
    """An answer's words between what the template writes around those of any other answer."""
    probe: Message = {"role": "assistant", "content": ASSISTANT_PROBE}
    around = write_answer(write, messages, prompt, [probe], "no").text
    before, found, after = around.rpartition(ASSISTANT_PROBE)
    if not found:
        return None
    content, begun = content.strip(), THOUGHT_BEGIN.match(content.strip())
    if opened := THOUGHT_OPEN.search(prompt):
        if begun and begun[1] == opened[1]:
            content = content[begun.end() :]
        before = ""  # at most the end of an empty thought
    elif THOUGHT_CLOSE.search(before):
        before = ""  # an empty thought
    return before + content + after


def quoted(text: str) -> str:
    """Text in quotes and in one line, its middle left out where it is long."""
    half = MAX_QUOTED // 2
    shown = text if len(text) <= MAX_QUOTED else f"{text[:half]} [...] {text[-half:]}"
    return repr(shown)

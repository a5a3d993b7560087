"""Prompts that went through a chat template already, told by how they begin and end.

A word in a prompt says nothing: people ask what `[INST]` means, and add users on Linux. What tells
is structure. A rendered prompt begins with what opens a turn, and closes that turn or ends with
what opens an answer. Where the opening holds a token of its own (special, or added to the
vocabulary) that it begins so and closes the turn is enough; where a template is plain text, such as
`USER: ... ASSISTANT:`, the prompt must begin and end as the template does. How the template in use
opens and closes turns is learnt from it; common templates of other models are known.

Whether a file is rendered, most of its prompts decide.
"""

import re
from dataclasses import dataclass

ROLES = "(?:system|developer|user|assistant|model|tool)"
# A turn's opening in a token of its own, as common templates write it, for whichever model.
TURN = (
    rf"(?:(?:<\|im_start\|>|<\|start\|>|<start_of_turn>|<\|turn>){ROLES}\b"  # ChatML, Gemma
    rf"|<\|start_(?:header_id|of_role)\|>{ROLES}<\|end_(?:header_id|of_role)\|>"  # Llama 3, Granite
    r"|<\|(?:system|user|assistant)\|>(?=[\n<])"  # Zephyr, Phi 3
    r"|(?:<\|START_OF_TURN_TOKEN\|>)?<\|(?:SYSTEM|USER|CHATBOT)_TOKEN\|>"  # Command R
    r"|<｜(?:User|Assistant)｜>)"  # DeepSeek
)
BOS = (
    r"\s*(?:<s>|<bos>|<BOS_TOKEN>|\[gMASK\]<sop>"
    r"|<[|｜](?:begin_of_text|begin▁of▁sentence|startoftext)[|｜]>)?\s*"
)
TURN_END = (
    r"(?:</s>|<eos>|<end_of_turn>|<turn\|>"
    r"|<\|(?:im_end|eot_id|end|end_of_text|endoftext|END_OF_TURN_TOKEN)\|>)"
)
THOUGHT = r"(?:\s*<think>)?\s*"
ANSWER_OPENING = (
    r"(?:(?:<\|im_start\|>|<\|start\|>)assistant|(?:<start_of_turn>|<\|turn>)model"
    r"|<\|start_(?:header_id|of_role)\|>assistant<\|end_(?:header_id|of_role)\|>"
    r"|<\|assistant\|>|<\|CHATBOT_TOKEN\|>|<｜Assistant｜>)"
)
COMMON = [
    re.compile(pattern, re.DOTALL)
    for pattern in (
        rf"{BOS}{TURN}.*{TURN_END}",
        rf"{BOS}<(?:[|｜]|start_of_turn>).*(?<! ){ANSWER_OPENING}{THOUGHT}\Z",
        rf"{BOS}\[INST\].*\[/INST\]{THOUGHT}\Z",  # Llama 2, Mistral
        r"(?:.*\n)?### Instruction:\n.*\n### Response:\s*\Z",  # Alpaca
    )
]


@dataclass(frozen=True)
class TurnMarks:
    """How a template opens and closes turns.

    Attributes:
        openings: What a prompt begins with, white space behind it left out.
        own_tokens: Those of the openings that hold a token of their own.
        user_end: What closes a user's turn; empty for templates that write nothing there.
        answer_opening: What stands between a user's words and the assistant's.
    """

    openings: tuple[str, ...] = ()
    own_tokens: tuple[str, ...] = ()
    user_end: str = ""
    answer_opening: str = ""

    def fit(self, prompt: str) -> bool:
        """Whether a prompt is rendered by this template."""
        prompt = prompt.strip()
        closes = bool(self.user_end) and self.user_end in prompt
        if closes and prompt.startswith(self.own_tokens):
            return True
        ends = bool(self.answer_opening) and prompt.endswith(self.answer_opening)
        return ends and prompt.startswith(self.openings)


NO_MARKS = TurnMarks()


def looks_rendered(prompt: str, marks: TurnMarks) -> bool:
    """Whether a prompt is built as the template in use, or a common one, builds it."""
    return marks.fit(prompt) or any(pattern.match(prompt) for pattern in COMMON)

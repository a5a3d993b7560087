"""Answers behind the prompt of inference, on the shapes of real templates, and what is said."""

import pytest

from lowmem_dpo.data.formats import Preference
from lowmem_dpo.settings.groups import EncodingSettings
from lowmem_dpo.tokens.encoding import encode_pairs, render_prompt
from tests.tokens.encoding import AUTO, encode_one, sides, turn
from tests.tokens.shapes import (
    DROPS_REASONING,
    GPT_OSS,
    HARMONY_TOKENS,
    LLAMA31,
    MISTRAL_V3,
    QWEN3,
    QWEN35,
    R1,
    SMOLLM2,
)

KEEP, DROP = EncodingSettings(keep_reasoning="yes"), EncodingSettings(keep_reasoning="no")
SYSTEM, USER = turn("system", "SYS"), turn("user", "hi")
THOUGHT = "<think>\nDouble 2.\n</think>\n\n4"
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "rain", "arguments": {"at": "sea"}}}],
}


def pair_of(chosen, rejected="no", prompt=(USER,), row=1, **columns):
    answers = [
        answer if isinstance(answer, list) else [turn("assistant", answer)]
        for answer in (chosen, rejected)
    ]
    return Preference(list(prompt), *answers, row, **columns)


@pytest.fixture
def encode(build_tokenizer):
    """Encode one pair under a template; checks the prompt, returns the answers and the report."""

    def run(template, preference, settings=AUTO, tokens=(), **kwargs):
        tokenizer = build_tokenizer("chatml", **kwargs)
        tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
        tokenizer.chat_template = template
        pair, report = encode_one(preference, tokenizer, settings)
        prompt = render_prompt(tokenizer, preference.prompt, settings)
        assert list(pair.chosen_ids[: pair.chosen_start]) == prompt
        assert list(pair.rejected_ids[: pair.rejected_start]) == prompt
        answers = [answer for _, answer in sides(pair, tokenizer)]
        return tokenizer.decode(prompt), answers, report

    return run


# The prompt of inference


@pytest.mark.parametrize(
    ("turns", "prompt"),
    [
        ([SYSTEM, USER], "<s>[INST] SYS\n\nhi[/INST]"),
        (
            [SYSTEM, USER, turn("assistant", "ho"), USER],
            "<s>[INST] hi[/INST] ho</s>[INST] SYS\n\nhi[/INST]",
        ),
    ],
)
def test_a_system_message_that_moves_stays_in_the_prompt(encode, turns, prompt):
    shown, answers, report = encode(MISTRAL_V3, pair_of("yes", "[INST] hi[/INST]", turns))
    assert shown == prompt
    assert answers == [" yes</s>", " [INST] hi[/INST]</s>"]
    assert report.notes == {"moved": {"num_pairs": 1, "row": 1, "text": "SYS\n\n"}}
    (line,) = (line for line in report.lines() if "otherwise once an answer follows" in line)
    assert line.startswith("1 of 1 pairs (first row 1) have a prompt") and r"'SYS\n\n'" in line


def test_a_turn_that_is_closed_at_inference_only_stays_closed(encode):
    template = (  # Gemma 4: an answer behind a tool's goes on with the turn that called it
        "{% for m in messages %}{% if m['role'] == 'user' %}<u>{{ m['content'] }}<e>\n<m>"
        "{% else %}{{ m['content'] }}{% if loop.last %}<e>\n{% endif %}{% endif %}{% endfor %}"
    )
    turns = [USER, turn("assistant", "call"), turn("tool", "wet")]
    shown, answers, report = encode(template, pair_of("yes", prompt=turns))
    assert shown == "<u>hi<e>\n<m>callwet<e>\n"
    assert answers == ["yes<e>\n</s>", "no<e>\n</s>"]
    assert report.notes["moved"]["text"] == "<e>\n"


def test_a_prompt_that_moves_is_found_before_answers_of_several_turns(encode):
    several = [turn("assistant", "one"), USER, turn("assistant", "two")]
    shown, answers, _ = encode(MISTRAL_V3, pair_of(several, prompt=[SYSTEM, USER]))
    assert shown == "<s>[INST] SYS\n\nhi[/INST]"
    assert answers == [" one</s>[INST] hi[/INST] two</s>", " no</s>"]


@pytest.mark.parametrize("answer", ["yes", "<b>yes</b>", "<thin"])
def test_a_thought_that_is_opened_at_inference_only_stays_in_the_prompt(encode, answer):
    shown, answers, report = encode(R1, pair_of(answer))
    assert shown == "<s><|user|>hi<|assistant|><think>\n"
    assert answers == [f"{answer}</s>", "no</s>"]
    assert report.notes == {"opened": {"num_pairs": 1, "row": 1, "text": "<think>\n"}}
    assert any(r"ends in '<think>\n' at inference only" in line for line in report.lines())


def test_words_of_the_probe_in_the_data_mislead_nobody(encode):
    turns = [turn("user", "AssistantProbe"), turn("assistant", "UserProbe"), USER]
    shown, answers, _ = encode(R1, pair_of("AssistantProbe", prompt=turns))
    assert shown.startswith("<s><|user|>AssistantProbe<|assistant|>UserProbe</s><|user|>hi")
    assert answers == ["AssistantProbe</s>", "no</s>"]


def test_plain_strings_get_the_prompt_of_inference_too(encode):
    _, answers, _ = encode(R1, Preference("hi", "yes", "no</s>", 1))
    assert answers == ["yes</s>", "no</s>"]


@pytest.mark.parametrize("template", [SMOLLM2, QWEN3, DROPS_REASONING, GPT_OSS])
def test_templates_that_write_the_prompt_alike_need_no_note(encode, template):
    turns = [SYSTEM, USER, turn("assistant", "ho"), USER]
    _, _, report = encode(template, pair_of("yes", prompt=turns), tokens=HARMONY_TOKENS)
    assert report.notes == {}


# What is left out


def test_reasoning_that_the_template_drops_is_said_and_can_be_kept(encode):
    preference = pair_of(THOUGHT, "<think>\nHm.\n</think>\n\n5")
    for settings in (AUTO, DROP):
        _, answers, report = encode(DROPS_REASONING, preference, settings)
        assert answers == ["4<|im_end|>\n", "5<|im_end|>\n"]
        (line,) = (line for line in report.lines() if "lose text" in line)
        assert r"'<think>\nDouble 2.\n</think>'" in line and "keep_reasoning yes" in line
    _, answers, report = encode(DROPS_REASONING, preference, KEEP)
    assert answers == [f"{THOUGHT}<|im_end|>\n", "<think>\nHm.\n</think>\n\n5<|im_end|>\n"]
    assert list(report.notes) == ["kept"]


def test_pairs_that_differ_in_dropped_text_only_are_named_so(build_tokenizer):
    tokenizer = build_tokenizer("chatml")
    tokenizer.chat_template = DROPS_REASONING
    same = pair_of(THOUGHT, "<think>\nHm.\n</think>\n\n4")
    pairs, report = encode_pairs([same, pair_of("yes", row=2)], tokenizer, AUTO)
    reason = "identical without what the chat template leaves out"
    assert len(pairs) == 1 and report.num_dropped == {reason: 1}
    expected = rf"1 {reason}\); 1 of 1 pairs .*<think>.nDouble 2.*keep_reasoning yes"
    with pytest.raises(ValueError, match=expected.replace(".n", r"\\n")):
        encode_pairs([same], tokenizer, AUTO)
    assert len(encode_pairs([same], tokenizer, KEEP)[0]) == 1
    with pytest.raises(ValueError, match=r"1 identical\); check the data"):
        encode_pairs([pair_of("yes", "yes")], tokenizer, AUTO)


@pytest.mark.parametrize("opening", ["<think>\n", "<think>", ""])
def test_reasoning_is_kept_where_the_prompt_opens_the_thought(encode, opening):
    reasoned = pair_of(f"{opening}Double 2.\n</think>\n\n4")
    _, answers, report = encode(R1, reasoned)
    assert answers == ["Double 2.\n</think>\n\n4</s>", "no</s>"]
    assert set(report.notes) == {"kept", "opened"}
    _, answers, report = encode(R1, reasoned, DROP)
    assert answers == ["4</s>", "no</s>"]
    assert set(report.notes) == {"content", "opened"}


def test_a_prompt_that_moves_is_said_beside_reasoning_that_is_kept(encode):
    template = MISTRAL_V3.replace(
        " {{ m['content'] }}{{ eos", " {{ m['content'].split('</think>')[-1].strip() }}{{ eos"
    )
    preference = pair_of(THOUGHT, prompt=[SYSTEM, USER])
    shown, answers, report = encode(template, preference, KEEP)
    assert shown == "<s>[INST] SYS\n\nhi[/INST]"
    assert answers == [f" {THOUGHT}</s>", " no</s>"]
    assert report.notes.keys() == {"moved", "kept"}


def test_reasoning_that_the_template_writes_is_no_loss(encode):
    _, answers, report = encode(QWEN3, pair_of("<think>Double 2.</think>4"))
    expected = ["<think>\nDouble 2.\n</think>\n\n4", "<think>\n\n</think>\n\nno"]
    assert answers == [f"{answer}<|im_end|>\n" for answer in expected]
    assert report.notes == {}


def test_reasoning_behind_a_closed_thought_is_left_out_and_said(encode):
    off = {"enable_thinking": False}
    preference = pair_of(THOUGHT, chat_template_kwargs=off)
    closed = EncodingSettings(chat_template_kwargs=off)
    shown, answers, report = encode(QWEN3, preference, closed)
    assert shown.endswith("assistant\n<think>\n\n</think>\n\n")
    assert answers == ["4<|im_end|>\n", "no<|im_end|>\n"]
    assert report.notes["closed"]["text"] == "Double 2."
    kept = EncodingSettings(chat_template_kwargs=off, keep_reasoning="yes")
    _, answers, report = encode(QWEN3, preference, kept)
    assert answers == [f"{THOUGHT}<|im_end|>\n", "no<|im_end|>\n"]
    assert report.notes["kept"]["text"] == "Double 2."


@pytest.mark.parametrize("opening", ["", "<think>\n"])
def test_an_answers_own_reasoning_does_not_follow_an_empty_thought(encode, opening):
    template = QWEN35.replace("assistant\n<think>\n", f"assistant\n{opening}")
    _, answers, report = encode(template, pair_of(THOUGHT))
    assert opening + answers[0] == f"{THOUGHT}<|im_end|>\n"
    assert opening + answers[1] == "<think>\n\n</think>\n\nno<|im_end|>\n"
    assert "kept" in report.notes
    _, answers, _ = encode(QWEN35, pair_of(THOUGHT), DROP)
    assert answers[0].count("</think>") == 2


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_beside_the_content_is_said_where_it_is_not_written(encode, key):
    reasoned = pair_of([turn("assistant", "4") | {key: "Double 2."}])
    (line,) = (line for line in encode(SMOLLM2, reasoned)[2].lines() if "lose reasoning" in line)
    assert "'Double 2.'" in line and "<think>...</think>" in line
    if key == "reasoning_content":
        _, answers, report = encode(QWEN35, reasoned)
        assert answers[0] == "Double 2.\n</think>\n\n4<|im_end|>\n"
        assert report.notes.keys() == {"apart"}  # of the empty thought on the other side


def test_tool_calls_are_said_where_they_are_not_written(encode):
    calling = [turn("assistant", "Look.") | {"tool_calls": CALL["tool_calls"]}]
    (line,) = (
        line for line in encode(SMOLLM2, pair_of(calling))[2].lines() if "tool calls" in line
    )
    assert "rain" in line and "--chat_template FILE" in line
    assert encode(GPT_OSS, pair_of(calling), tokens=HARMONY_TOKENS)[2].notes.keys() == {"in turns"}


def test_tool_calls_of_a_prompt_are_said_where_they_are_not_written(encode):
    prompt = [USER, {**CALL, "content": "Wait."}, {"role": "tool", "content": "wet"}]
    notes = encode(SMOLLM2, pair_of("Take a coat.", prompt=prompt))[2].notes
    assert notes.keys() == {"prompt calls"} and "rain" in notes["prompt calls"]["text"]
    written = encode(GPT_OSS, pair_of("Take a coat.", prompt=prompt), tokens=HARMONY_TOKENS)[2]
    assert "prompt calls" not in written.notes


def test_a_closed_thought_costs_no_turn_of_an_answer_of_several(encode):
    off = {"enable_thinking": False}
    several = [turn("assistant", "one"), USER, turn("assistant", THOUGHT)]
    settings = EncodingSettings(chat_template_kwargs=off)
    _, answers, _ = encode(QWEN3, pair_of(several), settings)
    turns = "one<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert answers[0] == f"{turns}{THOUGHT}<|im_end|>\n"


@pytest.mark.parametrize(
    ("template", "chosen", "lost"),
    [
        (SMOLLM2, [CALL], "rain"),
        (DROPS_REASONING, "<think>Hm.</think>", "<think>Hm."),
    ],
)
def test_an_answer_of_which_nothing_is_left_is_a_bad_row(build_tokenizer, template, chosen, lost):
    tokenizer = build_tokenizer("chatml")
    tokenizer.chat_template = template.replace("m['content']", "(m['content'] or '')")
    pairs = [pair_of("yes"), pair_of(chosen, row=2)]
    with pytest.raises(ValueError, match=f"row 2: .* nothing of an answer.*{lost}.*skip$"):
        encode_pairs(pairs, tokenizer, AUTO)
    _, report = encode_pairs(pairs, tokenizer, EncodingSettings(on_bad_row="skip"))
    assert report.num_kept == 1
    assert report.num_dropped == {"refused by the chat template": 1}


# Ends of turns


@pytest.mark.parametrize(
    ("template", "eos", "call", "answer"),
    [
        (LLAMA31, "<|eot_id|>", "rain.call()<|eom_id|>", "no<|eot_id|>"),
        (
            GPT_OSS,
            "<|return|>",
            ' to=rain<|message|>{"at": "sea"}<|call|>',
            "<|channel|>final<|message|>no<|return|>",
        ),
    ],
)
def test_answers_that_call_tools_end_once(encode, template, eos, call, answer):
    tokens = [*HARMONY_TOKENS, "<|eom_id|>"]
    _, answers, report = encode(template, pair_of([CALL]), tokens=tokens, eos_token=eos)
    assert answers == [call, answer]
    assert report.notes == {}


def test_rendered_answers_that_call_tools_end_once(encode):
    prompt = "<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
    preference = Preference(prompt, "rain.call()<|eom_id|>", "no", 1)
    kwargs = {"tokens": ["<|eom_id|>"], "eos_token": "<|eot_id|>"}
    assert encode(LLAMA31, preference, **kwargs)[1] == ["rain.call()<|eom_id|>", "no<|eot_id|>"]

"""Which prompts count as rendered, in files of plain and of rendered ones."""

import pytest

from lowmem_dpo.data.formats import Preference
from lowmem_dpo.settings.groups import EncodingSettings
from lowmem_dpo.tokens.encoding import encode_pairs, render_prompts
from lowmem_dpo.tokens.rendered import NO_MARKS, looks_rendered
from tests.tokens.encoding import AUTO, CHATML_PROMPT, LLAMA3_PROMPT, chat, encode_one, sides
from tests.tokens.shapes import MISTRAL_V3, QUESTION, SMOLLM2, VICUNA

ALPACA_PROMPT = "### Instruction:\nhi\n\n### Response:\n"
MENTIONS = [
    "What does [INST] mean?",
    "[INST] and [/INST] are what?",
    "<|user|> is in my file, why?",
    "Compare <|user|> and <|assistant|>",
    "What is <|im_start|>user?",
    "Why does my file hold <|im_start|>user\nhi<|im_end|>?",
    "<|im_start|>user is a marker, of what?",
    "### Instruction: what does it open?",
    "### Instruction:\nSay hi.",
    "How do I add a user on Linux?",
    "USER: root\nwhat is that?",
    "Human: a species?",
    "Question: how many?",
]
RENDERED = [
    CHATML_PROMPT,
    "<|im_start|>system\nBe kind<|im_end|>\n" + CHATML_PROMPT,
    "<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>",
    "<s>[INST] hi [/INST]",
    ALPACA_PROMPT,
    "<|system|>\n</s>\n<|user|>\nhi</s>\n",
    "<|user|>hi<|end|><|assistant|>",
    "<bos><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n",
    "<｜begin▁of▁sentence｜>Be kind<｜User｜>hi<｜Assistant｜><think>\n",
    "<BOS_TOKEN><|START_OF_TURN_TOKEN|><|USER_TOKEN|>hi<|END_OF_TURN_TOKEN|>",
    "<|start|>user<|message|>hi<|end|><|start|>assistant",
]


def texts(prompts, **columns):
    return [
        Preference(prompt, "yes", "no", row, **columns) for row, prompt in enumerate(prompts, 1)
    ]


@pytest.mark.parametrize("prompt", MENTIONS)
def test_looks_rendered_does_not_go_by_words_in_a_prompt(prompt):
    assert not looks_rendered(prompt, NO_MARKS)


@pytest.mark.parametrize("prompt", RENDERED)
def test_looks_rendered_knows_common_templates(prompt):
    assert looks_rendered(prompt, NO_MARKS)


@pytest.mark.parametrize("system", ["", "Be kind"])
@pytest.mark.parametrize("template", [SMOLLM2, VICUNA, QUESTION, MISTRAL_V3])
def test_encode_pairs_wraps_prompts_that_mention_markers(build_tokenizer, template, system):
    bos = "<|im_start|>" if template == SMOLLM2 else "<s>"
    tokenizer = build_tokenizer("chatml", bos_token=bos)
    tokenizer.chat_template = template
    for rows in (texts(MENTIONS, system=system), *(texts([p], system=system) for p in MENTIONS)):
        pairs, report = encode_pairs(rows, tokenizer, AUTO)
        assert report.num_rendered == 0
        for row, pair in zip(rows, pairs, strict=True):
            prompt, _ = next(sides(pair, tokenizer))
            opened = tokenizer.apply_chat_template(
                [{"role": "system", "content": system}] * bool(system)
                + [{"role": "user", "content": row.prompt}],
                tokenize=False,
                add_generation_prompt=True,
            )
            assert prompt == opened


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        (SMOLLM2, CHATML_PROMPT),
        (VICUNA, "A chat. USER: hi ASSISTANT:"),
        (QUESTION, "Question: hi\nAnswer:"),
        (MISTRAL_V3, "<s>[INST] hi[/INST]"),
        (MISTRAL_V3, "[INST] hi[/INST]"),
    ],
)
def test_encode_pairs_leaves_what_its_own_template_wrote(build_tokenizer, template, prompt):
    bos = "<|im_start|>" if template == SMOLLM2 else "<s>"
    tokenizer = build_tokenizer("chatml", bos_token=bos)
    tokenizer.chat_template = template
    pairs, report = encode_pairs(texts([prompt] * 2), tokenizer, AUTO)
    assert report.num_rendered == 2
    assert next(sides(pairs[0], tokenizer))[0] == prompt
    ids = list(pairs[0].chosen_ids[: pairs[0].chosen_start])
    assert render_prompts(tokenizer, [prompt], AUTO) == [ids]


def test_encode_pairs_decides_for_the_file_and_says_which_rows_look_otherwise(build_tokenizer):
    tokenizer = build_tokenizer("chatml")
    _, report = encode_pairs(texts(["hi", CHATML_PROMPT, "you"]), tokenizer, AUTO)
    assert report.num_rendered == 0
    (line,) = (line for line in report.lines() if "looks rendered already" in line)
    assert line.startswith("1 of 3 pairs (first row 2) have a prompt") and "rendered yes" in line
    _, report = encode_pairs(texts([CHATML_PROMPT, "hi", CHATML_PROMPT]), tokenizer, AUTO)
    assert report.num_rendered == 3
    (line,) = (line for line in report.lines() if "does not look rendered" in line)
    assert line.startswith("1 of 3 pairs (first row 2) have a prompt") and "rendered no" in line


def test_encode_pairs_takes_the_users_word_for_what_is_rendered(build_tokenizer):
    tokenizer = build_tokenizer("chatml")
    for prompt, rendered, expected in (
        ("hi", "yes", "hi"),
        (CHATML_PROMPT, "no", f"<|im_start|>user\n{CHATML_PROMPT}<|im_end|>\n"),
    ):
        settings = EncodingSettings(rendered=rendered)
        pairs, report = encode_pairs(texts([prompt]), tokenizer, settings)
        assert next(sides(pairs[0], tokenizer))[0].startswith(expected)
        assert report.num_rendered == (rendered == "yes")
        assert report.notes == {}
    messages = Preference(
        [{"role": "user", "content": "hi"}],
        [{"role": "assistant", "content": "yes"}],
        [{"role": "assistant", "content": "no"}],
        1,
    )
    with pytest.raises(ValueError, match="rendered yes has no effect: the prompts are messages"):
        encode_pairs([messages], tokenizer, EncodingSettings(rendered="yes"))
    with pytest.raises(ValueError, match="rendered=no has no effect with chat_template=none"):
        EncodingSettings(rendered="no", chat_template="none")


def test_encode_pairs_keeps_a_bos_that_is_a_marker_in_the_prompt(build_tokenizer):
    tokenizer = build_tokenizer("chatml", bos_token="<|im_start|>")
    tokenizer.chat_template = SMOLLM2
    pairs, _ = encode_pairs(texts(["<|im_start|> is what?"]), tokenizer, AUTO)
    assert "user\n<|im_start|> is what?<|im_end|>" in next(sides(pairs[0], tokenizer))[0]


def test_render_prompts_decides_for_all_of_them(build_tokenizer):
    tokenizer = build_tokenizer("chatml")
    plain, rendered = render_prompts(tokenizer, ["hi", CHATML_PROMPT], AUTO)
    assert tokenizer.decode(plain) == CHATML_PROMPT
    assert tokenizer.decode(rendered).startswith("<|im_start|>user\n<|im_start|>user\nhi")


@pytest.mark.parametrize("repeat", [False, True])
@pytest.mark.parametrize("terminated", [False, True])
@pytest.mark.parametrize("with_bos", [False, True])
def test_encode_pairs_leaves_rendered_text_as_it_is(build_tokenizer, repeat, terminated, with_bos):
    tokenizer = build_tokenizer("llama3", bos=True)
    prompt = ("<s>" if with_bos else "") + LLAMA3_PROMPT
    before, after = prompt if repeat else "", "<|eot_id|>" if terminated else ""
    preference = Preference(prompt, f"{before}yes{after}", f"{before}no{after}", 1)
    pair, report = encode_one(preference, tokenizer)
    end = after or "</s>"
    rendered = "<s>" + LLAMA3_PROMPT
    assert list(sides(pair, tokenizer)) == [(rendered, "yes" + end), (rendered, "no" + end)]
    assert report.num_rendered == 1
    assert "1 of 1 pairs are already rendered" in report.template_choice
    if terminated:
        assert pair == encode_one(chat(), tokenizer)[0]


@pytest.mark.parametrize("name", [None, "chatml", "mistral"])
def test_encode_pairs_recognises_the_markers_of_common_templates(build_tokenizer, name):
    tokenizer = build_tokenizer(name)
    for prompt in (CHATML_PROMPT, LLAMA3_PROMPT, "[INST] hi [/INST]", ALPACA_PROMPT):
        pair, report = encode_one(Preference(prompt, "yes", "no</s>\n", 1), tokenizer)
        assert list(sides(pair, tokenizer)) == [(prompt, "yes</s>"), (prompt, "no</s>\n")]
        assert report.num_rendered == 1


def test_encode_pairs_learns_the_markers_of_an_unknown_template(build_tokenizer, tmp_path):
    path = tmp_path / "template.jinja"
    path.write_text("{% for m in messages %}@@{{ m['role'] }}@@\n{{ m['content'] }}\n{% endfor %}")
    settings = EncodingSettings(chat_template=str(path))
    preference = Preference("@@user@@\nhi\n@@assistant@@\n", "yes", "no", 1)
    pair, report = encode_one(preference, build_tokenizer(), settings)
    assert report.num_rendered == 1
    assert len(pair.chosen_ids) - pair.chosen_start == len("yes") + 1


def test_encode_pairs_wraps_text_that_only_speaks_of_a_special_token(build_tokenizer):
    _, report = encode_one(
        Preference("what is <|im_start|>?", "yes", "no", 1), build_tokenizer("chatml")
    )
    assert report.num_rendered == 0

import pytest

from lowmem_dpo.data.formats import Preference
from lowmem_dpo.settings.groups import EncodingSettings
from lowmem_dpo.tokens.encoding import encode_pairs, render_prompt
from lowmem_dpo.tokens.trees import common_prefix_length
from tests.tokens.encoding import (
    AUTO,
    CHATML_PROMPT,
    LLAMA3_PROMPT,
    chat,
    encode_one,
    ours,
    sides,
    trl_pairs,
    turn,
)

# Chat templates


def test_encode_pairs_renders_messages_and_scores_the_answer_and_its_end(build_tokenizer):
    tokenizer = build_tokenizer("chatml")
    pair, report = encode_one(chat(), tokenizer)
    prompt = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert list(sides(pair, tokenizer)) == [
        (prompt, "yes<|im_end|>\n"),
        (prompt, "no<|im_end|>\n"),
    ]
    assert report.template_choice == "text goes through the tokenizer's chat template"


@pytest.mark.parametrize("name", ["chatml", "llama3", "mistral"])
def test_encode_pairs_wraps_plain_strings_as_two_turns(build_tokenizer, name):
    tokenizer = build_tokenizer(name, bos=True)
    plain, report = encode_one(Preference("hi", "yes", "no", 1), tokenizer)
    assert plain == encode_one(chat(), tokenizer)[0]
    assert "one user and one assistant turn" in report.template_choice


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("name", ["llama3", "mistral"])
def test_encode_pairs_has_the_templates_bos_once(build_tokenizer, name, bos):
    tokenizer = build_tokenizer(name, bos=bos)
    for preference in (chat(), Preference("hi", "y", "n", 1), Preference("<s>hi", "y", "n", 1)):
        pair, _ = encode_one(preference, tokenizer)
        for ids in (pair.chosen_ids, pair.rejected_ids):
            assert ids[0] == tokenizer.bos_token_id
            assert ids.count(tokenizer.bos_token_id) == 1


def test_encode_pairs_appends_eos_once_where_the_template_ends_with_plain_text(build_tokenizer):
    tokenizer = build_tokenizer("no_end")
    for preference in (chat(), Preference("hi", "yes", "no", 1)):
        pair, _ = encode_one(preference, tokenizer)
        for _, completion in sides(pair, tokenizer):
            assert completion.endswith("\n</s>")
            assert completion.count("</s>") == 1


def test_encode_pairs_takes_the_templates_end_of_turn_for_a_terminator(build_tokenizer):
    tokenizer = build_tokenizer("chatml")  # whose EOS token is another, as in base models
    pair, _ = encode_one(Preference("hi", "yes</s>", "no<|im_end|>\n", 1), tokenizer)
    assert [text for _, text in sides(pair, tokenizer)] == ["yes<|im_end|>\n", "no<|im_end|>\n"]


def test_encode_pairs_puts_the_system_prompt_where_there_is_none(build_tokenizer):
    tokenizer = build_tokenizer("chatml")
    settings = EncodingSettings(system_prompt="be kind")
    own = chat(system="own")
    for preference, system in (
        (chat(), "be kind"),
        (Preference("hi", "yes", "no", 1), "be kind"),
        (own, "own"),
    ):
        pair, _ = encode_one(preference, tokenizer, settings)
        prompt, _ = next(sides(pair, tokenizer))
        assert prompt.startswith(f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nhi")
        assert prompt.count("system\n") == 1


def test_encode_pairs_renders_a_system_column_like_a_system_message(build_tokenizer):
    tokenizer = build_tokenizer("chatml")
    settings = EncodingSettings(system_prompt="be kind")
    column = Preference("hi", "yes<|im_end|>", "no", 1, system="own")
    messages = chat(system="own")
    pair, _ = encode_one(column, tokenizer, settings)
    assert pair == encode_one(messages, tokenizer, settings)[0]


@pytest.mark.parametrize("answers", [("yes", "no"), ("{}yes", "{}no")])
def test_encode_pairs_refuses_a_system_column_it_would_ignore(build_tokenizer, answers):
    chosen, rejected = (answer.format(CHATML_PROMPT) for answer in answers)
    rendered = Preference(CHATML_PROMPT, chosen, rejected, 3, system="own")
    with pytest.raises(ValueError, match=r"row 3: a system column beside a prompt .* rendered;"):
        encode_one(rendered, build_tokenizer("chatml"))
    plain = Preference("hi", "yes", "no", 3, system="own")
    with pytest.raises(ValueError, match="row 3: messages need a chat template"):
        encode_one(plain, build_tokenizer())


def test_encode_pairs_passes_template_kwargs_on(build_tokenizer):
    tokenizer = build_tokenizer("chatml")
    settings = EncodingSettings(chat_template_kwargs={"enable_thinking": False})
    pair, report = encode_one(chat(), tokenizer, settings)
    prompt = CHATML_PROMPT + "<think></think>"  # which the template writes at inference only
    assert list(sides(pair, tokenizer)) == [(prompt, "yes<|im_end|>\n"), (prompt, "no<|im_end|>\n")]
    assert report.notes == {"opened": {"num_pairs": 1, "row": 1, "text": "<think></think>"}}
    rendered = tokenizer.decode(render_prompt(tokenizer, "hi", settings))
    assert rendered.endswith("assistant\n<think></think>")
    with pytest.raises(ValueError, match="chat_template_kwargs cannot set tokenize"):
        encode_one(chat(), tokenizer, EncodingSettings(chat_template_kwargs={"tokenize": False}))


def test_encode_pairs_reads_a_template_file(build_tokenizer, tmp_path):
    path = tmp_path / "my template.jinja"
    path.write_text(build_tokenizer("chatml").chat_template, encoding="utf-8")
    settings = EncodingSettings(chat_template=str(path))
    for name in (None, "llama3"):
        pair, report = encode_one(chat(), build_tokenizer(name), settings)
        assert pair == encode_one(chat(), build_tokenizer("chatml"))[0]
        assert str(path) in report.template_choice


def test_encode_pairs_refuses_a_bad_template_in_one_line(build_tokenizer, tmp_path):
    path = tmp_path / "template.jinja"
    path.write_text("{% for m in messages %}\n{{ m['role'] ")
    system = chat(prompt="u", row=7, system="s")
    none = EncodingSettings(chat_template="none")
    for preference, name, settings, message in (
        (chat(), None, EncodingSettings(chat_template="gone.jinja"), "which is no file"),
        (chat(), None, EncodingSettings(chat_template=str(path)), "cannot render"),
        (chat(), None, AUTO, "row 1: messages need a chat template.*--chat_template FILE"),
        (chat(), "chatml", none, "row 1: messages need a chat template.*FILE"),
        (system, "mistral", AUTO, "row 7: .*system/user.*Only user and assistant roles"),
        (Preference("hi", "y", "n", 1), None, EncodingSettings(system_prompt="s"), "system_prompt"),
        (
            Preference("hi", "y", "n", 1),
            None,
            EncodingSettings(chat_template_kwargs={"a": 1}),
            "chat_template_kwargs needs a chat template",
        ),
    ):
        with pytest.raises(ValueError, match=message) as error:
            encode_pairs([preference], build_tokenizer(name), settings)
        assert "\n" not in str(error.value)
    path.write_text("{{ messages[0]['role'] }}")
    with pytest.raises(ValueError, match="leaves out what the user or the assistant says"):
        encode_one(chat(), build_tokenizer(), EncodingSettings(chat_template=str(path)))


# Plain text


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("eos", [False, True])
def test_encode_pairs_joins_plain_text_with_bos_and_eos_once(build_tokenizer, bos, eos):
    tokenizer = build_tokenizer(bos=bos, eos=eos)
    lead = "<s>" if bos else ""
    for prompt, chosen, rejected in (
        ("hi", " yes", " no"),
        (f"{lead}hi", " yes", " no"),
        ("hi", " yes</s>", " no"),
    ):
        pair, report = encode_one(Preference(prompt, chosen, rejected, 1), tokenizer)
        assert list(sides(pair, tokenizer)) == [(lead + "hi", " yes</s>"), (lead + "hi", " no</s>")]
        assert (report.num_rendered, report.num_mismatches) == (0, 0)
    assert "tokenizer has none" in report.template_choice


def test_encode_pairs_leaves_a_template_out_with_none(build_tokenizer):
    tokenizer = build_tokenizer("chatml")
    settings = EncodingSettings(chat_template="none")
    pair, report = encode_one(Preference("hi", " yes", " no", 1), tokenizer, settings)
    assert list(sides(pair, tokenizer)) == [("hi", " yes</s>"), ("hi", " no</s>")]
    assert report.template_choice == "no chat template, as set"


def test_encode_pairs_splits_plain_text_where_the_tokens_part(build_tokenizer):
    tokenizer = build_tokenizer()
    # "ab" + "c" merges to one token, "ab" + " d" does not.
    pair, report = encode_one(Preference("x ab", "c", " d", 1), tokenizer)
    assert report.num_mismatches == 1
    assert list(sides(pair, tokenizer)) == [("x ", "abc</s>"), ("x ab", " d</s>")]
    assert any("change where an answer follows" in line for line in report.lines())


@pytest.mark.parametrize("prompt", ["hi", CHATML_PROMPT])
def test_encode_pairs_keeps_the_tokens_of_a_rendered_prompt_that_would_merge(
    build_tokenizer, prompt
):
    tokenizer = build_tokenizer("chatml")
    pair, report = encode_one(Preference(prompt, "\nyes", "no", 1), tokenizer)
    for ids, start in (
        (pair.chosen_ids, pair.chosen_start),
        (pair.rejected_ids, pair.rejected_start),
    ):
        assert list(ids[:start]) == render_prompt(tokenizer, prompt, AUTO)
    assert [text.partition("<")[0] for _, text in sides(pair, tokenizer)] == ["\nyes", "no"]
    assert report.notes["apart"] == {"num_pairs": 1, "row": 1, "text": "\n"}
    assert report.num_mismatches == 0


def test_encode_pairs_never_scores_a_first_token(build_tokenizer):
    pair, _ = encode_one(Preference("", "yes", "no", 1), build_tokenizer())
    assert (pair.chosen_start, pair.rejected_start) == (1, 1)


def test_encode_pairs_needs_an_eos_token_only_where_it_is_appended(build_tokenizer):
    tokenizer = build_tokenizer(eos_token=None)
    with pytest.raises(ValueError, match="no EOS token"):
        encode_one(Preference("hi", "yes", "no", 1), tokenizer)
    assert encode_one(chat(), build_tokenizer("chatml", eos_token=None))[0].chosen_ids


# Text that holds its prompt


def test_encode_pairs_recognises_answers_that_repeat_the_prompt(build_tokenizer):
    tokenizer = build_tokenizer("chatml", bos=True)
    joined = [Preference("hi,", "hi, yes", "hi, no", row) for row in (1, 2)]
    pairs, report = encode_pairs(joined, tokenizer, AUTO)
    assert list(sides(pairs[0], tokenizer)) == [("<s>hi,", " yes</s>"), ("<s>hi,", " no</s>")]
    assert (report.num_rendered, report.num_joined) == (0, 2)
    said = "no chat template is put around text that holds its prompt, as implicit prompts do (2 of"
    assert said in report.template_choice and "already rendered" not in report.template_choice
    assert "user and one assistant turn" not in report.template_choice
    plain = encode_pairs(joined, build_tokenizer(bos=True), AUTO)[1].template_choice
    assert "implicit" not in plain


def test_encode_pairs_takes_a_lone_repeated_prompt_for_an_answer(build_tokenizer):
    tokenizer = build_tokenizer("chatml")
    lone = Preference("hi", "hi there", "hi", 1)
    others = [Preference("what", "yes", "no", row) for row in (2, 3)]
    pairs, report = encode_pairs([lone, *others], tokenizer, AUTO)
    assert report.num_rendered == 0
    assert [text for _, text in sides(pairs[0], tokenizer)] == [
        "hi there<|im_end|>\n",
        "hi<|im_end|>\n",
    ]


def test_encode_pairs_goes_by_the_majority_of_repeated_prompts(build_tokenizer):
    tokenizer = build_tokenizer("chatml")
    joined, plain = Preference("a", "ab", "ac", 1), Preference("a", "b", "c", 2)
    assert encode_pairs([joined, joined, plain], tokenizer, AUTO)[1].num_joined == 2
    assert encode_pairs([joined, plain], tokenizer, AUTO)[1].num_joined == 0
    with pytest.raises(ValueError, match=r"no pair is left of 0 \(dropped: none\)"):
        encode_pairs([], tokenizer, AUTO)


# Cutting and dropping


def test_encode_pairs_cuts_completions_from_the_right(build_tokenizer):
    tokenizer = build_tokenizer(bos=True)
    settings = EncodingSettings(max_length=8)
    pair, report = encode_one(Preference("hey", "0123456789", "98", 1), tokenizer, settings)
    assert list(sides(pair, tokenizer)) == [("<s>hey", "0123"), ("<s>hey", "98</s>")]
    assert report.num_truncated == 1
    assert "1 of 2 sequences cut to max_length" in report.lines()


@pytest.mark.parametrize(
    ("max_length", "prompt", "chosen"),
    [
        (20, "<s>zzzdefgh", "0123</s>"),
        (13, "<s>zzdefgh", "0123</s>"),
        (12, "<s>zdefgh", "0123</s>"),
        (10, "<s>efgh", "0123</s>"),
        (9, "<s>fgh", "0123</s>"),
        (8, "<s>fgh", "0123"),
        (7, "<s>gh", "0123"),
        (4, "<s>h", "01"),
    ],
)
def test_encode_pairs_cuts_shared_prompts_from_the_left_down_to_half_of_max_length(
    build_tokenizer, max_length, prompt, chosen
):
    tokenizer = build_tokenizer(bos=True)
    settings = EncodingSettings(max_length=max_length, truncate_prompt=True)
    pair, report = encode_one(Preference("zzzdefgh", "0123", "9", 1), tokenizer, settings)
    assert list(sides(pair, tokenizer)) == [(prompt, chosen), (prompt, "9</s>")]
    assert report.num_prompts_cut == (max_length < 14)
    assert ("1 prompts cut from the left" in report.lines()) == (max_length < 14)


def test_encode_pairs_leaves_short_prompts_whole_beside_long_answers(build_tokenizer):
    tokenizer = build_tokenizer()
    settings = EncodingSettings(max_length=8, truncate_prompt=True)
    pair, report = encode_one(Preference("abd", "0123456789", "9", 1), tokenizer, settings)
    assert [text for text, _ in sides(pair, tokenizer)] == ["abd", "abd"]
    assert (report.num_prompts_cut, report.num_truncated) == (0, 1)


def test_encode_pairs_keeps_a_prompt_token_without_bos(build_tokenizer):
    tokenizer = build_tokenizer()
    settings = EncodingSettings(max_length=3, truncate_prompt=True)
    pair, _ = encode_one(Preference("defgh", "0123", "9", 1), tokenizer, settings)
    assert list(sides(pair, tokenizer)) == [("h", "01"), ("h", "9</s>")]


def test_encode_pairs_drops_and_counts_pairs_that_teach_nothing(build_tokenizer):
    preferences = [
        Preference("hi", "yes", "no", 1),
        Preference("hi", "same", "same", 2),
        Preference("hi", " ", "no", 3),
        Preference("hi", "yes", "</s>", 4),
        Preference("0123456789", "yes", "no", 5),
        Preference("hi", "0123456789a", "0123456789b", 6),
        Preference("hi", "0123456789a", "no", 7),
    ]
    pairs, report = encode_pairs(preferences, build_tokenizer(), EncodingSettings(max_length=10))
    assert [pair.row for pair in pairs] == [1, 7]
    assert (report.num_pairs, report.num_kept) == (7, 2)
    assert report.num_dropped == {
        "identical": 1,
        "empty": 2,
        "prompt only after cutting": 1,
        "identical after cutting": 1,
    }
    (line,) = (line for line in report.lines() if line.startswith("5 pairs dropped: 2 empty, "))
    assert line.endswith("; raise max_length (now 10)")


def test_encode_pairs_drops_empty_and_identical_messages(build_tokenizer):
    preferences = [chat(), chat("", "no", row=2), chat("same", "same", row=3)]
    pairs, report = encode_pairs(preferences, build_tokenizer("chatml"), AUTO)
    assert [pair.row for pair in pairs] == [1]
    assert report.num_dropped == {"empty": 1, "identical": 1}


def test_encode_pairs_speaks_of_max_length_where_cutting_drops_more_than_a_tenth(build_tokenizer):
    good, cut = Preference("hi", "yes", "no", 1), Preference("0123456789", "yes", "no", 2)
    settings = EncodingSettings(max_length=10)
    for num_good, expected in ((8, True), (9, False)):
        _, report = encode_pairs([good] * num_good + [cut], build_tokenizer(), settings)
        assert report.lines()[-1].endswith("; raise max_length (now 10)") == expected


def test_encode_pairs_refuses_to_keep_nothing(build_tokenizer):
    same, long = Preference("hi", "same", "same", 1), Preference("0123456789", "yes", "no", 2)
    settings = EncodingSettings(max_length=10)
    for pair, reasons in (
        (same, r"\(dropped: 2 identical\); check the data$"),
        (long, r"\(dropped: 2 prompt only after cutting\); raise max_length \(now 10\)$"),
    ):
        with pytest.raises(ValueError, match="no pair is left of 2 " + reasons):
            encode_pairs([pair, pair], build_tokenizer(), settings)


# What tells prompts apart


def test_encode_pairs_keys_prompts_by_their_whole_text(build_tokenizer):
    tokenizer = build_tokenizer(bos=True)
    settings = EncodingSettings(max_length=10, truncate_prompt=True)
    preferences = [
        Preference("question a", "x", "y", 1),
        Preference("question a", "bc", "bd", 2),  # merges with the end of the prompt
        Preference("question a", "long answer", "y", 3),  # has the prompt cut further
        Preference("<s>question a", "x", "y", 4),
        Preference("Question a", "x", "y", 5),  # differs in what is cut
    ]
    pairs, report = encode_pairs(preferences, tokenizer, settings)
    assert report.num_mismatches == 1
    assert len({tuple(pair.chosen_ids[: pair.chosen_start]) for pair in pairs[:4]}) > 1
    assert len({pair.prompt_key for pair in pairs[:4]}) == 1
    assert pairs[0].chosen_ids == pairs[4].chosen_ids
    assert pairs[0].prompt_key != pairs[4].prompt_key


# Prompts for generation, and TRL


@pytest.mark.parametrize("name", [None, "chatml", "llama3", "mistral", "no_end"])
@pytest.mark.parametrize("prompt", ["hi", CHATML_PROMPT, "<s>" + LLAMA3_PROMPT, "<s>hi"])
def test_render_prompt_gives_the_ids_of_training(build_tokenizer, name, prompt):
    tokenizer = build_tokenizer(name, bos=True, eos=True)
    pair, _ = encode_one(Preference(prompt, "yes", "no", 1), tokenizer)
    assert render_prompt(tokenizer, prompt, AUTO) == list(pair.chosen_ids[: pair.chosen_start])


def test_render_prompt_renders_messages_with_the_system_prompt(build_tokenizer):
    tokenizer = build_tokenizer("chatml")
    settings = EncodingSettings(system_prompt="be kind")
    ids = render_prompt(tokenizer, [turn("user", "hi")], settings)
    pair, _ = encode_one(chat(), tokenizer, settings)
    assert ids == list(pair.chosen_ids[: pair.chosen_start])


@pytest.mark.parametrize("name", ["chatml", "llama3", "mistral"])
def test_encode_pairs_agrees_with_trl_on_messages(build_tokenizer, name):
    user, answer = turn("user", "hi"), turn("assistant", "well")
    prompts = [[user], [user, answer, user], [user, answer]]  # the last has TRL open a new turn
    answers = [("yes", "no"), ("abc </s> d", "")]
    if name != "chatml":  # where tokens merge, TRL's prompt is not the one of inference
        answers.append(("\n\nyes", "no"))
    preferences = [
        Preference(prompt, [turn("assistant", c)], [turn("assistant", r or "-")], 1)
        for prompt in prompts
        for c, r in answers
    ]
    several = [turn("assistant", "one"), turn("user", "and"), turn("assistant", "two")]
    preferences.append(Preference([user], several, [turn("assistant", "no")], 1))
    rows = [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in preferences]
    tokenizer = build_tokenizer(name, bos=True)
    assert list(ours(preferences, tokenizer)) == trl_pairs(rows, tokenizer)


@pytest.mark.parametrize("bos", [False, True])
def test_encode_pairs_agrees_with_trl_on_plain_text(build_tokenizer, bos):
    texts = [("hi", " yes", " no"), ("one two", " abc</s>", "\n\nd"), ("ab", "d", "e")]
    preferences = [Preference(*text, row=1) for text in texts]
    rows = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in texts]
    tokenizer = build_tokenizer(bos=bos)
    assert list(ours(preferences, tokenizer)) == trl_pairs(rows, tokenizer)


def test_common_prefix_length_counts_equal_leading_tokens():
    assert common_prefix_length([], [1]) == 0
    assert common_prefix_length([1, 2, 3], [1, 2]) == 2
    assert common_prefix_length((1, 2, 3), (1, 5, 3)) == 1

import pytest

from lowmem_dpo.data.formats import Preference
from lowmem_dpo.settings.groups import EncodingSettings
from lowmem_dpo.tokens.rendering import build_renderer, repeats_prompt


@pytest.mark.parametrize(
    ("name", "own_tokens", "answer_opening", "ends"),
    [
        (None, (), "", ("</s>",)),
        (
            "chatml",
            ("<|im_start|>system", "<|im_start|>user"),
            "<|im_end|>\n<|im_start|>assistant",
            ("</s>", "<|im_end|>"),
        ),
        (
            "llama3",
            tuple(
                f"{bos}<|start_header_id|>{role}<|end_header_id|>"
                for bos in ("<s>", "")
                for role in ("system", "user")
            ),
            "<|eot_id|><|start_header_id|>assistant<|end_header_id|>",
            ("</s>", "<|eot_id|>"),
        ),
        ("mistral", ("<s>[INST]",), "[/INST]", ("</s>", "</s>")),
        ("no_end", (), "### assistant:", ("</s>",)),
    ],
)
def test_build_renderer_learns_how_turns_begin_and_answers_end(
    build_tokenizer, name, own_tokens, answer_opening, ends
):
    renderer = build_renderer(build_tokenizer(name), EncodingSettings())
    assert set(renderer.marks.own_tokens) == set(own_tokens)
    assert renderer.marks.answer_opening == answer_opening
    assert renderer.terminators == ends


def test_build_renderer_does_not_take_plain_text_for_an_end(build_tokenizer, tmp_path):
    path = tmp_path / "template.jinja"
    path.write_text("{% for m in messages %}{{ m['content'] }}<|done|>{% endfor %}")
    settings = EncodingSettings(chat_template=str(path))
    assert build_renderer(build_tokenizer(), settings).terminators == ("</s>",)


def test_build_renderer_takes_the_default_of_named_templates(build_tokenizer):
    tokenizer = build_tokenizer("chatml")
    tokenizer.chat_template = {"tool_use": "", "default": tokenizer.chat_template}
    assert "<|im_end|>" in build_renderer(tokenizer, EncodingSettings()).terminators


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected", "expected"),
    [
        ("a", "ab", "ac", True),
        ("a", "ab", "b", False),
        ("", "ab", "ac", False),
        ("a", [{"role": "assistant", "content": "ab"}], "ac", False),
    ],
)
def test_repeats_prompt_wants_the_whole_prompt_on_both_sides(prompt, chosen, rejected, expected):
    assert repeats_prompt(Preference(prompt, chosen, rejected, 1)) is expected


def test_build_renderer_refuses_variables_that_the_template_never_reads(build_tokenizer):
    tokenizer = build_tokenizer("llama3")
    settings = EncodingSettings(chat_template_kwargs={"enable_thinking": False})
    with pytest.raises(ValueError, match="enable_thinking has no effect"):
        build_renderer(tokenizer, settings)
    tokenizer.chat_template += "{% if enable_thinking is defined %}{% endif %}"
    build_renderer(tokenizer, settings)
    tokenizer.chat_template = "{% generation %}" + tokenizer.chat_template + "{% endgeneration %}"
    build_renderer(tokenizer, settings)


def test_answer_ids_have_no_space_of_a_texts_beginning():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = [(piece, -1.0) for piece in ("<unk>", "▁", "\n", "a", "b", "▁a")]
    core = Tokenizer(models.Unigram(pieces, unk_id=0))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    renderer = build_renderer(tokenizer, EncodingSettings())
    assert tokenizer("ab", add_special_tokens=False)["input_ids"] == [5, 4]
    assert renderer.answer_ids(["ab", " a", "\na"]) == [[3, 4], [5], [2, 3]]

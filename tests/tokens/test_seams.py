"""What stands in front of a prompt's last special token is tokenised once, with the same ids."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lowmem_dpo.settings.groups import EncodingSettings
from lowmem_dpo.tokens.rendering import PairText, build_renderer

OPEN, CLOSE = "<|open|>", "<|close|>"
WORDS = ["a", "b", "ab", " ", "  ", "\n", OPEN, CLOSE, "<|open", "|>", "é", "▁"]
WORDS += ["<unk>", "<|l|>", "＜|open|＞", "q"]


def byte_level():
    return pre_tokenizers.ByteLevel(add_prefix_space=True), None


def metaspace(scheme):
    return lambda: (pre_tokenizers.Metaspace(prepend_scheme=scheme), None)


def prepending():
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    return None, normalizers.Sequence(steps)


def stripping():
    return pre_tokenizers.Whitespace(), normalizers.Strip()


KINDS = {
    "byte level": byte_level,
    "first": metaspace("first"),
    "always": metaspace("always"),
    "prepending": prepending,
    "stripping": stripping,
}


def build(kind, *added):
    """A tokenizer of single characters and a few merges."""
    symbols = sorted({*pre_tokenizers.ByteLevel.alphabet(), *"ab \n<|open>close▁é"})
    vocab = {symbol: i for i, symbol in enumerate(symbols)}
    merges = [("a", "b"), ("▁", "a"), ("Ġ", "a")]
    vocab |= {left + right: len(vocab) + i for i, (left, right) in enumerate(merges)}
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    pre_tokenizer, normalizer = KINDS[kind]()
    if pre_tokenizer:
        core.pre_tokenizer = pre_tokenizer
    if normalizer:
        core.normalizer = normalizer
    core.add_special_tokens([token for token in added if isinstance(token, str) or token.special])
    core.add_tokens([token for token in added if not isinstance(token, str) and not token.special])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=CLOSE)


def of_words():
    """Words and single signs; all others are unknown, which has a special token's id."""
    vocab = ["<unk>", "a", "b", "ab", "x", "<|", "|>", "open", "close"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocab)}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return core


def of_pieces():
    core = Tokenizer(models.WordPiece({"<unk>": 0, "a": 1, "##b": 2, "b": 3}, unk_token="<unk>"))
    core.normalizer, core.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.Whitespace()
    return core


def unigram():
    """Its model knows the special tokens: wide signs become them by normalisation."""
    scores = [("<unk>", 0.0), (OPEN, 0.0), (CLOSE, 0.0), *((sign, -3.0) for sign in "ab <|>")]
    core = Tokenizer(models.Unigram(scores, 0, False))
    core.normalizer = normalizers.NFKC()
    return core


@pytest.mark.parametrize("model", [of_words, of_pieces, unigram])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(data=st.data())
def test_side_ids_hold_where_a_special_id_stands_for_other_text(model, data):
    core = model()
    core.add_special_tokens(["<unk>", OPEN, AddedToken(CLOSE, rstrip=True, special=True)])
    core.add_special_tokens([AddedToken("<|l|>", lstrip=True, special=True, normalized=False)])
    core.add_tokens(["b<", AddedToken("ab", single_word=True, normalized=True)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=CLOSE, unk_token="<unk>", bos_token=OPEN
    )
    assert_side_ids_are_those_of_the_whole(tokenizer, data)


def test_side_ids_hold_where_another_token_takes_the_beginning_of_a_special_one():
    tokenizer = build("byte level", OPEN, AddedToken("b<", special=False, normalized=False))
    prompt = f"a{OPEN}b{OPEN}a"  # one token OPEN; the other's sign went with the b
    texts = (prompt, prompt + "a", prompt + "b")
    (ids,) = build_renderer(tokenizer, EncodingSettings()).side_ids([PairText(*texts, True)])
    assert ids == [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert seams(tokenizer) == set()


def assert_side_ids_are_those_of_the_whole(tokenizer, data):
    """Hold ids of drawn prompts with two answers against those of the whole texts."""
    renderer = build_renderer(tokenizer, EncodingSettings())
    text = st.lists(st.sampled_from(WORDS), max_size=8).map("".join)
    pairs = []
    for _ in range(3):
        prompt, chosen, rejected = (data.draw(text) for _ in range(3))
        pairs.append(PairText(prompt, prompt + chosen, prompt + rejected, by_template=True))
    for pair, ids in zip(pairs, renderer.side_ids(pairs), strict=True):
        for side, found in zip((pair.prompt, pair.chosen, pair.rejected), ids, strict=True):
            assert found == tokenizer(side, add_special_tokens=False)["input_ids"]


def seams(tokenizer):
    return {*build_renderer(tokenizer, EncodingSettings()).seams.values()}


@pytest.mark.parametrize("kind", KINDS)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(data=st.data())
def test_side_ids_are_those_of_the_whole_texts(kind, data):
    tokenizer = build(kind, OPEN, AddedToken(CLOSE, rstrip=True, special=True, normalized=False))
    renderer = build_renderer(tokenizer, EncodingSettings())
    assert {*renderer.seams.values()} == {OPEN, CLOSE}
    assert_side_ids_are_those_of_the_whole(tokenizer, data)


def test_seams_are_tokens_that_nothing_around_them_changes():
    tokenizer = build(
        "byte level",
        AddedToken("<|left|>", lstrip=True, special=True, normalized=False),
        AddedToken("<|word|>", single_word=True, special=True, normalized=False),
        AddedToken("<|low|>", special=True, normalized=True),
        AddedToken("<|plain|>", special=False, normalized=False),
        AddedToken("aa", special=True, normalized=False),
        AddedToken("<|in|>", special=True, normalized=False),
        AddedToken("(<|in|>)", special=True, normalized=False),
        OPEN,
    )
    assert seams(tokenizer) == {OPEN, CLOSE, "(<|in|>)"}


def test_tokenizers_written_in_python_have_no_seams():
    from transformers import CanineTokenizer

    assert not seams(CanineTokenizer())

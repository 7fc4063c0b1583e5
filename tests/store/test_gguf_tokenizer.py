from __future__ import annotations

import warnings

import pytest
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoTokenizer

from sapwood.base.errors import ModelSourceError
from sapwood.store.gguf_header import read_header
from sapwood.store.gguf_tokenizer import WORD_RULES, build_tokenizer
from sapwood.store.prepare import prepare_gguf
from sapwood.store.progress import Silent
from tests.gguf_sample import GgufSample

TEXTS = [
    "hello  world",
    "  12 and 3456789",
    "I've  DON'T\n\n  x\r\n",
    "é漢字 ٣٤ ½ 🙂",
    "tabs\t\tand  trailing   ",
    "",
]


@pytest.fixture
def build(tmp_path):
    def build(sample) -> Tokenizer:
        return build_tokenizer(read_header(sample.write(tmp_path / "m.gguf")))

    return build


def words(tokenizer: Tokenizer, text: str) -> list[str]:
    return [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize("text", TEXTS)
def test_smollm_cuts_off_digits_and_then_cuts_like_gpt2(build, text):
    original = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    expected = [word for word, _ in original.pre_tokenize_str(text)]
    assert words(build(GgufSample(pre="smollm")), text) == expected


@pytest.mark.parametrize("text", TEXTS)
def test_gpt2_cuts_like_the_tokenizers_library(build, text):
    expected = [word for word, _ in pre_tokenizers.ByteLevel(False).pre_tokenize_str(text)]
    assert words(build(GgufSample(pre="gpt-2")), text) == expected


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("llama-bpe", ["ab", "Ġ", "123", "4", "Ġ,,ĊĊ", "'S"]),
        ("qwen2", ["ab", "Ġ", "1", "2", "3", "4", "Ġ,,ĊĊ", "'S"]),
        ("tekken", ["ab", "Ġ", "1", "2", "3", "4", "Ġ,,ĊĊ", "'S"]),
        ("deepseek-coder", ["ab", "Ġ", "1", "2", "3", "4", "Ġ,,", "Ċ", "Ċ", "'", "S"]),
        ("lfm2", ["ab", "Ġ", "123", "4", "Ġ,,ĊĊ", "'S"]),
        ("qwen35", ["ab", "Ġ", "1", "2", "3", "4", "Ġ,,ĊĊ", "'S"]),
        ("kimi-k2", ["ab", "Ġ", "123", "4", "Ġ,,ĊĊ", "'S"]),
        ("gpt-4o", ["ab", "Ġ", "123", "4", "Ġ,,ĊĊ", "'S"]),
        ("glm4", ["ab", "Ġ", "123", "4", "Ġ,,ĊĊ", "'S"]),
        ("bailingmoe", ["ab", "Ġ", "1", "2", "3", "4", "Ġ,,ĊĊ", "'S"]),
        ("deepseek-v3", ["ab", "Ġ", "123", "4", "Ġ,,ĊĊ", "'S"]),
    ],
)
def test_word_rules(build, pre, expected):
    assert words(build(GgufSample(pre=pre)), "ab 1234 ,,\n\n'S") == expected


@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    [
        ("qwen2", "e\u0301t", ["e", "\u0301t"]),
        ("qwen35", "e\u0301t", ["e\u0301t"]),  # a mark belongs to its letter
        ("kimi-k2", "a漢字b", ["a", "漢字", "b"]),
        ("gpt-4o", "a漢字b", ["a漢字b"]),
        ("gpt-4o", "abCd's", ["ab", "Cd's"]),  # where small letters end, another word begins
        ("glm4", "abCd's", ["abCd", "'s"]),
        ("deepseek-v3", "a漢字.ab", ["a", "漢字", ".ab"]),
    ],
)
def test_what_word_rules_differ_in(build, pre, text, expected):
    found = build(GgufSample(pre=pre)).pre_tokenizer.pre_tokenize_str(text)
    assert [text[start:end] for _, (start, end) in found] == expected


def test_every_word_rule_compiles_and_keeps_every_character(build):
    for pre in WORD_RULES:
        tokenizer = build(GgufSample(pre=pre))
        for text in TEXTS:
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_special_tokens_are_matched_before_anything_is_cut(build):
    tokens = build(GgufSample()).encode("he<|end|>hell").tokens
    assert tokens == ["he", "<|end|>", "hell"]


def test_user_defined_tokens_are_whole_but_not_special(build):
    sample = GgufSample()
    sample.tokens.append("<think>")
    sample.kinds = [3, 3, *[1] * (len(sample.tokens) - 3), 4]
    tokenizer = build(sample)
    ids = tokenizer.encode("he<think>").ids
    assert ids[-1] == len(sample.tokens) - 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == "he<think>"


@pytest.mark.parametrize(
    ("pre", "values", "expected"),
    [
        ("smollm", {}, ["he"]),
        ("smollm", {"tokenizer.ggml.add_bos_token": True}, ["<|start|>", "he"]),
        ("smollm", {"tokenizer.ggml.add_eos_token": True}, ["he", "<|end|>"]),
        ("llama-bpe", {}, ["<|start|>", "he"]),
        ("llama-bpe", {"tokenizer.ggml.add_bos_token": False}, ["he"]),
    ],
)
def test_bos_and_eos_are_added_where_the_file_or_its_kind_says_so(build, pre, values, expected):
    assert build(GgufSample(pre=pre, values=values)).encode("he").tokens == expected


def test_ignore_merges_takes_whole_words_from_the_vocabulary(build):
    for pre, expected in (("llama-bpe", ["lle"]), ("smaug-bpe", ["ll", "e"])):
        sample = GgufSample(pre=pre)
        sample.tokens.append("lle")
        assert build(sample).encode("lle", add_special_tokens=False).tokens == expected


PIECES = ["▁", "h", "e", "l", "o", "▁h", "el", "lo", "▁hel", "▁hello", "he", "ll"]


def sentencepiece(**fields):
    byte_pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = ["<unk>", "<s>", "</s>", *byte_pieces, *PIECES]
    return GgufSample(
        tokenizer="llama",
        pre="default",
        tokens=tokens,
        kinds=[2, 3, 3, *[6] * 256, *[1] * len(PIECES)],
        scores=[0.0] * 259 + [-float(rank) for rank in (90, 91, 92, 93, 94, 1, 2, 4, 3, 5, 6, 7)],
        merges=None,
        values={"tokenizer.ggml.eos_token_id": 2, **fields},
    )


def test_sentencepiece_merges_by_score_and_falls_back_to_bytes(build):
    tokenizer = build(sentencepiece())
    encoding = tokenizer.encode("hello é")
    assert encoding.tokens == ["<s>", "▁hello", "▁", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(encoding.ids) == "hello é"


def test_sentencepiece_without_a_space_in_front(build):
    values = {"tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.add_bos_token": False}
    tokenizer = build(sentencepiece(**values))
    assert tokenizer.encode("hello").tokens == ["h", "el", "lo"]
    assert tokenizer.decode(tokenizer.encode(" hello").ids) == " hello"


def test_sentencepiece_merges_are_those_of_transformers(tmp_path):
    path = sentencepiece().write(tmp_path / "m.gguf")
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    ours = build_tokenizer(read_header(path))
    for text in ("hello", "hell oh hello lo", "hehello", "x"):
        assert ours.encode(text).tokens == theirs.convert_ids_to_tokens(theirs(text).input_ids)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokenizer": "t5"}, "its kind is 't5', and only gpt2 and llama are known"),
        ({"merges": ["h e", "zz zz"]}, r"m\.gguf: cannot make a tokenizer of it: .*zz"),
        ({"tokenizer": "llama", "merges": None}, "neither merges nor one score per token"),
        ({"values": {"tokenizer.ggml.bos_token_id": 999}}, None),
    ],
)
def test_what_is_no_tokenizer_is_explained(build, fields, message):
    sample = GgufSample(**fields)
    if message is None:
        sample.values["tokenizer.ggml.add_bos_token"] = True
        message = "bos token is 999, outside its vocabulary"
    with pytest.raises(ModelSourceError, match=message):
        build(sample)


def test_transformers_reads_the_prepared_tokenizer_as_it_is(tmp_path):
    path = GgufSample(values={"tokenizer.chat_template": "{{ messages }}"}).write(
        tmp_path / "m.gguf"
    )
    directory = prepare_gguf([path], home=tmp_path / "home", sha256=None, progress=Silent())
    theirs = AutoTokenizer.from_pretrained(directory)
    ours = Tokenizer.from_file(str(directory / "tokenizer.json"))
    for text in (*TEXTS, "<|start|>he<|end|>"):
        assert theirs(text).input_ids == ours.encode(text).ids
        assert theirs.decode(ours.encode(text).ids) == text
    assert theirs.eos_token_id == 0
    assert theirs.bos_token_id == 1
    assert theirs.chat_template == "{{ messages }}"


@pytest.fixture(scope="session")
def smollm2(smollm2_files) -> Tokenizer:
    return Tokenizer.from_file(str(smollm2_files.path / "tokenizer.json"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello, we can use", [19556, 28, 392, 416, 722]),
        ("The capital of France is", [504, 3575, 282, 4649, 314]),
        ("Hello world! 123", [19556, 905, 17, 216, 33, 34, 35]),
        ("Café déjà vu.", [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30]),
        ("  multiple   spaces", [216, 2701, 256, 5600]),
        ("<|im_start|>\n<|im_end|>", [1, 198, 2]),
    ],
)
def test_known_tokens_of_smollm2(smollm2, text, expected):
    assert smollm2.encode(text).ids == expected


def test_smollm2_keeps_spaces_before_a_number_together(smollm2):
    """GPT-2's own rule would give "Ġ", "Ġ", "1" here, which the model never saw in training."""
    assert smollm2.encode("x  12").tokens == ["x", "ĠĠ", "1", "2"]


def test_smollm2_has_the_vocabulary_and_merges_that_transformers_finds(smollm2_files, smollm2):
    file = smollm2_files.weights[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    their_tokenizer = theirs.backend_tokenizer
    their_tokenizer.pre_tokenizer = smollm2.pre_tokenizer
    assert smollm2.get_vocab() == their_tokenizer.get_vocab()
    for text in (*TEXTS, "The quick brown fox jumps over 13 lazy dogs; naïve façade — 東京"):
        assert smollm2.encode(text).ids == their_tokenizer.encode(text).ids

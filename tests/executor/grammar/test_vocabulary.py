from __future__ import annotations

import pytest
import tokenizers

from sapwood.base.errors import InvalidRequest
from sapwood.executor.grammar.vocabulary import vocabulary_of
from sapwood.text.tokenizer import Tokenizer


def test_bytes(vocabulary):
    assert vocabulary.size == 260
    text = "größe {1}"
    assert b"".join(vocabulary.tokens[one] for one in vocabulary.encode(text)) == text.encode()
    assert vocabulary.special_named("<|im_start|>") in vocabulary.special
    assert vocabulary.special_named("<|none|>") is None
    assert vocabulary.tokens[-1] == b"", "an id that the tokenizer does not have"


def test_pieces_and_byte_tokens():
    vocab = {"<unk>": 0, "▁hello": 1, "x": 2, "<0xC3>": 3, "</s>": 4, "a": 5}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], unk_token="<unk>"))
    replace = tokenizers.decoders.Replace("▁", " ")
    backend.decoder = tokenizers.decoders.Sequence(
        [replace, tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    )
    backend.add_special_tokens(["</s>"])
    found = vocabulary_of(Tokenizer(backend), size=6, ends=[4])
    assert found.tokens[1:4] == (b" hello", b"x", b"\xc3")
    assert found.ends == (4,)


def test_without_an_end_there_is_no_grammar(vocabulary):
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, []))
    with pytest.raises(InvalidRequest, match="end-of-sequence"):
        vocabulary_of(Tokenizer(backend), size=1, ends=[])

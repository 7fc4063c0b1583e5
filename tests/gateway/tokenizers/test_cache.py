"""Cached token ids are those of the tokenizer itself."""

from __future__ import annotations

import random

import pytest
from tokenizers import AddedToken

from sapwood.gateway.tokenizers.cache import CachedEncoder, CacheLimits
from sapwood.text.tokenizer import Tokenizer
from tests.text.conftest import BUILDERS, metaspace

MAKERS = {**BUILDERS, "metaspace_first": lambda: metaspace(scheme="first")}
PIECES = [
    "a",
    "b ",
    " ",
    "  ",
    "\n",
    "Hello",
    " world",
    "é",
    "你",
    "x y",
    "<s>",
    "</s>",
    "<|begin|>",
]
ADDED = [
    AddedToken("<|a|>", special=True),
    AddedToken("<|ab|>", special=True, rstrip=True),
    AddedToken("<|l|>", special=True, lstrip=True),
    AddedToken("<|a|><|ab|>", special=False, normalized=False),
    AddedToken("word", special=True, single_word=True),
    AddedToken(" \n", special=False, normalized=False),
    AddedToken("Norm", special=False, normalized=True),
]


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_pieces_between_special_tokens_add_up_to_the_whole(name: str) -> None:
    backend = MAKERS[name]()
    backend.add_tokens(ADDED)
    tokenizer = Tokenizer(backend)
    encoder = CachedEncoder(tokenizer, CacheLimits(max_piece_bytes=20_000))
    assert encoder.pieces is not None
    rng = random.Random(name)
    for _ in range(400):
        parts = rng.choices([*PIECES, *(token.content for token in ADDED)], k=rng.randrange(12))
        text = "".join(parts)
        for adds in (False, True):
            told = encoder.encode(text, add_special_tokens=adds)
            assert told == tokenizer.encode(text, adds), repr(text)
    assert encoder.pieces.counts.hits > 100
    assert encoder.pieces.num_bytes <= 20_000
    assert encoder.pieces.num_bytes == sum(size for _, size in encoder.pieces._entries.values())


def test_whole_texts_are_bounded_in_number_and_apart_by_their_beginning() -> None:
    encoder = CachedEncoder(Tokenizer(BUILDERS["byte_level"]()), CacheLimits(max_texts=2))
    texts = ["Hello", "world", "Hello world"]
    ids = [encoder.encode(text, add_special_tokens=False) for text in texts]
    assert encoder.known(texts[0], add_special_tokens=False) is None
    assert encoder.known(texts[2], add_special_tokens=False) == ids[2]
    assert encoder.known(texts[2], add_special_tokens=True) is None
    assert encoder.texts is not None
    assert len(encoder.texts) == 2
    assert (encoder.texts.counts.hits, encoder.texts.counts.misses) == (1, 2)

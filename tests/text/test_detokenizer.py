"""Detokenizing piece by piece gives what decoding the whole gives."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders

from sapwood.text.decoding import DecodeKind
from sapwood.text.detokenizer import IncrementalDetokenizer
from sapwood.text.tokenizer import Tokenizer
from tests.tiers import examples

KINDS = {
    "byte_level": DecodeKind.BYTES,
    "llama_2": DecodeKind.PIECES,
    "gemma": DecodeKind.PIECES,
    "metaspace": DecodeKind.PIECES,
    "metaspace_never": DecodeKind.PIECES,
    "word_piece": DecodeKind.PIECES,
    "word_level": DecodeKind.PIECES,
    "word_suffix": DecodeKind.WINDOW,
}


def pieces_of(
    tokenizer: Tokenizer, parts: Sequence[Sequence[int]], *, skip: bool = True, spaces: bool = True
) -> list[str]:
    detokenizer = IncrementalDetokenizer(
        tokenizer, skip_special_tokens=skip, spaces_between_special_tokens=spaces
    )
    pieces = [detokenizer.push(part) for part in parts]
    return [*pieces, detokenizer.finish()]


def split(ids: list[int], cuts: list[int]) -> list[list[int]]:
    bounds = [0, *sorted(min(cut, len(ids)) for cut in cuts), len(ids)]
    return [ids[start:end] for start, end in itertools.pairwise(bounds)]


@settings(max_examples=examples(500))
@given(data=st.data(), skip=st.booleans(), spaces=st.booleans())
def test_pieces_of_random_ids_join_to_the_whole(any_tokenizer, data, skip, spaces):
    # Two ids beyond the vocabulary: a model's logits are often wider than its tokenizer.
    token_id = st.integers(0, any_tokenizer.vocab_size + 1)
    ids = data.draw(st.lists(token_id, max_size=30))
    parts = split(ids, data.draw(st.lists(st.integers(0, 30), max_size=30)))
    pieces = pieces_of(any_tokenizer, parts, skip=skip, spaces=spaces)
    whole = any_tokenizer.decode(ids, skip, spaces)
    assert "".join(pieces) == whole
    one_by_one = [[token_id] for token_id in ids]
    assert "".join(pieces_of(any_tokenizer, one_by_one, skip=skip, spaces=spaces)) == whole


@settings(max_examples=examples(500))
@given(text=st.text(max_size=40))
def test_pieces_of_a_text_are_never_broken(byte_level_tokenizer, llama_2_tokenizer, text):
    for tokenizer in (byte_level_tokenizer, llama_2_tokenizer):
        ids = tokenizer.encode(text)
        pieces = pieces_of(tokenizer, [[token_id] for token_id in ids])
        assert "".join(pieces) == tokenizer.decode(ids)
        if "\ufffd" not in text:
            assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("name", sorted(KINDS))
def test_each_decoder_is_recognised(backends: dict[str, Callable[[], Backend]], name: str):
    assert Tokenizer(backends[name]()).texts.kind is KINDS[name]


def test_an_incomplete_character_waits_and_ends_as_a_replacement(byte_level_tokenizer):
    ids = byte_level_tokenizer.encode("\U0001f9ff")
    assert len(ids) > 1
    detokenizer = IncrementalDetokenizer(byte_level_tokenizer)
    assert [detokenizer.push([token_id]) for token_id in ids[:-1]] == [""] * (len(ids) - 1)
    assert detokenizer.finish() == byte_level_tokenizer.decode(ids[:-1]) == "\ufffd"


def test_a_malformed_run_of_byte_tokens_equals_a_whole_decode(llama_2_tokenizer, backends):
    backend = backends["llama_2"]()
    run = [backend.token_to_id(f"<0x{byte:02X}>") for byte in b"ok\xe4\xbd"]
    pieces = pieces_of(llama_2_tokenizer, [[token_id] for token_id in run])
    assert pieces == ["", "", "", "", "\ufffd" * 4]


def test_the_first_space_goes_and_later_ones_stay(llama_2_tokenizer):
    ids = llama_2_tokenizer.encode("Hello world")
    assert llama_2_tokenizer.decode(ids) == "Hello world"
    pieces = pieces_of(llama_2_tokenizer, [[token_id] for token_id in ids])
    assert "".join(pieces) == "Hello world"
    assert pieces[0] == ""


def test_the_start_lasts_until_some_text_came_out(backends):
    backend = backends["llama_2"]()
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 2, 0)])
    tokenizer = Tokenizer(backend)
    assert tokenizer.texts.kind is DecodeKind.PIECES
    ids = [backend.token_to_id(token) for token in ("▁", "▁Hello", "▁world")]
    pieces = pieces_of(tokenizer, [[token_id] for token_id in ids])
    assert pieces == ["", "Hello", " world", ""]
    assert tokenizer.decode(ids) == "Hello world"


def test_no_space_between_special_tokens(backends):
    tokenizer = Tokenizer(backends["word_level"]())
    ids = tokenizer.encode("one </s> </s> two")
    assert tokenizer.decode(ids, False, True) == "one </s> </s> two"
    assert tokenizer.decode(ids, False, False) == "one </s></s> two"
    assert tokenizer.decode(ids, True, False) == "one two"


def test_a_window_gives_the_whole_for_a_decoder_it_does_not_know(backends):
    backend = backends["llama_2"]()
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Replace("H", "J")])
    tokenizer = Tokenizer(backend)
    assert tokenizer.texts.kind is DecodeKind.WINDOW
    ids = tokenizer.encode("Hello world, 你好 😀 Hello")
    pieces = pieces_of(tokenizer, [[token_id] for token_id in ids])
    assert "".join(pieces) == tokenizer.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("name", ["llama_2", "metaspace", "word_suffix", "word_level"])
@pytest.mark.parametrize("num_tokens", [1000, 4000])
def test_the_work_per_token_does_not_grow(backends, monkeypatch, name, num_tokens):
    tokenizer = Tokenizer(backends[name]())
    decode = tokenizer.texts.from_start
    decoded_tokens = 0

    def counting(ids: Sequence[int]) -> str:
        nonlocal decoded_tokens
        decoded_tokens += len(ids)
        return decode(ids)

    monkeypatch.setattr(tokenizer.texts, "from_start", counting)
    # Every id in turn; for llama_2 this has a run of all byte tokens, which is malformed.
    ids = [token_id % tokenizer.vocab_size for token_id in range(num_tokens)]
    pieces_of(tokenizer, [[token_id] for token_id in ids])
    assert decoded_tokens < 16 * num_tokens


@settings(max_examples=examples(100))
@given(data=st.data(), skip=st.booleans())
def test_pieces_of_a_real_model_join_to_the_whole(smollm2_tokenizer, data, skip):
    token_ids = st.integers(0, smollm2_tokenizer.vocab_size - 1)
    ids = data.draw(st.lists(token_ids, max_size=40))
    pieces = pieces_of(smollm2_tokenizer, [[token_id] for token_id in ids], skip=skip)
    assert "".join(pieces) == smollm2_tokenizer.decode(ids, skip)


@pytest.fixture(scope="module")
def smollm2_tokenizer(smollm2_directory) -> Tokenizer:
    return Tokenizer.from_directory(smollm2_directory)

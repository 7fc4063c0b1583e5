from __future__ import annotations

from sapwood.text.token_names import TokenNames
from sapwood.text.tokenizer import Tokenizer


def test_the_bytes_of_all_tokens_are_the_text(any_tokenizer: Tokenizer) -> None:
    """But for what a decoder does at the start, such as leaving out a space."""
    names = TokenNames(any_tokenizer.texts)
    token_ids = any_tokenizer.encode("Hello world", add_special_tokens=False)
    raw = b"".join(map(names.raw, token_ids)).decode()
    assert raw.strip() == any_tokenizer.decode(token_ids).strip()
    assert [names.name(one) for one in token_ids] == [names.text(one) for one in token_ids]


def test_parts_of_a_character_are_told_apart(
    byte_level_tokenizer: Tokenizer, llama_2_tokenizer: Tokenizer
) -> None:
    for tokenizer in (byte_level_tokenizer, llama_2_tokenizer):
        names = TokenNames(tokenizer.texts)
        token_ids = [
            one
            for one in tokenizer.encode("\U0001f9ff", add_special_tokens=False)
            if not names.raw(one).isascii()
        ]
        assert len(token_ids) > 1
        assert b"".join(map(names.raw, token_ids)) == "\U0001f9ff".encode()
        listed = [names.name(one) for one in token_ids]
        assert len(set(listed)) == len(set(token_ids))
        assert all(one.startswith("bytes:\\x") for one in listed)


def test_an_unknown_id_has_no_bytes(any_tokenizer: Tokenizer) -> None:
    names = TokenNames(any_tokenizer.texts)
    assert names.raw(10**6) == b""
    assert names.name(10**6) == names.text(10**6) == ""

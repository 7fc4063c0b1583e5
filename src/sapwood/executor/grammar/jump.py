"""Tokens that a grammar leaves no choice about, found without sampling them.

Where every token that may come next begins with the shortest of them, the shortest one's text is
certain. The matcher follows certain text as far as possible and is then put back; the output gets
the tokens that the tokenizer makes of that text. How far the matcher goes at once is bounded, since
a few bytes of a grammar can force a text without an end.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sapwood.executor.grammar.interface import Matcher
from sapwood.executor.grammar.vocabulary import Vocabulary

MAX_FORCED_TOKENS = 64
"""Tokens that a matcher follows at once; each costs as much as a mask."""
MAX_CANDIDATES = 64
"""Where more tokens than this may come next, no text counts as certain."""
MIN_FORCED_BYTES = 2
"""A shorter text is a single token, and forcing that saves nothing: it is computed anyway."""


def forced_tokens(matcher: Matcher, mask: NDArray[np.int32], vocabulary: Vocabulary) -> list[int]:
    """The tokens that must come next in any case; the matcher stays where it is.

    mask  [1, words]: what may come next, as the matcher has filled it"""
    text = forced_text(matcher, mask, vocabulary)
    return [] if len(text) < MIN_FORCED_BYTES else tokens_of(text, vocabulary)


def forced_text(matcher: Matcher, mask: NDArray[np.int32], vocabulary: Vocabulary) -> bytes:
    """The bytes that every continuation begins with, as far as the matcher goes at once."""
    text = b""
    num_taken = 0
    try:
        while num_taken < MAX_FORCED_TOKENS:
            token_id = _certain_token(mask, vocabulary)
            if token_id is None or not matcher.accept(token_id):
                break
            num_taken += 1
            text += vocabulary.tokens[token_id]
            mask = np.zeros_like(mask)
            matcher.fill(mask, 0)
    finally:
        if num_taken:
            matcher.rollback(num_taken)
    return text


def _certain_token(mask: NDArray[np.int32], vocabulary: Vocabulary) -> int | None:
    """The shortest of the allowed tokens if all others begin with it."""
    words = np.flatnonzero(mask[0])
    if len(words) > MAX_CANDIDATES:
        return None
    bits = np.unpackbits(mask[0, words].view(np.uint8), bitorder="little").reshape(-1, 32)
    places, offsets = np.nonzero(bits)
    allowed = (words[places] * 32 + offsets).tolist()
    if not 0 < len(allowed) <= MAX_CANDIDATES:
        return None
    if not vocabulary.special.isdisjoint(allowed) or any(end in allowed for end in vocabulary.ends):
        return None
    shortest = min(allowed, key=lambda token_id: len(vocabulary.tokens[token_id]))
    text = vocabulary.tokens[shortest]
    is_certain = text and all(vocabulary.tokens[token_id].startswith(text) for token_id in allowed)
    return shortest if is_certain else None


def tokens_of(text: bytes, vocabulary: Vocabulary) -> list[int]:
    """The tokens of the forced text, without the last, which the following text could change.

    A tokenizer joins characters as far as it can: if the text goes on, its last token may become
    longer. So that token is left to be sampled."""
    token_ids = vocabulary.encode(text.decode("utf-8", "ignore"))[:-1]
    # Some tokenizers put a space in front, or normalise: then the tokens have other bytes.
    so_far = b"".join(vocabulary.tokens[token_id] for token_id in token_ids)
    return token_ids if text.startswith(so_far) else []

"""A model's tokens as the bytes they stand for, which is how grammars see them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from sapwood.base.errors import InvalidRequest
from sapwood.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """tokens   one per id of the model; b"" where the tokenizer has none
    special  ids of special tokens, whose bytes are no text
    ends     ids that end an output, sorted
    encode   text -> token ids, without any added around it
    """

    tokens: tuple[bytes, ...]
    special: frozenset[int]
    ends: tuple[int, ...]
    encode: Callable[[str], list[int]]

    @property
    def size(self) -> int:
        return len(self.tokens)

    def special_named(self, text: str) -> int | None:
        """The id of the special token with that text; None: there is none."""
        wanted = text.encode()
        return next(
            (token_id for token_id in self.special if self.tokens[token_id] == wanted), None
        )


def vocabulary_of(tokenizer: Tokenizer, *, size: int, ends: Iterable[int]) -> Vocabulary:
    """size: token ids of the model.

    Raises InvalidRequest if outputs of this model cannot be held to a grammar."""
    end_ids = tuple(sorted(token_id for token_id in ends if token_id < size))
    if not end_ids:
        raise InvalidRequest(
            "this model has no end-of-sequence token, so that an output could not end where its "
            "grammar does"
        )
    tokens: list[bytes] = []
    for token_id in range(size):
        alone = tokenizer.texts.bytes_alone(token_id)
        if alone is None:
            raise InvalidRequest(
                "this model's tokenizer does not say which bytes a token stands for, so that its "
                "outputs cannot be held to a grammar"
            )
        tokens.append(alone)
    return Vocabulary(
        tokens=tuple(tokens),
        special=frozenset(token_id for token_id in tokenizer.special_token_ids if token_id < size),
        ends=end_ids,
        encode=lambda text: tokenizer.encode(text, add_special_tokens=False),
    )

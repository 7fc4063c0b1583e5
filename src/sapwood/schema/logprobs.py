"""Log probabilities of tokens: what is asked for, and how they cross processes.

All are natural logarithms of the model's own distribution: the softmax of its logits, before
temperature, penalties, biases, masks and processors.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TypeVar

import msgspec

from sapwood.base.errors import InvalidRequest
from sapwood.schema import limits

MAX_TOP_LOGPROBS = limits.TOP_LOGPROBS.most
"""Likeliest tokens per position; SGLang sets no limit, OpenAI's is 20."""
LEAST_LOGPROB = -9999.0
"""Shown for any lower log probability, as in OpenAI's API: JSON has no minus infinity."""

_BYTES = 4

T = TypeVar("T")


class LogprobOptions(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Which log probabilities one request wants besides those of its output tokens.

    prompt_start  log probabilities of the prompt tokens after this index are wanted too (a prompt's
                  first token has none); None: of no prompt token
    num_top       how many of the likeliest tokens are wanted at each position
    token_ids     tokens whose log probability is wanted at each position

    Raises InvalidRequest, naming the field, its value and its range, when one is out of range.
    """

    prompt_start: int | None = None
    num_top: int = 0
    token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.prompt_start is not None and self.prompt_start < 0:
            raise InvalidRequest(
                f"prompt_start is {self.prompt_start} but must be >= 0", param="prompt_start"
            )
        if not 0 <= self.num_top <= MAX_TOP_LOGPROBS:
            raise InvalidRequest(
                f"num_top is {self.num_top} but must be in [0, {MAX_TOP_LOGPROBS}]",
                param="num_top",
            )
        limits.LOGPROB_TOKEN_IDS.check(len(self.token_ids), "token_ids")

    @property
    def num_per_token(self) -> int:
        """Log probabilities at each position."""
        return 1 + self.num_top + len(self.token_ids)


class TokenLogprobs(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Log probabilities at n consecutive positions, packed: little-endian, 4 bytes a number.

    tokens   [n] fp32: log probability of the token at each position
    top_ids  [n, num_top] int32: ids of the likeliest tokens, likeliest first
    top      [n, num_top] fp32: log probabilities of `top_ids`
    chosen   [n, number of token_ids] fp32: of the tokens that the request named, in their order
    """

    tokens: bytes = b""
    top_ids: bytes = b""
    top: bytes = b""
    chosen: bytes = b""

    def __len__(self) -> int:
        return len(self.tokens) // _BYTES

    def __getitem__(self, positions: slice) -> TokenLogprobs:
        """The log probabilities at a slice of consecutive positions."""
        first, last, _ = positions.indices(len(self))
        count = max(len(self), 1)

        def part(packed: bytes) -> bytes:
            size = len(packed) // count
            return packed[first * size : last * size]

        return TokenLogprobs(
            tokens=part(self.tokens),
            top_ids=part(self.top_ids),
            top=part(self.top),
            chosen=part(self.chosen),
        )

    @staticmethod
    def joined(parts: Sequence[TokenLogprobs]) -> TokenLogprobs:
        """The positions of all parts one after the other; the parts belong to one request."""
        if len(parts) == 1:
            return parts[0]
        return TokenLogprobs(
            tokens=b"".join(part.tokens for part in parts),
            top_ids=b"".join(part.top_ids for part in parts),
            top=b"".join(part.top for part in parts),
            chosen=b"".join(part.chosen for part in parts),
        )

    def of_tokens(self) -> tuple[float, ...]:
        return _floats(self.tokens)

    def of_likeliest(self) -> list[list[tuple[float, int]]]:
        """Per position: (log probability, token id) of the likeliest tokens, likeliest first."""
        ids = struct.unpack(f"<{len(self.top_ids) // _BYTES}i", self.top_ids)
        pairs = list(zip(_floats(self.top), ids, strict=True))
        return _rows(pairs, len(self))

    def of_chosen(self) -> list[list[float]]:
        """Per position: log probabilities of the tokens that the request named, in their order."""
        return _rows(_floats(self.chosen), len(self))


def _floats(packed: bytes) -> tuple[float, ...]:
    return struct.unpack(f"<{len(packed) // _BYTES}f", packed)


def _rows(values: Sequence[T], count: int) -> list[list[T]]:
    width = len(values) // max(count, 1)
    return [list(values[i * width : (i + 1) * width]) for i in range(count)]

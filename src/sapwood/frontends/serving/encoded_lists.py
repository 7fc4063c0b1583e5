"""Long lists of log probabilities as JSON, a few positions at a time: other clients wait meanwhile,
and as Python objects they would take five times the memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import orjson

from sapwood.schema.logprobs import TokenLogprobs

LOGPROBS_AT_A_TIME = 2048
"""Encoded between two looks at what else is to be done: a few milliseconds."""


class EncodedList:
    """A JSON list that grows; its items are encoded as they come."""

    def __init__(self) -> None:
        self._items = bytearray()

    def extend(self, items: Sequence[object]) -> None:
        if items:
            self._items += b"," if self._items else b""
            self._items += orjson.dumps(items)[1:-1]

    @property
    def json(self) -> orjson.Fragment:
        return orjson.Fragment(b"[%b]" % bytes(self._items))


async def in_pieces(
    token_ids: Sequence[int], values: TokenLogprobs, num_per_token: int
) -> AsyncIterator[tuple[int, Sequence[int], TokenLogprobs]]:
    """(first position, token ids, log probabilities) of a few positions at a time."""
    step = max(1, LOGPROBS_AT_A_TIME // num_per_token)
    for first in range(0, len(values), step):
        if first:
            await asyncio.sleep(0)
        yield first, token_ids[first : first + step], values[first : first + step]

"""The newest texts of one namespace, found by the tokens that came before.

Places that end with the same tokens are chained from the newest to the oldest, as in LZ77's
compressors (Deutsch 1996, RFC 1951, section 4), for two lengths of the end: so a token costs a few
table entries, however often its neighbours occur.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field

LONG_END = 3
"""Tokens by which places are chained; where no match is so long, a second chain goes by one."""
NOWHERE = -1
PLACE_BITS = 32


@dataclass(slots=True, eq=False)
class Text:
    """Prompt and output of one request.

    number  of the text in its index
    earlier_long, earlier_short  per token: the place before it with the same last LONG_END tokens,
            and with the same token
    """

    number: int
    tokens: array[int] = field(default_factory=lambda: array("i"))
    earlier_long: array[int] = field(default_factory=lambda: array("q"))
    earlier_short: array[int] = field(default_factory=lambda: array("q"))


class TextIndex:
    """Texts that grow at their ends. A place is a text's number and the index of a token in it."""

    def __init__(self) -> None:
        self._texts: dict[int, Text] = {}
        self._num_begun = 0
        self._last_long: dict[tuple[int, ...], int] = {}
        self._last_short: dict[int, int] = {}

    def __len__(self) -> int:
        """Number of texts."""
        return len(self._texts)

    def begin(self) -> Text:
        text = Text(self._num_begun)
        self._texts[text.number] = text
        self._num_begun += 1
        return text

    def knows(self, text: Text) -> bool:
        return text.number in self._texts

    def extend(self, text: Text, token_id: int) -> None:
        """A token follows at the text's end."""
        tokens = text.tokens
        place = text.number << PLACE_BITS | len(tokens)
        tokens.append(token_id)
        text.earlier_short.append(self._last_short.get(token_id, NOWHERE))
        self._last_short[token_id] = place
        if len(tokens) < LONG_END:
            text.earlier_long.append(NOWHERE)
            return
        end = tuple(tokens[-LONG_END:])
        text.earlier_long.append(self._last_long.get(end, NOWHERE))
        self._last_long[end] = place

    def drop_oldest(self) -> int:
        """Forget the text that began first; returns its number of tokens."""
        number = next(iter(self._texts))
        text = self._texts.pop(number)
        tokens = text.tokens
        for index, token_id in enumerate(tokens):
            if self._last_short.get(token_id, NOWHERE) >> PLACE_BITS == number:
                del self._last_short[token_id]
            end = tuple(tokens[index + 1 - LONG_END : index + 1]) if index + 1 >= LONG_END else ()
            if end and self._last_long.get(end, NOWHERE) >> PLACE_BITS == number:
                del self._last_long[end]
        return len(tokens)

    def ending_like(self, text: Text, *, is_long: bool) -> Iterator[tuple[Text, int]]:
        """Earlier places, newest first, that end like the text does: (text, index of the token)."""
        earlier = text.earlier_long if is_long else text.earlier_short
        place = earlier[-1] if earlier else NOWHERE
        while place != NOWHERE:
            found = self._texts.get(place >> PLACE_BITS)
            if found is None:
                return
            index = place & (1 << PLACE_BITS) - 1
            yield found, index
            place = (found.earlier_long if is_long else found.earlier_short)[index]


def common_end(text: Text, other: Text, index: int, most: int) -> int:
    """How many tokens, up to `most`, are the same before the text's end and up to `index`."""
    own, others = text.tokens, other.tokens
    most = min(most, len(own), index + 1)
    if own[-most:] == others[index + 1 - most : index + 1]:
        return most
    length = 0
    while own[-1 - length] == others[index - length]:
        length += 1
    return length

"""The newest tokens of all requests, found again by the tokens that end there.

Tokens lie in a ring: a new one takes the place of the oldest, so memory is bounded and nothing has
to be evicted. Texts that grow at the same time lie there mixed, and each token knows its neighbours
in its own text. Tokens that end alike are chained from the newest to the oldest, as in LZ77's
compressors (Deutsch 1996, RFC 1951, section 4), for several lengths of the end.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

ENDS = (4, 2, 1)
"""Lengths of the ends by which places are chained; a search begins with the longest."""
LAST_PLACE = 2**31 - 1
NOWHERE = 0

_FACTORS = (0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35, 0x27D4EB2F, 0x165667B1)


class TextIndex:
    """A place is the number of a token since the beginning, from 1 on; the newest `capacity` are
    known. Each belongs to a namespace, and is found from that namespace alone."""

    def __init__(self, capacity: int) -> None:
        """capacity  tokens that are kept"""
        self._capacity = capacity
        self._mask = (1 << max(capacity - 1, 1).bit_length()) - 1
        self._names: dict[str, int] = {}
        self._name_of: dict[int, str] = {}
        self._sizes: dict[int, int] = {}
        self._num_names = 0
        self._clear()

    def _clear(self) -> None:
        self._newest = NOWHERE
        self._tokens = array("i", [0])
        self._owners = array("i", [0])
        self._before = array("i", [0])
        self._after = array("i", [0])
        self._alike = tuple(array("i", [0]) for _ in ENDS)
        self._heads = tuple(array("i", bytes(4 * (self._mask + 1))) for _ in ENDS)

    @property
    def num_tokens(self) -> int:
        return min(self._newest, self._capacity)

    @property
    def num_namespaces(self) -> int:
        """With at least one token that is known."""
        return len(self._names)

    def knows(self, place: int) -> bool:
        return place > self._newest - self._capacity and place > NOWHERE

    def append(self, namespace: str, before: int, token_id: int) -> int:
        """A token that follows the one at `before` (NOWHERE: it begins a text); its place."""
        if self._newest == LAST_PLACE:
            self._forget_all()
        place = self._newest + 1
        at = self._at(place)
        if place > self._capacity:
            self._forget(at)
        owner = self._owner(namespace)
        self._newest = place
        if at == len(self._tokens):
            for column in (self._tokens, self._owners, self._before, self._after, *self._alike):
                column.append(0)
        self._tokens[at] = token_id
        self._owners[at] = owner
        self._before[at] = before
        self._after[at] = NOWHERE
        if self.knows(before):
            self._after[self._at(before)] = place
        for alike, heads, end in zip(self._alike, self._heads, ENDS, strict=True):
            key = self._key(place, end)
            alike[at] = NOWHERE if key is None else heads[key]
            if key is not None:
                heads[key] = place
        return place

    def ending_like(self, place: int, end: int) -> Iterator[int]:
        """Earlier places, the newest first, that may end with the same `end` tokens as the text up
        to `place`: a few of them end otherwise, or are another namespace's."""
        alike = self._alike[ENDS.index(end)]
        while self.knows(place):
            place = alike[self._at(place)]
            if self.knows(place):
                yield place

    def common_end(self, place: int, other: int, most: int) -> int:
        """How many tokens, up to `most`, the texts up to two places end with alike; 0 if they are
        of different namespaces."""
        if self._owners[self._at(place)] != self._owners[self._at(other)]:
            return 0
        length = 0
        while length < most and self.knows(place) and self.knows(other):
            at, other_at = self._at(place), self._at(other)
            if self._tokens[at] != self._tokens[other_at]:
                break
            length += 1
            place, other = self._before[at], self._before[other_at]
        return length

    def following(self, place: int) -> int:
        """The place after this one in its text; NOWHERE at the text's end."""
        return self._after[self._at(place)] if self.knows(place) else NOWHERE

    def token_at(self, place: int) -> int:
        return self._tokens[self._at(place)]

    def _at(self, place: int) -> int:
        return (place - 1) % self._capacity + 1

    def _forget(self, at: int) -> None:
        """The oldest token, whose place in the ring is taken."""
        owner = self._owners[at]
        self._sizes[owner] -= 1
        if not self._sizes[owner]:
            del self._sizes[owner]
            del self._names[self._name_of.pop(owner)]

    def _owner(self, namespace: str) -> int:
        owner = self._names.get(namespace)
        if owner is None:
            self._num_names += 1
            owner = self._names[namespace] = self._num_names
            self._name_of[owner] = namespace
        self._sizes[owner] = self._sizes.get(owner, 0) + 1
        return owner

    def _key(self, place: int, end: int) -> int | None:
        """Where the chain of this end begins; None if the text is shorter."""
        key = self._owners[self._at(place)] * _FACTORS[0]
        for factor in _FACTORS[1 : end + 1]:
            if not self.knows(place):
                return None
            at = self._at(place)
            key = (key ^ self._tokens[at]) * factor
            place = self._before[at]
        return (key ^ key >> 15) & self._mask

    def _forget_all(self) -> None:
        for names in (self._names, self._name_of, self._sizes):
            names.clear()
        self._num_names = 0
        self._clear()

"""Token ids of texts that were seen before, as wholes (L0) or between special tokens (L1).

A special token ends what came before it: the library cuts a text at its added tokens first and
encodes what lies between them for itself. So the ids between two special tokens depend on nothing
but the text between them and the token before it, and a conversation's next request finds all its
earlier messages encoded.
"""

from __future__ import annotations

import re
import sys
import threading
from array import array
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass

from sapwood.text.tokenizer import Tokenizer

L0_MAX_BYTES = 256 << 20
"""Of whole texts and their ids, however few entries they are."""
ENTRY_BYTES = 200
"""What an entry takes besides its text and its ids, roughly."""
_ID_BYTES = 4


@dataclass(slots=True)
class CacheCounts:
    """Lookups: hits and misses."""

    hits: int = 0
    misses: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheLimits:
    """Sizes of one tokenizer's caches; 0: there is no such cache.

    max_texts        whole texts
    max_piece_bytes  of the pieces between special tokens, and of their ids
    """

    max_texts: int = 0
    max_piece_bytes: int = 0


class IdCache:
    """Token ids by key; what was used least recently goes first. To be called under a lock.

    num_bytes  of all entries, roughly
    """

    def __init__(self, *, max_entries: int, max_bytes: int) -> None:
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._entries: OrderedDict[Hashable, tuple[array[int], int]] = OrderedDict()
        self.num_bytes = 0
        self.counts = CacheCounts()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Hashable) -> array[int] | None:
        found = self._entries.get(key)
        if found is None:
            self.counts.misses += 1
            return None
        self._entries.move_to_end(key)
        self.counts.hits += 1
        return found[0]

    def put(self, key: Hashable, text: str, ids: array[int]) -> None:
        """text: the part of the key that takes memory"""
        size = ENTRY_BYTES + sys.getsizeof(text) + _ID_BYTES * len(ids)
        if size > self._max_bytes:
            return
        old = self._entries.pop(key, None)
        if old is not None:
            self.num_bytes -= old[1]
        self._entries[key] = (ids, size)
        self.num_bytes += size
        while len(self._entries) > self._max_entries or self.num_bytes > self._max_bytes:
            _, (_, freed) = self._entries.popitem(last=False)
            self.num_bytes -= freed


class CachedEncoder:
    """A tokenizer's `encode` with caches; several threads may call it at once.

    texts   the exact cache (L0); None: there is none
    pieces  the cache between special tokens (L1); None: there is none
    """

    def __init__(self, tokenizer: Tokenizer, limits: CacheLimits) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self.texts: IdCache | None = None
        self.pieces: IdCache | None = None
        if limits.max_texts:
            self.texts = IdCache(max_entries=limits.max_texts, max_bytes=L0_MAX_BYTES)
        cut = tokenizer.cut_tokens if limits.max_piece_bytes else None
        if cut is not None and cut.boundaries:
            self.pieces = IdCache(max_entries=sys.maxsize, max_bytes=limits.max_piece_bytes)
            self._boundaries = cut.boundaries
            # As the library does: the first match counts, and of several there the longest.
            longest_first = sorted(cut.every, key=len, reverse=True)
            self._find = re.compile("|".join(map(re.escape, longest_first))).finditer

    def known(self, text: str, *, add_special_tokens: bool) -> list[int] | None:
        """The ids of a text that was encoded before as a whole; None: it was not."""
        if self.texts is None:
            return None
        with self._lock:
            found = self.texts.get((text, add_special_tokens))
        return None if found is None else found.tolist()

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """The token ids of a text that `known` does not know; they are remembered.

        InvalidRequest if the text has half of a surrogate pair."""
        if self.pieces is None or add_special_tokens:
            ids = array("I", self._tokenizer.encode(text, add_special_tokens))
        else:
            ids = self._joined(text, self.pieces)
        if self.texts is not None:
            with self._lock:
                self.texts.put((text, add_special_tokens), text, ids)
        return ids.tolist()

    def _joined(self, text: str, cache: IdCache) -> array[int]:
        """The ids of the text's pieces, one after the other."""
        keys = self._cut(text)
        with self._lock:
            found = [cache.get(key) for key in keys]
        missing = [i for i, ids in enumerate(found) if ids is None]
        if missing:
            # The token before a piece goes along, so that the piece is no beginning of a text.
            # What it is encoded to is one id, which is left out again.
            texts = ["".join(keys[i]) for i in missing]
            told = self._tokenizer.encode_batch(texts, add_special_tokens=False)
            with self._lock:
                for i, ids in zip(missing, told, strict=True):
                    before, piece = keys[i]
                    packed = array("I", ids[1:] if before else ids)
                    found[i] = packed
                    cache.put(keys[i], piece, packed)
        joined = array("I")
        for part in found:
            assert part is not None
            joined += part
        return joined

    def _cut(self, text: str) -> list[tuple[str, str]]:
        """(the boundary before a piece, "" before the first one; the piece, its last token a
        boundary unless the text ends without one) of each piece"""
        keys: list[tuple[str, str]] = []
        begin, before = 0, ""
        for match in self._find(text):
            token = match[0]
            if token in self._boundaries:
                keys.append((before, text[begin : match.end()]))
                begin, before = match.end(), token
        if begin < len(text) or not keys:
            keys.append((before, text[begin:]))
        return keys

"""Vectors of texts, kept for the next request: negative prompts are nearly always equal."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, Protocol, TypeVar


class Sized(Protocol):
    @property
    def num_bytes(self) -> int: ...


K = TypeVar("K", bound=Hashable)
V = TypeVar("V", bound=Sized)


class TextCache(Generic[K, V]):
    """The vectors used last, of at most `max_bytes`; what is larger alone is not kept."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._kept: OrderedDict[K, V] = OrderedDict()
        self.num_bytes = 0
        self.num_hits = 0
        self.num_misses = 0

    def get(self, text: K) -> V | None:
        found = self._kept.get(text)
        if found is None:
            self.num_misses += 1
            return None
        self.num_hits += 1
        self._kept.move_to_end(text)
        return found

    def put(self, text: K, vectors: V) -> None:
        if text in self._kept or vectors.num_bytes > self._max_bytes:
            return
        self._kept[text] = vectors
        self.num_bytes += vectors.num_bytes
        while self.num_bytes > self._max_bytes:
            _, oldest = self._kept.popitem(last=False)
            self.num_bytes -= oldest.num_bytes

    def clear(self) -> None:
        """Forget all vectors: what made them has changed."""
        self._kept.clear()
        self.num_bytes = 0

"""What the prefix tree tells those who follow its content: events and further tiers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class CacheListener(Protocol):
    """Hears of every page and state that the tree begins or ceases to keep.

    namespace  of the prefix
    key        the tokens from the beginning of the prefix on (see `token_key`), up to the end of
               the last page that is meant, or up to the state
    pool       index of the pool
    numbers    pages of the last tokens of `key`, in their order; or the slot of one state
    """

    def stored(self, namespace: str, key: bytes, pool: int, numbers: Sequence[int]) -> None:
        """The tree keeps them from now on."""
        ...

    def evicted(self, namespace: str, key: bytes, pool: int, numbers: Sequence[int]) -> None:
        """They make room. Their content stays until the next plan is executed."""
        ...

    def removed(self, namespace: str, key: bytes, pool: int, numbers: Sequence[int]) -> None:
        """They are forgotten because somebody asked for it, or taken over by a request."""
        ...

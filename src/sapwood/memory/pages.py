"""Hands out the pages of one pool, and takes them back."""

from __future__ import annotations

from collections.abc import Iterable


class PageAllocator:
    """Pages 0 .. num_pages - 1, each free or taken.

    The page given back last is taken first, so that a lightly used pool touches little memory.
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise ValueError(f"num_pages must be >= 1, got {num_pages}")
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._taken = bytearray(num_pages)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, num_pages: int) -> list[int]:
        """Take `count` free pages. The caller has made sure that there are enough."""
        assert 0 <= num_pages <= len(self._free), "took more pages than are free"
        if num_pages == 0:
            return []
        pages = self._free[-num_pages:][::-1]
        del self._free[-num_pages:]
        for page in pages:
            self._taken[page] = 1
        return pages

    def give_back(self, pages: Iterable[int]) -> None:
        for page in pages:
            assert self._taken[page], f"page {page} was given back twice"
            self._taken[page] = 0
            self._free.append(page)

"""A storage as one rank uses it: its part of every page, in the slots of its own host pools."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sapwood.memory.storage.interface import PageStorage, StorageUnavailable
from sapwood.memory.storage.names import part_name

OpenStorage = Callable[[str, Mapping[str, Any]], PageStorage]
"""From a backend's name and its settings; ConfigError if it cannot be used."""


@dataclass(frozen=True, slots=True)
class Place:
    """A page or state of one host pool.

    name  in the storage, without the rank (see CopyNames)
    slot  of the host pool
    """

    name: str
    pool: int
    slot: int


class PageParts(Protocol):
    """The storage as all ranks of an engine use it together: a page is there if the part of each
    rank is. For any thread; StorageUnavailable where the storage of a rank fails."""

    @property
    def page_bytes(self) -> Sequence[int]:
        """Of a page on rank 0, by pool."""
        ...

    def open(self, backend: str, extra: Mapping[str, Any]) -> None:
        """Use that storage from now on. ConfigError if a rank cannot; then none does."""
        ...

    def count(self, names: Sequence[str]) -> int:
        """How many of these pages are there, counted from the first on."""
        ...

    def read(self, places: Sequence[Place]) -> int:
        """Fill these slots; how many were, from the first on."""
        ...

    def write(self, places: Sequence[Place]) -> int:
        """Keep what these slots have; how many are there now, from the first on."""
        ...

    def clear(self) -> None: ...

    def close(self) -> None:
        """Use the storage no longer."""
        ...


class OwnParts:
    """The PageParts of a single rank."""

    def __init__(
        self,
        rows: Sequence[NDArray[np.uint8]],
        open_: OpenStorage,
        *,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        """rows  per pool: the host's slots, [slots, bytes of a page]"""
        self._rows = rows
        self._open = open_
        self._rank = rank
        self._num_ranks = num_ranks
        self._storage: PageStorage | None = None

    @property
    def page_bytes(self) -> Sequence[int]:
        return [rows.shape[1] for rows in self._rows]

    def open(self, backend: str, extra: Mapping[str, Any]) -> None:
        assert self._storage is None, "one storage at a time"
        self._storage = self._open(backend, extra)

    def count(self, names: Sequence[str]) -> int:
        return self._used().batch_exists([self._own(name) for name in names])

    def read(self, places: Sequence[Place]) -> int:
        return self._used().batch_get(*self._named(places))

    def write(self, places: Sequence[Place]) -> int:
        return self._used().batch_set(*self._named(places))

    def clear(self) -> None:
        self._used().clear()

    def close(self) -> None:
        storage, self._storage = self._storage, None
        if storage is not None:
            storage.close()

    def _used(self) -> PageStorage:
        storage = self._storage
        if storage is None:
            raise StorageUnavailable("it was detached")
        return storage

    def _own(self, name: str) -> str:
        return part_name(name, self._rank, self._num_ranks)

    def _named(self, places: Sequence[Place]) -> tuple[list[str], list[memoryview]]:
        views = [memoryview(self._rows[place.pool][place.slot]) for place in places]
        return [self._own(place.name) for place in places], views

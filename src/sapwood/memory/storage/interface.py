"""What the engine asks of a storage of page copies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageUser:
    """Who opens a storage: one rank of an engine.

    default_directory  of files, if the settings name none
    model              its name
    """

    default_directory: Path
    model: str = ""
    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1


class StorageUnavailable(Exception):
    """The storage cannot be used now; the message says why."""


class PageStorage(Protocol):
    """Page copies by name. For any thread.

    What is not there, or not what was stored, is a miss. A method raises StorageUnavailable where
    the storage itself fails; what it has done until then stays done.
    """

    def batch_exists(self, keys: Sequence[str]) -> int:
        """How many of the keys are there, counted from the first on up to one that is not."""
        ...

    def batch_get(self, keys: Sequence[str], into: Sequence[memoryview]) -> int:
        """Read the copies; each fills its view, or is a miss. Returns how many were read, from the
        first on; the first miss ends the batch."""
        ...

    def batch_set(self, keys: Sequence[str], values: Sequence[memoryview]) -> int:
        """Keep the copies; one that is there already stays as it is. Returns how many are there
        now, from the first on."""
        ...

    def clear(self) -> None:
        """Forget all copies."""
        ...

    def close(self) -> None: ...

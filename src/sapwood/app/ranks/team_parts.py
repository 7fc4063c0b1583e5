"""A storage over several ranks: each keeps its own part of every page, under a name of its own.

Torch-free."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Protocol

from sapwood.base.errors import ConfigError, EngineUnavailable, SapwoodError
from sapwood.memory.storage.interface import StorageUnavailable
from sapwood.memory.storage.parts import PageParts, Place
from sapwood.schema.rank import PartsTask, PartsTold, RankOrder


class Team(Protocol):
    """The other ranks; see app.ranks.ranks.RankTeam."""

    def send(self, order: RankOrder) -> None: ...

    def parts_told(self, number: int) -> dict[int, PartsTold]: ...


class TeamParts:
    """A `memory.storage.parts.PageParts` of which every rank carries out the same.

    Orders come to a rank in the order of the plans: what is to be written was copied before, and
    what a slot is to be filled with comes after what a plan still copies from it."""

    def __init__(self, own: PageParts, team: Team) -> None:
        """own: rank 0's"""
        self._own = own
        self._team = team
        self._numbers = itertools.count(1)

    @property
    def page_bytes(self) -> Sequence[int]:
        return self._own.page_bytes

    def open(self, backend: str, extra: Mapping[str, Any]) -> None:
        number = self._send(action="open", backend=backend, extra=dict(extra))
        failure: ConfigError | None = None
        try:
            self._own.open(backend, extra)
        except ConfigError as error:
            failure = error
        told = self._team.parts_told(number)
        if failure is None:
            failure = next(
                (
                    ConfigError(f"rank {rank}: {one.failure}")
                    for rank, one in sorted(told.items())
                    if one.failure is not None
                ),
                None,
            )
        if failure is not None:
            self.close()
            raise failure

    def count(self, names: Sequence[str]) -> int:
        number = self._send(action="count", names=list(names))
        return self._least(number, lambda: self._own.count(names))

    def read(self, places: Sequence[Place]) -> int:
        number = self._send_places("read", places)
        return self._least(number, lambda: self._own.read(places))

    def write(self, places: Sequence[Place]) -> int:
        number = self._send_places("write", places)
        return self._least(number, lambda: self._own.write(places))

    def clear(self) -> None:
        def clear() -> int:
            self._own.clear()
            return 0

        self._least(self._send(action="clear"), clear)

    def close(self) -> None:
        with suppress(EngineUnavailable):  # a rank that is gone has no storage open
            self._send(action="close")
        self._own.close()

    def _send_places(self, action: str, places: Sequence[Place]) -> int:
        return self._send(
            action=action,
            names=[place.name for place in places],
            pools=[place.pool for place in places],
            slots=[place.slot for place in places],
        )

    def _send(self, **order: Any) -> int:
        number = next(self._numbers)
        self._team.send(PartsTask(number=number, **order))
        return number

    def _least(self, number: int, own: Callable[[], int]) -> int:
        """The smallest count of all ranks, once all have told. StorageUnavailable of the first that
        fails."""
        failure: StorageUnavailable | None = None
        count = 0
        try:
            count = own()
        except StorageUnavailable as error:
            failure = error
        told = self._team.parts_told(number)
        if failure is not None:
            raise failure
        for rank, one in sorted(told.items()):
            if one.failure is not None:
                raise StorageUnavailable(f"rank {rank}: {one.failure}")
        return min(count, *(one.count for one in told.values()))


class PartKeeper:
    """On another rank than 0: carries such orders out, beside the steps."""

    def __init__(self, parts: PageParts, say: Callable[[PartsTold], None]) -> None:
        self._parts = parts
        self._say = say
        # As on rank 0: what is read does not wait for what is written.
        self._reader = ThreadPoolExecutor(1, "kv-reads")
        self._writer = ThreadPoolExecutor(1, "kv-writes")

    def take(self, task: PartsTask) -> None:
        """Begin with it; how it ends is told from a thread."""
        thread = self._writer if task.action == "write" else self._reader
        thread.submit(self._do, task)

    def close(self) -> None:
        for thread in (self._reader, self._writer):
            thread.shutdown(wait=False, cancel_futures=True)

    def _do(self, task: PartsTask) -> None:
        count, failure = 0, None
        try:
            count = self._carried_out(task)
        except SapwoodError as error:
            failure = error.message
        except StorageUnavailable as error:
            failure = str(error)
        except Exception as error:  # noqa: BLE001 - rank 0 waits for an answer, and says it
            failure = f"{type(error).__name__}: {error}"
        self._say(PartsTold(number=task.number, count=count, failure=failure))

    def _carried_out(self, task: PartsTask) -> int:
        match task.action:
            case "open":
                self._parts.open(task.backend, task.extra)
            case "count":
                return self._parts.count(task.names)
            case "read":
                return self._parts.read(_places(task))
            case "write":
                return self._parts.write(_places(task))
            case "clear":
                self._parts.clear()
            case "close":
                self._parts.close()
        return 0


def _places(task: PartsTask) -> list[Place]:
    told = zip(task.names, task.pools, task.slots, strict=True)
    return [Place(name, pool, slot) for name, pool, slot in told]

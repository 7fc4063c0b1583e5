"""A storage behind simulated ranks, whose calls end when a script says, or fail."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from random import Random
from typing import Any

from sapwood.memory.storage.interface import StorageUnavailable
from sapwood.memory.storage.parts import Place
from tests.engine.simulation import SimulatedRank


class SimulatedParts:
    """A PageParts that keeps what simulated ranks have in their host slots.

    It reads and writes slots at once, whatever plans are still to be executed, as a thread would.
    What it keeps may be shared by engines, and some of it goes, as from a directory with a limit.
    """

    def __init__(
        self, ranks: Sequence[SimulatedRank], kept: dict[str, list[Any]], random: Random
    ) -> None:
        self._ranks = ranks
        self._random = random
        self.kept = kept
        self.page_bytes = [1] * len(ranks[0]._host)

    def open(self, backend: str, extra: Mapping[str, Any]) -> None:
        pass

    def count(self, names: Sequence[str]) -> int:
        self._may_fail()
        return next((at for at, name in enumerate(names) if name not in self.kept), len(names))

    def read(self, places: Sequence[Place]) -> int:
        self._may_fail()
        for at, place in enumerate(places):
            found = self.kept.get(place.name)
            if found is None or self._random.random() < 0.03:
                self.kept.pop(place.name, None)
                return at
            for rank, content in zip(self._ranks, found, strict=True):
                rank._host[place.pool][place.slot] = copy(content)
        return len(places)

    def write(self, places: Sequence[Place]) -> int:
        self._may_fail()
        for place in places:
            content = [copy(rank._host[place.pool][place.slot]) for rank in self._ranks]
            assert None not in content, "a slot was written that was never filled"
            known = self.kept.setdefault(place.name, content)
            assert known == content, "two contents of one name"
        return len(places)

    def clear(self) -> None:
        self.kept.clear()

    def close(self) -> None:
        pass

    def _may_fail(self) -> None:
        if self._random.random() < 0.01:
            raise StorageUnavailable("the server is gone")


class ScriptedWorker:
    """A StorageWorker whose calls are done some turns later."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self._calls: deque[Callable[[], Callable[[], None]]] = deque()

    @property
    def num_open(self) -> int:
        return len(self._calls)

    def do(
        self,
        call: Callable[[], Any],
        then: Callable[[Any], None],
        fail: Callable[[Exception], None],
    ) -> None:
        def work() -> Callable[[], None]:
            try:
                result = call()
            except StorageUnavailable as error:
                failure = error
                return lambda: fail(failure)
            return lambda: then(result)

        self._calls.append(work)

    def finish(self) -> None:
        while self._calls and self._random.random() < 0.6:
            self._calls.popleft()()()

    def close(self, timeout_s: float) -> None:
        """As a thread that is stuck: what is open is never done."""

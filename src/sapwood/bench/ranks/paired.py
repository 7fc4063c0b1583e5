"""Times two ways to do the same, in turn, so that a busy machine slows both down alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import msgspec

Act = Callable[[], object]


class Paired(msgspec.Struct, frozen=True):
    """Seconds of one call each way, by turn.

    num_rows  of each rank
    """

    num_rows: int
    own_s: list[float]
    other_s: list[float]

    @property
    def own(self) -> float:
        return statistics.median(self.own_s)

    @property
    def other(self) -> float:
        return statistics.median(self.other_s)

    @property
    def ratios(self) -> list[float]:
        """How many times as long the other way takes, by turn."""
        return [other / own for other, own in zip(self.other_s, self.own_s, strict=True)]


def time_in_turn(
    num_rows: int, own: Act, other: Act, *, meet: Act, turns: int, calls: int
) -> Paired:
    """Both ways `turns` times, of which each is `calls` calls; all ranks call it at once.

    meet  waits for the other ranks, so that none waits within what is timed
    """
    taken: dict[Act, list[float]] = {own: [], other: []}
    for turn in range(-1, turns):  # the first turn warms up
        for act in (own, other) if turn % 2 else (other, own):
            meet()
            begin = time.perf_counter()
            for _ in range(calls):
                act()
            if turn >= 0:
                taken[act].append((time.perf_counter() - begin) / calls)
    return Paired(num_rows, taken[own], taken[other])

"""Counting into buckets, cheaply enough for every token. No locks: one thread writes and reads."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from itertools import accumulate


class Histogram:
    """Counts observations in buckets.

    A bucket holds the observations above the bound before it and not above its own; the last bucket
    holds all that are larger than every bound.
    """

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    def cumulative(self) -> list[tuple[str, float]]:
        """(upper bound, number of observations up to it), as Prometheus wants them; "+Inf" last."""
        so_far = 0
        rows: list[tuple[str, float]] = []
        for bound, count in zip((*self.bounds, math.inf), self.counts, strict=True):
            so_far += count
            rows.append((bound_text(bound), so_far))
        return rows


def bound_text(bound: float) -> str:
    return "+Inf" if bound == math.inf else repr(float(bound))


def distribution(values: Sequence[float], bounds: Sequence[float]) -> list[tuple[str, str, int]]:
    """(lower bound, upper bound, number of values between them), for heat maps.

    Unlike Prometheus's buckets these do not include the smaller ones.
    """
    edges = (-math.inf, *bounds, math.inf)
    counts = [0] * (len(edges) - 1)
    for value in values:
        counts[bisect_left(edges, value, 1) - 1] += 1
    texts = ["-Inf", *(bound_text(edge) for edge in edges[1:])]
    return [(texts[i], texts[i + 1], count) for i, count in enumerate(counts)]


class LatencyWindow:
    """Percentiles of the latest durations, to within 2.5%, from 10 microseconds to 20 minutes.

    Observations are counted in buckets that grow by 5%. `tick` marks a moment; observations older
    than the last `num_ticks` moments count no longer.
    """

    _SMALLEST_S = 1e-5
    _GROWTH = math.log(1.05)
    _NUM_BUCKETS = 382

    def __init__(self, num_ticks: int) -> None:
        self._counts = [0] * self._NUM_BUCKETS
        self._marks: deque[list[int]] = deque([list(self._counts)], maxlen=num_ticks)

    def observe(self, seconds: float, times: int = 1) -> None:
        if seconds <= self._SMALLEST_S:
            self._counts[0] += times
            return
        index = int(math.log(seconds / self._SMALLEST_S) / self._GROWTH) + 1
        self._counts[min(index, self._NUM_BUCKETS - 1)] += times

    def tick(self) -> None:
        self._marks.append(list(self._counts))

    def percentiles(self, wanted: Sequence[float]) -> list[float | None]:
        """The percentiles in seconds; None for each if nothing was observed.

        wanted  fractions between 0 and 1
        """
        recent = [now - then for now, then in zip(self._counts, self._marks[0], strict=True)]
        total = sum(recent)
        if total == 0:
            return [None] * len(wanted)
        return [self._value_at(recent, share * total) for share in wanted]

    def _value_at(self, counts: list[int], rank: float) -> float:
        index = bisect_left(list(accumulate(counts)), rank)
        return self._SMALLEST_S * math.exp(self._GROWTH * max(index - 0.5, 0.0))

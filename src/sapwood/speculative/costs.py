"""What a step costs, by its new tokens: measured when the engine starts, corrected as it runs."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import accumulate
from statistics import median

FIRST_SHARE = 0.25
"""Until steps are measured: what a token more costs, as a share of a step with one token."""
NUM_KEPT = 9
"""Measurements per size, of which the median counts: one step may wait for another process."""
STALE_AFTER = 512
"""Measurements of other sizes after which a size counts as not measured."""
EXACT_UP_TO = 8
"""Steps of more tokens are taken together, in four classes per doubling."""


class StepCosts:
    """Seconds that a step takes, as a function of its requests and its new tokens.

    The times before the first request give the shape of this function. Each later step corrects it:
    the ratio between its time and the shape's counts for steps of its size, and by interpolation
    for others; apart for few and for many requests, whose attention reads different amounts.
    """

    def __init__(self, measured_s: Mapping[int, float] = {}) -> None:
        """measured_s  seconds of a step of one request, by its new tokens; may be empty"""
        self._sizes = sorted(measured_s)
        self._seconds = _rising([measured_s[size] for size in self._sizes])
        self._corrections: dict[int, dict[int, _Ratios]] = {}
        self._num_observed = 0

    def observe(self, num_requests: int, num_tokens: int, seconds: float) -> None:
        """A step took that long; it computed no prompts."""
        if seconds <= 0.0:  # the clock is too coarse
            return
        self._num_observed += 1
        of_class = self._corrections.setdefault(num_requests.bit_length(), {})
        ratios = of_class.setdefault(_size_class(num_tokens), _Ratios())
        ratios.add(num_tokens, seconds / self._shape(num_tokens), self._num_observed)

    def by_tokens(self, num_requests: int, first: int, last: int) -> list[float]:
        """Seconds of steps with first .. last tokens; a larger step never costs less."""
        known = sorted(
            (ratios.num_tokens, ratios.ratio)
            for ratios in self._corrections.get(num_requests.bit_length(), {}).values()
            if self._num_observed - ratios.last < STALE_AFTER
        )
        return _rising(
            [self._shape(size) * _between(known, size) for size in range(first, last + 1)]
        )

    def _shape(self, num_tokens: int) -> float:
        if not self._sizes:
            return 1.0 + FIRST_SHARE * (num_tokens - 1)
        if num_tokens > self._sizes[-1]:
            # Larger steps were not measured: each token costs as much as those before.
            return self._seconds[-1] * num_tokens / self._sizes[-1]
        at = bisect_left(self._sizes, num_tokens)
        if self._sizes[at] == num_tokens or at == 0:
            return self._seconds[at]
        pairs = list(zip(self._sizes[at - 1 : at + 1], self._seconds[at - 1 : at + 1], strict=True))
        return _between(pairs, num_tokens)


class _Ratios:
    """Measured times of one size class beside the shape's."""

    def __init__(self) -> None:
        self._kept: deque[tuple[int, float]] = deque(maxlen=NUM_KEPT)
        self.last = 0
        self.num_tokens = 0.0
        self.ratio = 1.0

    def add(self, num_tokens: int, ratio: float, now: int) -> None:
        self._kept.append((num_tokens, ratio))
        self.last = now
        self.num_tokens = sum(size for size, _ in self._kept) / len(self._kept)
        self.ratio = median(ratio for _, ratio in self._kept)


def _rising(costs: list[float]) -> list[float]:
    """A larger step never costs less: what waited for others is measured too long, never too
    short."""
    return list(accumulate(reversed(costs), min))[::-1]


def _size_class(num_tokens: int) -> int:
    if num_tokens <= EXACT_UP_TO:
        return num_tokens
    # Kernels take rows in tiles of 16 or 32: a class ends with a full tile.
    step = 1 << ((num_tokens - 1).bit_length() - 3)
    return (num_tokens - 1) // step * step


def _between(points: Sequence[tuple[float, float]], at: float) -> float:
    """The value of the line through sorted (place, value) points; constant beyond; 1.0 if none."""
    if not points:
        return 1.0
    index = bisect_left(points, (at, 0.0))
    if index == 0:
        return points[0][1]
    if index == len(points):
        return points[-1][1]
    (left, low), (right, high) = points[index - 1], points[index]
    return low + (high - low) * (at - left) / (right - left)

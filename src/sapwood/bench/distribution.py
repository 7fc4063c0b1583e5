"""Summaries of many measured values."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """The distribution of one metric over requests or tokens, in the metric's unit."""

    count: int
    mean: float
    median: float
    p95: float
    p99: float
    minimum: float
    maximum: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self | None:
        """The distribution of these values; None if there are none."""
        if not values:
            return None
        ordered = sorted(values)
        return cls(
            count=len(ordered),
            mean=statistics.fmean(ordered),
            median=percentile(ordered, 50),
            p95=percentile(ordered, 95),
            p99=percentile(ordered, 99),
            minimum=ordered[0],
            maximum=ordered[-1],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """A figure over several repeats: its median, and the extremes, which show how steady it is."""

    count: int
    median: float
    minimum: float
    maximum: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """The spread of these values; ValueError if there are none."""
        if not values:
            raise ValueError("a spread needs at least one value")
        return cls(
            count=len(values),
            median=statistics.median(values),
            minimum=min(values),
            maximum=max(values),
        )


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The value below which `percent` of the ascending values lie, interpolated linearly."""
    position = (len(ordered) - 1) * percent / 100
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)

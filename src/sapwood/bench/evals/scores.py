"""What a score is worth: intervals, and the difference of two servers on the same questions.

Source: Miller 2024, "Adding error bars to evals": differences are taken question by question, which
removes what makes some questions harder than others; Wilson 1927 for shares near 0 and 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Z = 1.959964
"""Standard errors on either side of a 95% interval."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with its 95% interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f} to {self.high:.3f}]"


def score_of(scores: Sequence[float]) -> Interval:
    """The mean of scores from 0 to 1, with Wilson's interval, which stays within 0 and 1."""
    count = len(scores)
    mean = sum(scores) / count
    middle = (mean + Z * Z / (2 * count)) / (1 + Z * Z / count)
    half = Z * math.sqrt(mean * (1 - mean) / count + Z * Z / (4 * count * count))
    half /= 1 + Z * Z / count
    return Interval(mean, max(0.0, middle - half), min(1.0, middle + half))


@dataclass(frozen=True, slots=True)
class Difference:
    """One run minus another on the questions that both had.

    better, worse  questions on which the first scored more, and less
    """

    interval: Interval
    num_questions: int
    better: int
    worse: int

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.interval.low > 0 or self.interval.high < 0


def difference(one: Mapping[str, float], other: Mapping[str, float]) -> Difference | None:
    """The paired difference of scores by question; None: fewer than two questions are common.

    Where a run asked a question several times, its score is the mean of the answers."""
    names = [name for name in one if name in other]
    count = len(names)
    if count < 2:
        return None
    gaps = [one[name] - other[name] for name in names]
    mean = sum(gaps) / count
    error = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / (count - 1) / count)
    return Difference(
        interval=Interval(mean, mean - Z * error, mean + Z * error),
        num_questions=count,
        better=sum(gap > 0 for gap in gaps),
        worse=sum(gap < 0 for gap in gaps),
    )

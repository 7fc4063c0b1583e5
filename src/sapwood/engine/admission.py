"""How much of the pool admission keeps back for requests that are still growing.

If every running request were to use all its output tokens at once, few could run together; most end
early and at different times. So admission reserves a share of the outstanding output tokens that
falls slowly while all goes well, and rises again when a request had to be retracted.
"""

from __future__ import annotations

INITIAL_RATIO = 0.7
LEAST_RATIO = 0.1
STEPS_TO_LEAST = 600


class OutputReserve:
    """The share of outstanding output tokens that admission reserves."""

    def __init__(self, conservativeness: float) -> None:
        self._initial = min(INITIAL_RATIO * conservativeness, 1.0)
        self._least = min(LEAST_RATIO * conservativeness, 1.0)
        self._fall = (self._initial - self._least) / STEPS_TO_LEAST
        self.ratio = self._initial

    def after_step(self) -> None:
        self.ratio = max(self.ratio - self._fall, self._least)

    def after_retraction(self) -> None:
        self.ratio = self._initial

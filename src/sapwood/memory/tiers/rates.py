"""What it costs to bring a page back, beside what it costs to compute its tokens."""

from __future__ import annotations

SHARE_OF_NEW = 0.3
"""What the newest measurement counts."""
TRY_AGAIN = 16
"""A tier that was too slow is asked once in so many times: it may be quicker by now."""


class Rate:
    """Seconds per unit, measured; None until then."""

    def __init__(self) -> None:
        self.unit_s: float | None = None

    def add(self, units: float, seconds: float) -> None:
        if units <= 0 or seconds <= 0.0:
            return
        new = seconds / units
        old = new if self.unit_s is None else self.unit_s
        self.unit_s = old + SHARE_OF_NEW * (new - old)


class CostRule:
    """Whether a tier brings tokens back sooner than a step computes them.

    byte_s   of the tier
    token_s  of prompts in steps
    """

    def __init__(self, byte: Rate, token: Rate) -> None:
        self.byte = byte
        self.token = token
        self._num_declined = 0

    def pays(self, num_bytes: int, num_tokens: int) -> bool:
        """True also while too little was measured."""
        if self.byte.unit_s is None or self.token.unit_s is None:
            return True
        if num_bytes * self.byte.unit_s <= num_tokens * self.token.unit_s:
            return True
        self._num_declined += 1
        return self._num_declined % TRY_AGAIN == 0

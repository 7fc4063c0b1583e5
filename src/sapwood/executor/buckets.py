"""Sizes that steps are captured for. A step takes the smallest that it fits into, and is padded."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from sapwood.base.errors import ConfigError

PER_DOUBLING = 4
FIRST_SIZES = (1, 2, 4, 8)
SMALLEST_PREFILL = 64
PREFILL_PER_DOUBLING = 2


def decode_sizes(largest: int) -> tuple[int, ...]:
    """Requests: a step is padded by a quarter at most, from eight on. `largest` is one of them."""
    return _sizes([size for size in FIRST_SIZES if size < largest], 8, largest, PER_DOUBLING)


def prefill_sizes(largest: int) -> tuple[int, ...]:
    """Tokens: what computes a few dozen costs as little as one that computes a single one."""
    return _sizes([], SMALLEST_PREFILL, largest, PREFILL_PER_DOUBLING)


def _sizes(first: list[int], start: int, largest: int, per_doubling: int) -> tuple[int, ...]:
    sizes = first
    base = start
    while base < largest:
        step = max(1, base // per_doubling)
        sizes += [size for size in range(base, 2 * base, step) if size < largest]
        base *= 2
    return tuple(sorted({*sizes, largest}))


def parse_sizes(text: str, *, flag: str) -> tuple[int, ...]:
    """ "1,2,4" -> the sizes, in order; ConfigError if they are not whole numbers >= 1."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ConfigError(f"{flag} is {text!r} but must be sizes with commas, like 1,2,4,8")
    return tuple(sorted({int(part) for part in parts}))


def smallest_that_holds(sizes: Sequence[int], wanted: int) -> int | None:
    """sizes ascending; None if all are smaller than `wanted`."""
    index = bisect_left(sizes, wanted)
    return sizes[index] if index < len(sizes) else None

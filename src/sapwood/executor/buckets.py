"""Sizes for which steps are captured. A step is padded to the smallest size that holds it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from sapwood.base.errors import ConfigError

PER_DOUBLING = 4
FIRST_SIZES = (1, 2, 4, 8)
SMALLEST_PREFILL = 64
PREFILL_PER_DOUBLING = 2


def decode_sizes(largest: int) -> tuple[int, ...]:
    """Numbers of requests up to `largest`; from eight on, padding adds at most a quarter."""
    return _sizes([size for size in FIRST_SIZES if size < largest], 8, largest, PER_DOUBLING)


def prefill_sizes(largest: int) -> tuple[int, ...]:
    """Numbers of tokens; a step of a few dozen tokens costs as little as a step of one."""
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
    """The smallest of the ascending sizes that is at least `wanted`; None if all are smaller."""
    index = bisect_left(sizes, wanted)
    return sizes[index] if index < len(sizes) else None

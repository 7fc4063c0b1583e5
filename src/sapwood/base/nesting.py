"""How deeply JSON is nested. Whoever walks it by calling himself has to know before."""

from __future__ import annotations

from collections.abc import Mapping


def is_deeper(value: object, levels: int) -> bool:
    """Whether there are more than so many levels of lists and objects inside one another.

    Goes level by level, so that no depth is too deep for this function itself."""
    level = [value] if isinstance(value, Mapping | list) else []
    for _ in range(levels):
        level = [
            item
            for held in level
            for item in (held.values() if isinstance(held, Mapping) else held)
            if isinstance(item, Mapping | list)
        ]
        if not level:
            return False
    return bool(level)

"""What `make test` runs of a sweep, and what only `make test-long` runs (docs/testing.md)."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import combinations, product
from typing import Any

import pytest
from hypothesis import settings

LONG_EXAMPLES = 500
"""Of a property without a number of its own, in the profile `long`."""
MARK_OF_USUAL = "not long"
"""What `make test` selects by."""

_makes_long = True


def leave_out_long(selected: str) -> None:
    """Let sweeps make no long cases, if marks are `selected` such that none would be run: pytest
    makes an object for each case before it selects, and there are as many long ones as others."""
    global _makes_long
    _makes_long = selected != MARK_OF_USUAL


def load_profiles() -> None:
    """Hypothesis' profiles: `ci`, the default, tries an eighth of what `long` does.

    No deadlines: a machine that is busy with other tests is no defect.
    """
    settings.register_profile("ci", max_examples=LONG_EXAMPLES // 8, deadline=None)
    settings.register_profile("long", max_examples=LONG_EXAMPLES, deadline=None)
    settings.load_profile("ci")


def examples(long: int, usual: int | None = None) -> int:
    """`max_examples` of a property that wants `long` of them in the profile `long`, and elsewhere
    `usual`, or a part as in the profile."""
    if usual is not None and settings().max_examples < LONG_EXAMPLES:
        return usual
    return max(1, long * settings().max_examples // LONG_EXAMPLES)


def sweep(
    *, strength: int = 2, indirect: Sequence[str] = (), **axes: Sequence[Any]
) -> pytest.MarkDecorator:
    """`parametrize` with every combination of the axes' values, by argument name.

    Of these `make test` runs so many that any values of `strength` axes occur together in one of
    them: with 2 each pair of values, with 1 each value. The other combinations are long.

    indirect  arguments that are names of fixtures, which get the value as `request.param`
    """
    combinations_ = list(product(*(range(len(values)) for values in axes.values())))
    chosen = _covering(combinations_, strength)
    cases = []
    for combination in combinations_:
        if not (_makes_long or combination in chosen):
            continue
        values = [axis[at] for axis, at in zip(axes.values(), combination, strict=True)]
        marks = () if combination in chosen else pytest.mark.long
        cases.append(pytest.param(*values, marks=marks, id="-".join(map(_name, values))))
    return pytest.mark.parametrize(list(axes), cases, indirect=list(indirect))


def long_only(*values: Any) -> list[Any]:
    """Values of one argument that `make test` leaves out: `[1, 8, *long_only(2, 3, 4)]`."""
    made = values if _makes_long else ()
    return [pytest.param(value, marks=pytest.mark.long) for value in made]


def _covering(cases: Sequence[tuple[int, ...]], strength: int) -> set[tuple[int, ...]]:
    """Cases in which each selection of `strength` entries of any case occurs: greedily, whichever
    has the most that are new, the first one of several."""
    parts = [frozenset(combinations(enumerate(case), min(strength, len(case)))) for case in cases]
    covered: set[tuple[tuple[int, int], ...]] = set()
    chosen: set[tuple[int, ...]] = set()
    # What is new of a case only becomes less, so the first entry that is up to date has the most.
    queue = [(-len(part), at) for at, part in enumerate(parts)]
    heapq.heapify(queue)
    while queue:
        noted, at = heapq.heappop(queue)
        new = parts[at] - covered
        if len(new) == -noted:
            chosen.add(cases[at])
            covered |= new
        elif new:
            heapq.heappush(queue, (-len(new), at))
    return chosen


def _name(value: Any) -> str:
    return str(value).removeprefix("torch.")

"""What `make test` runs of a sweep, and what only `make test-long` runs (docs/testing.md)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, product
from typing import Any

import pytest
from hypothesis import settings

LONG_EXAMPLES = 500
"""Of a property without a number of its own, in the profile `long`."""


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
        values = [axis[at] for axis, at in zip(axes.values(), combination, strict=True)]
        marks = () if combination in chosen else pytest.mark.long
        cases.append(pytest.param(*values, marks=marks, id="-".join(map(_name, values))))
    return pytest.mark.parametrize(list(axes), cases, indirect=list(indirect))


def long_only(*values: Any) -> list[Any]:
    """Values of one argument that `make test` leaves out: `[1, 8, *long_only(2, 3, 4)]`."""
    return [pytest.param(value, marks=pytest.mark.long) for value in values]


def _covering(cases: Sequence[tuple[int, ...]], strength: int) -> set[tuple[int, ...]]:
    """Cases in which each selection of `strength` entries of any case occurs: greedily, whichever
    has the most that are new, the first one of several."""

    def parts(case: tuple[int, ...]) -> set[tuple[tuple[int, int], ...]]:
        return set(combinations(enumerate(case), min(strength, len(case))))

    missing = {case: parts(case) for case in cases}
    chosen: set[tuple[int, ...]] = set()
    while missing:
        best = max(missing, key=lambda case: len(missing[case]))
        covered = missing.pop(best)
        chosen.add(best)
        for case in list(missing):
            missing[case] -= covered
            if not missing[case]:
                del missing[case]
    return chosen


def _name(value: Any) -> str:
    return str(value).removeprefix("torch.")

"""What `make test` leaves out of a sweep: no value, and no pair of values."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiers import MARK_OF_USUAL, examples, leave_out_long, long_only, sweep

AXES = {"isa": ["generic", "avx2", "amx"], "rows": [1, 2, 7, 130], "bias": [True, False]}


@pytest.fixture(scope="module", autouse=True)
def _long_cases(request: pytest.FixtureRequest) -> Iterator[None]:
    """Long cases are made, as when they are run."""
    leave_out_long("")
    yield
    leave_out_long(request.config.option.markexpr)


def short_cases(mark: pytest.MarkDecorator) -> list[tuple[object, ...]]:
    _, cases = mark.args
    return [case.values for case in cases if not case.marks]


def test_any_two_values_meet_in_a_short_case() -> None:
    mark = sweep(**AXES)
    names, cases = mark.args
    assert names == list(AXES)
    assert len({case.values for case in cases}) == 3 * 4 * 2
    short = short_cases(mark)
    assert len(short) == 3 * 4  # no fewer than the two largest axes take
    for one, other in combinations(range(3), 2):
        met = {(case[one], case[other]) for case in short}
        assert len(met) == len(list(AXES.values())[one]) * len(list(AXES.values())[other])


def test_with_strength_1_each_value_occurs() -> None:
    short = short_cases(sweep(strength=1, **AXES))
    assert len(short) == 4
    for index, values in enumerate(AXES.values()):
        assert {case[index] for case in short} == set(values)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(1, 5))
def test_any_axes_are_covered(sizes: list[int], strength: int) -> None:
    axes = {f"axis{index}": list(range(size)) for index, size in enumerate(sizes)}
    mark = sweep(strength=strength, **axes)
    whole, short = [case.values for case in mark.args[1]], short_cases(mark)
    for places in combinations(range(len(sizes)), min(strength, len(sizes))):
        assert {tuple(case[at] for at in places) for case in short} == {
            tuple(case[at] for at in places) for case in whole
        }


def test_a_sweep_over_nothing_has_no_cases() -> None:
    """As over the instruction sets of a build without native kernels."""
    assert sweep(isa=[], rows=[1, 2]).args[1] == []


def test_values_that_only_the_long_run_takes_are_marked() -> None:
    [two, three] = long_only(2, 3)
    assert (two.values, three.values) == ((2,), (3,))
    assert [mark.name for mark in two.marks] == ["long"]


def test_where_no_long_case_would_be_run_none_is_made() -> None:
    short = short_cases(sweep(**AXES))
    leave_out_long(MARK_OF_USUAL)
    try:
        made = [case.values for case in sweep(**AXES).args[1]]
        assert (made, long_only(2, 3)) == (short, [])
    finally:
        leave_out_long("")


def test_the_profile_decides_on_examples() -> None:
    before = settings.get_current_profile_name()
    try:
        settings.load_profile("long")
        assert (settings().max_examples, examples(1000)) == (500, 1000)
        settings.load_profile("ci")
        assert (settings().max_examples, examples(1000), examples(1)) == (62, 124, 1)
    finally:
        settings.load_profile(before)

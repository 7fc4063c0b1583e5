from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sapwood.base.errors import ConfigError
from sapwood.memory.sizing import MARGIN, MemoryUse, size_pool

GIB = 2**30


def use(total: int = 140, free: int = 120, step: int = 4, graphs: int = 2) -> MemoryUse:
    """In GiB."""
    return MemoryUse(
        total_bytes=total * GIB,
        free_bytes=free * GIB,
        step_bytes=step * GIB,
        graph_bytes=graphs * GIB,
    )


def pages_of(page_bytes: int) -> dict[str, Callable[[int], int]]:
    return {
        "pages_in": lambda num_bytes: num_bytes // page_bytes,
        "bytes_of": lambda num_pages: num_pages * page_bytes,
    }


@given(
    st.integers(1, 200),
    st.integers(0, 200),
    st.integers(0, 20),
    st.integers(0, 5),
    st.sampled_from([2**16, 2**20, 7 * 2**20]),
    st.none() | st.floats(0.05, 0.99),
)
def test_pool_step_and_graphs_fit_together(
    total: int, free: int, step: int, graphs: int, page_bytes: int, fraction: float | None
) -> None:
    facts = use(total, min(free, total), step, graphs)
    try:
        size = size_pool(facts, **pages_of(page_bytes), mem_fraction_static=fraction)
    except ConfigError:
        most = facts.most_pool_bytes
        if fraction is not None:
            most = min(most, int(facts.total_bytes * fraction) - facts.used_bytes)
        assert most < page_bytes
        return
    pool = size.num_pages * page_bytes
    margin = int(facts.total_bytes * MARGIN)
    assert pool + facts.step_bytes + facts.graph_bytes + margin <= facts.free_bytes
    if fraction is not None:
        assert facts.used_bytes + pool <= fraction * facts.total_bytes
    # One page more would not have fitted.
    more = pool + page_bytes
    is_full = more + facts.step_bytes + facts.graph_bytes + margin > facts.free_bytes
    over_fraction = fraction is not None and facts.used_bytes + more > int(
        facts.total_bytes * fraction
    )
    assert is_full or over_fraction


def test_the_reason_names_the_limit() -> None:
    by_fraction = size_pool(use(), **pages_of(2**20), mem_fraction_static=0.5)
    assert by_fraction.num_pages == 50 * 1024
    assert by_fraction.why.startswith("--mem-fraction-static: of 140.00 GiB, 20.00 GiB are in use")
    by_step = size_pool(use(), **pages_of(2**20), mem_fraction_static=0.99)
    assert by_step.why.startswith("what the largest step leaves")
    assert by_step.num_pages == size_pool(use(), **pages_of(2**20)).num_pages


def test_what_is_asked_for_is_given_or_refused() -> None:
    assert size_pool(use(), **pages_of(2**20), wanted_pages=77).num_pages == 77
    with pytest.raises(ConfigError, match=r"takes 200\.00 GiB of KV but 111\.20 GiB are left"):
        size_pool(use(), **pages_of(2**20), wanted_pages=200 * 1024)

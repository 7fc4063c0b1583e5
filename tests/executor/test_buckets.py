from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sapwood.base.errors import ConfigError
from sapwood.executor.buckets import (
    decode_sizes,
    parse_sizes,
    prefill_sizes,
    smallest_that_holds,
)


@given(st.integers(1, 5000))
def test_decodes_are_padded_by_a_quarter_at_most(largest: int) -> None:
    sizes = decode_sizes(largest)
    assert sizes == tuple(sorted(set(sizes)))
    assert (sizes[0], sizes[-1]) == (1, largest)
    for wanted in range(8, largest + 1):
        size = smallest_that_holds(sizes, wanted)
        assert size is not None
        assert wanted <= size < 1.25 * wanted + 1


@given(st.integers(1, 20000))
def test_prefills_are_padded_by_half_at_most(largest: int) -> None:
    sizes = prefill_sizes(largest)
    assert sizes[-1] == largest
    assert len(sizes) < 20
    for wanted in range(64, largest + 1, 7):
        size = smallest_that_holds(sizes, wanted)
        assert size is not None
        assert wanted <= size <= 1.5 * wanted


def test_what_fits_into_none() -> None:
    assert smallest_that_holds((1, 4), 5) is None
    assert smallest_that_holds((), 1) is None
    assert smallest_that_holds((1, 4), 4) == 4


def test_sizes_as_text() -> None:
    assert parse_sizes("8, 1,2,2", flag="--cuda-graph-bs") == (1, 2, 8)
    for text in ("", "1,,2", "0", "-3", "a"):
        with pytest.raises(ConfigError, match=r"--cuda-graph-bs is '.*' but must be sizes"):
            parse_sizes(text, flag="--cuda-graph-bs")

from __future__ import annotations

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sapwood.base.errors import InvalidRequest
from sapwood.http.body import MAX_DEPTH, parse_object


def nested(depth: int) -> bytes:
    """An object with arrays inside one another, `depth` containers in all."""
    return b'{"a":' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"


def test_depth_is_counted_exactly():
    assert parse_object(nested(MAX_DEPTH))
    with pytest.raises(InvalidRequest, match="nested deeper than 100"):
        parse_object(nested(MAX_DEPTH + 1))


def test_brackets_in_texts_and_neighbours_are_no_depth():
    assert parse_object(orjson.dumps({"a": "[" * 500, "b": [[] for _ in range(500)]}))


@given(st.binary(max_size=60))
def test_any_bytes_give_an_object_or_a_refusal(raw):
    try:
        expected = orjson.loads(raw)
    except orjson.JSONDecodeError:
        expected = None
    if isinstance(expected, dict):
        assert parse_object(raw) == expected
    else:
        with pytest.raises(InvalidRequest, match="body"):
            parse_object(raw)

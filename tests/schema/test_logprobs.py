from __future__ import annotations

import struct

import msgspec
import pytest

from sapwood.base.errors import InvalidRequest
from sapwood.schema.limits import LOGPROB_TOKEN_IDS
from sapwood.schema.logprobs import (
    MAX_TOP_LOGPROBS,
    LogprobOptions,
    TokenLogprobs,
)


def make(first: int, count: int) -> TokenLogprobs:
    """Positions first, first + 1, …: -p for the token, two likeliest, three tokens asked for."""
    positions = range(first, first + count)
    return TokenLogprobs(
        tokens=struct.pack(f"<{count}f", *(-p for p in positions)),
        top_ids=struct.pack(f"<{2 * count}i", *(i for p in positions for i in (p, p + 100))),
        top=struct.pack(f"<{2 * count}f", *(v for p in positions for v in (-0.5, -p))),
        chosen=struct.pack(f"<{3 * count}f", *(v for p in positions for v in (-1, -2, -p))),
    )


def test_what_was_packed_is_read() -> None:
    one = make(3, 2)
    assert len(one) == 2
    assert one.of_tokens() == (-3.0, -4.0)
    assert one.of_likeliest() == [[(-0.5, 3), (-3.0, 103)], [(-0.5, 4), (-4.0, 104)]]
    assert one.of_chosen() == [[-1.0, -2.0, -3.0], [-1.0, -2.0, -4.0]]


def test_parts_of_it_and_joined_parts() -> None:
    whole = make(0, 7)
    assert whole[2:5] == make(2, 3)
    assert TokenLogprobs.joined([whole[:3], whole[3:4], whole[4:]]) == whole
    assert len(whole[7:]) == 0
    assert whole[7:].of_likeliest() == whole[7:].of_chosen() == []


def test_only_tokens() -> None:
    bare = TokenLogprobs(tokens=struct.pack("<2f", -1, -2))
    assert bare.of_likeliest() == bare.of_chosen() == [[], []]
    assert bare[1:].of_tokens() == (-2.0,)


def test_a_token_costs_a_few_bytes_on_the_wire() -> None:
    bare = TokenLogprobs(tokens=bytes(4 * 1000))
    assert len(msgspec.msgpack.encode(bare)) < 4020


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt_start": -1}, "prompt_start"),
        ({"num_top": -1}, "num_top"),
        ({"num_top": MAX_TOP_LOGPROBS + 1}, "num_top"),
        ({"token_ids": (0,) * (LOGPROB_TOKEN_IDS.most + 1)}, "token_ids"),
    ],
)
def test_options_out_of_range_are_named(fields: dict[str, object], param: str) -> None:
    with pytest.raises(InvalidRequest, match=param) as caught:
        LogprobOptions(**fields)  # type: ignore[arg-type]
    assert caught.value.param == param

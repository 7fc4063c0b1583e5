"""Which headers go on, and which stay."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sapwood.gateway.headers import MAX_ID_BYTES, request_head, request_id, returned


def head(headers: list[tuple[bytes, bytes]], **changes: object) -> bytes:
    options = {
        "host": b"worker:1",
        "headers": headers,
        "extra": [],
        "num_body_bytes": 3,
        "own_key": None,
        "pass_key": True,
    }
    return request_head("POST", b"/x?y", **(options | changes))  # type: ignore[arg-type]


def test_a_request_has_one_host_and_one_length() -> None:
    sent = head([(b"host", b"gateway"), (b"content-length", b"9"), (b"x-a", b"b")])
    assert sent == (b"POST /x?y HTTP/1.1\r\nhost: worker:1\r\nx-a: b\r\ncontent-length: 3\r\n\r\n")


@pytest.mark.parametrize(
    "name",
    [b"connection", b"keep-alive", b"te", b"transfer-encoding", b"upgrade", b"cookie", b"origin"],
)
def test_what_belongs_to_one_connection_stays_there(name: bytes) -> None:
    assert name + b":" not in head([(name, b"x")])


def test_headers_that_the_connection_header_names_stay_too() -> None:
    headers = [(b"connection", b"close, X-One"), (b"x-one", b"1"), (b"x-two", b"2")]
    assert b"x-one" not in head(headers)
    assert b"x-two: 2" in head(headers)
    assert returned(headers, b"id") == [(b"x-two", b"2"), (b"x-request-id", b"id")]


@pytest.mark.parametrize(
    ("own_key", "pass_key", "sent"),
    [
        (None, True, b"authorization: Bearer client\r\nx-api-key: client"),
        (None, False, b""),
        ("own", True, b"authorization: Bearer own"),
        ("own", False, b"authorization: Bearer own"),
    ],
)
def test_who_gets_which_key(own_key: str | None, pass_key: bool, sent: bytes) -> None:
    keys = [(b"authorization", b"Bearer client"), (b"x-api-key", b"client")]
    written = head(keys, own_key=own_key, pass_key=pass_key)
    assert sent in written
    assert written.count(b"client") == sent.count(b"client")


names = st.sampled_from([b"x-a", b"x-b", b"connection", b"te", b"host", b"content-length"])
values = st.sampled_from([b"", b"x-a", b"close", b"x-a,x-b", b"7"])


@given(st.lists(st.tuples(names, values), max_size=12))
def test_no_header_can_add_a_length_or_a_host(headers: list[tuple[bytes, bytes]]) -> None:
    lines = head(headers).split(b"\r\n")
    assert sum(line.startswith(b"host:") for line in lines) == 1
    assert sum(line.startswith(b"content-length:") for line in lines) == 1
    assert not any(line.startswith((b"connection:", b"te:")) for line in lines)


@pytest.mark.parametrize("value", [b"", b"a b", b"\xff", b"x" * (MAX_ID_BYTES + 1)])
def test_a_name_that_is_none_is_replaced(value: bytes) -> None:
    assert request_id([(b"x-request-id", value)], [b"x-request-id"], b"new") == b"new"


def test_the_preferred_name_counts() -> None:
    headers = [(b"b", b"2"), (b"a", b"1")]
    assert request_id(headers, [b"a", b"b"], b"new") == b"1"

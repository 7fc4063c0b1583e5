import asyncio
import socket
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sapwood.base.errors import ConfigError
from sapwood.bench.http_stream import (
    Endpoint,
    HttpError,
    ResponseParser,
    SseParser,
    exchange,
    fetch_json,
    status_message,
)

CHUNKED = (
    b"HTTP/1.1 100 Continue\r\n\r\n"
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"5;note=1\r\nhello\r\nA\r\n, \r\nworld!\r\n0\r\ntrailer: x\r\n\r\n"
)
LENGTH = b"HTTP/1.1 404 Not Found\r\ncontent-length: 4\r\n\r\ngone"


def pieces(data, cuts):
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[start:end] for start, end in pairwise(edges)]


@given(cuts=st.lists(st.integers(0, 1000)))
def test_a_chunked_body_survives_any_split(cuts):
    parser = ResponseParser()
    body = b"".join(parser.feed(piece) for piece in pieces(CHUNKED, cuts))
    assert body == b"hello, \r\nworld!"
    assert parser.complete
    assert parser.status == 200
    assert parser.headers["content-type"] == "text/event-stream"


@given(cuts=st.lists(st.integers(0, 1000)))
def test_a_body_with_a_length_survives_any_split(cuts):
    parser = ResponseParser()
    assert b"".join(parser.feed(piece) for piece in pieces(LENGTH, cuts)) == b"gone"
    assert (parser.status, parser.complete) == (404, True)


def test_a_body_may_end_with_the_connection():
    parser = ResponseParser()
    assert parser.feed(b"HTTP/1.0 200 OK\r\n\r\nab") == b"ab"
    assert parser.feed(b"cd") == b"cd"
    assert not parser.complete
    parser.end()
    assert parser.complete


@pytest.mark.parametrize("data", [b"", b"HTTP/1.1 200 OK\r\n", CHUNKED[:-5], LENGTH[:-1]])
def test_a_cut_answer_is_an_error(data):
    parser = ResponseParser()
    parser.feed(data)
    with pytest.raises(HttpError, match="closed the connection"):
        parser.end()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"SSH-2.0-x\r\n\r\n\r\n", "not HTTP/1"),
        (b"HTTP/2 200\r\n\r\n", "not HTTP/1"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: many\r\n\r\n", "content-length is 'many'"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n", "has the size b'zz'"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\nab\r\n", "longer than its"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + b"1" * 2000, "no size"),
        (b"HTTP/1.1 200 OK\r\nx: " + b"y" * 70_000, "head is longer"),
    ],
)
def test_bytes_that_are_not_http_are_refused(data, message):
    with pytest.raises(HttpError, match=message):
        ResponseParser().feed(data)


EVENTS = (
    b"data: one\n\n: comment\nevent: x\ndata:two\r\n\r\nid: 7\ndata: thr\ndata: ee\n\ndata: half"
)


@given(cuts=st.lists(st.integers(0, 1000)))
def test_events_survive_any_split(cuts):
    parser = SseParser()
    events = [event for piece in pieces(EVENTS, cuts) for event in parser.feed(piece)]
    assert events == [b"one", b"two", b"thr\nee"]
    assert parser.feed(b"\n\n") == [b"half"]


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://localhost:8000", "http://localhost:8000"),
        ("https://host/base/", "https://host:443/base"),
        ("http://[::1]", "http://[::1]:80"),
    ],
)
def test_endpoints_are_read(url, shown):
    assert str(Endpoint.parse(url)) == shown


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "http://", "http://h:99999"])
def test_other_urls_are_refused(url):
    with pytest.raises(ConfigError, match="--url is"):
        Endpoint.parse(url)


def test_a_refusal_shows_what_the_server_said():
    assert status_message(400, b'{"error": {"message": "too long"}}') == "HTTP 400: too long"
    assert status_message(400, b'{"message": "flat"}') == "HTTP 400: flat"
    assert status_message(422, b'{"detail": "bad"}') == "HTTP 422: bad"
    assert status_message(502, b"<html>") == "HTTP 502: <html>"
    assert status_message(500, b"") == "HTTP 500: no message"


def test_json_over_a_socket(server):
    endpoint = Endpoint.parse(server.url)
    answer = asyncio.run(
        fetch_json(endpoint, "GET", "/v1/models", headers={"x-key": "1"}, timeout_s=10)
    )
    assert answer == {"object": "list", "data": [{"id": "tiny", "object": "model"}]}
    assert server.headers[0].startswith("GET /v1/models HTTP/1.1\r\n")
    assert "x-key: 1\r\n" in server.headers[0]


def run_exchange(endpoint, timeout_s):
    return asyncio.run(
        exchange(
            endpoint,
            "GET",
            "/",
            body=None,
            headers={},
            on_body=lambda parser, data: None,
            timeout_s=timeout_s,
        )
    )


def test_no_server_is_an_error():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(HttpError, match="cannot connect to http:"):
        run_exchange(Endpoint.parse(f"http://127.0.0.1:{port}"), 10)


def test_a_silent_server_is_an_error():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = Endpoint.parse(f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(HttpError, match=r"no whole answer within 0\.05 s"):
            run_exchange(endpoint, 0.05)

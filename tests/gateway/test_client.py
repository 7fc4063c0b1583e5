"""The pooled client against servers that say what a test tells them to say."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from sapwood.gateway.client import (
    MAX_BUFFERED_BYTES,
    MAX_HEAD_BYTES,
    Answer,
    ConnectionBroken,
    NotConnected,
    Origin,
    Pool,
)

HEAD = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
Test = Callable[[Pool], Awaitable[None]]


def with_server(answers: list[bytes], test: Test, *, close: bool = False) -> int:
    """Run a test against a server that gives these answers, on any connection, one by one.

    close  whether it closes a connection after each answer. Returns the number of connections."""
    num_connections = 0
    left = list(answers)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_connections
        num_connections += 1
        try:
            while True:
                await reader.readuntil(b"\r\n\r\n")
                if not left:
                    return
                writer.write(left.pop(0))
                await writer.drain()
                if close:
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        finally:
            writer.close()

    async def run() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        pool = Pool(Origin.parse(f"http://127.0.0.1:{port}"), connect_timeout_s=5)
        try:
            async with asyncio.timeout(30):
                await test(pool)
        finally:
            pool.close()
            server.close()
            while pool.num_open:
                await asyncio.sleep(0)

    asyncio.run(run())
    return num_connections


async def whole(pool: Pool) -> bytes:
    answer = await pool.ask(HEAD)
    try:
        return await answer.body(1 << 24)
    finally:
        answer.close()


@pytest.mark.parametrize(
    ("answer", "body"),
    [
        (OK, b"ok"),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n2\r\nbc\r\n0\r\n\r\n",
            b"abc",
        ),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + OK, b"ok"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", b""),
    ],
)
def test_connections_are_kept(answer: bytes, body: bytes) -> None:
    async def test(pool: Pool) -> None:
        for _ in range(3):
            assert await whole(pool) == body
        assert (pool.num_open, pool.num_idle) == (1, 1)

    assert with_server([answer] * 3, test) == 1


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
        OK + OK,  # more than was asked for
    ],
)
def test_connections_that_cannot_be_kept_are_not(answer: bytes) -> None:
    async def test(pool: Pool) -> None:
        assert await whole(pool) == b"ok"
        assert await whole(pool) == b"ok"
        assert pool.num_idle == 0

    assert with_server([answer] * 2, test) == 2


def test_a_body_may_end_with_its_connection() -> None:
    async def test(pool: Pool) -> None:
        assert await whole(pool) == b"all of it"

    with_server([b"HTTP/1.1 200 OK\r\n\r\nall of it"], test, close=True)


def test_a_connection_that_was_closed_while_idle_is_replaced() -> None:
    async def test(pool: Pool) -> None:
        for _ in range(3):
            assert await whole(pool) == b"ok"

    assert with_server([OK] * 3, test, close=True) == 3


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH_9\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * MAX_HEAD_BYTES + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * (MAX_HEAD_BYTES // 2),
        b"",
    ],
)
def test_what_is_no_answer_fails(answer: bytes) -> None:
    async def test(pool: Pool) -> None:
        with pytest.raises(ConnectionBroken):
            await whole(pool)
        assert pool.num_open == 0

    with_server([answer], test, close=True)


def test_nobody_listens() -> None:
    async def run() -> None:
        server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        server.close()
        await server.wait_closed()
        pool = Pool(Origin.parse(f"http://127.0.0.1:{port}"), connect_timeout_s=5)
        with pytest.raises(NotConnected):
            await pool.ask(HEAD)

    asyncio.run(run())


def test_the_worker_waits_for_who_reads_slowly() -> None:
    num_bytes = 64 * MAX_BUFFERED_BYTES

    async def test(pool: Pool) -> None:
        answer: Answer = await pool.ask(HEAD)
        before = -1
        while answer._buffered != before:  # until nothing more comes
            before = answer._buffered
            await asyncio.sleep(0.05)
        assert before < num_bytes / 8
        assert len(await answer.body(num_bytes)) == num_bytes
        answer.close()

    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % num_bytes
    with_server([head + bytes(num_bytes)], test)


def test_a_body_has_a_limit() -> None:
    async def test(pool: Pool) -> None:
        answer = await pool.ask(HEAD)
        with pytest.raises(ConnectionBroken, match="more than 1 bytes"):
            await answer.body(1)
        answer.close()

    with_server([OK], test)


@pytest.mark.parametrize(
    ("url", "host", "path"),
    [
        ("http://a.example", b"a.example", b""),
        ("http://a.example:80/", b"a.example", b""),
        ("https://a.example:8443/v1/x/", b"a.example:8443", b"/v1/x"),
        ("http://[::1]:30000", b"[::1]:30000", b""),
    ],
)
def test_origins(url: str, host: bytes, path: bytes) -> None:
    origin = Origin.parse(url)
    assert (origin.host_header, origin.base_path) == (host, path)

"""How uvicorn is set up; what it does with it is tested against a real server."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from sapwood.app.serving.http_server import HttpServer
from sapwood.base.errors import ConfigError
from sapwood.schema.config.server import ServerConfig


async def app(scope: object, receive: object, send: object) -> None:
    raise AssertionError("nobody calls it")


def test_tls_files_that_cannot_be_used_are_an_error_before_anything_is_served(
    tmp_path: Path,
) -> None:
    missing = ServerConfig(ssl_certfile=str(tmp_path / "none.pem"))
    with pytest.raises(ConfigError, match="--ssl-certfile"):
        HttpServer(app, missing, lambda: None)
    wrong = tmp_path / "wrong.pem"
    wrong.write_text("no certificate")
    with pytest.raises(ConfigError, match="--ssl-certfile"):
        HttpServer(app, ServerConfig(ssl_certfile=str(wrong)), lambda: None)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"ssl_keyfile": "k"}, "--ssl-certfile"),
        ({"api_key": ""}, "--api-key"),
        ({"admin_api_key": "é"}, "--admin-api-key"),
        ({"cors_allow_origins": "app.example"}, "origin"),
        ({"cors_allow_origins": "https://app.example/path"}, "origin"),
        ({"cors_allow_origins": '["https://app.example"'}, "no JSON"),
        ({"cors_allow_origins": "[7]"}, "origins are strings"),
        ({"allowed_hosts": "http://app.example"}, "--allowed-hosts"),
        ({"allowed_hosts": "app.example:30000"}, "--allowed-hosts"),
        ({"allowed_hosts": "a*.example"}, "--allowed-hosts"),
        ({"allowed_hosts": "*."}, "--allowed-hosts"),
        ({"max_json_depth": 2000}, "--max-json-depth"),
        ({"max_request_bytes": 0}, "--max-request-bytes"),
        ({"request_body_timeout": -1.0}, "--request-body-timeout"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        ServerConfig(**options)


def test_origins_are_separated_by_commas() -> None:
    config = ServerConfig(cors_allow_origins="https://a.example, http://b.example:8080,")
    assert config.allowed_origins == ("https://a.example", "http://b.example:8080")
    config = ServerConfig(cors_allow_origins='["https://a.example", "*"]')
    assert config.allowed_origins == ("https://a.example", "*")


def test_a_secret_is_not_shown() -> None:
    assert "sesame" not in repr(ServerConfig(api_key="sesame", ssl_certfile="c"))
    with pytest.raises(ConfigError) as caught:
        ServerConfig(api_key=123456)  # type: ignore[arg-type]
    assert "123456" not in str(caught.value)


class Running:
    """The application of `answer` behind a real socket, until the block ends."""

    def __init__(self, answer: ASGIApp, **options: Any) -> None:
        config = ServerConfig(port=0, **options)
        self._server = HttpServer(answer, config, lambda: None)

    async def __aenter__(self) -> tuple[str, int]:
        self._task = asyncio.create_task(self._server.serve())
        while not self._server.started:
            await asyncio.sleep(0.005)
        host, port = self._server.url.removeprefix("http://").split(":")
        return host, int(port)

    async def __aexit__(self, *_: object) -> None:
        self._server.should_exit = True
        await self._task


async def early_answer(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers without looking at the request's body."""
    headers = [(b"content-length", b"2")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"ok"})


def talk(pieces: Sequence[bytes], **options: Any) -> bytes:
    """What the server says until it closes the connection."""

    async def run() -> bytes:
        async with Running(early_answer, **options) as (host, port), asyncio.timeout(20):
            reader, writer = await asyncio.open_connection(host, port)
            answer = b""
            with contextlib.suppress(ConnectionError):
                for piece in pieces:
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(0.01)
                while read := await reader.read(65536):
                    answer += read
            writer.close()
            return answer

    return asyncio.run(run())


def test_a_head_that_does_not_end_is_cut_off() -> None:
    endless = [b"GET / HTTP/1.1\r\n", *(b"X-%d: " % i + b"a" * 8000 + b"\r\n" for i in range(9))]
    assert talk(endless).startswith(b"HTTP/1.1 431 ")


def test_a_head_that_does_not_come_is_not_waited_for() -> None:
    assert talk([b"GET / HTTP/1.1\r\n"], request_header_timeout=0.2) == b""


def test_a_body_that_nobody_reads_is_no_head() -> None:
    body = b"a" * 200_000
    first = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 200000\r\n\r\n"
    last = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
    answer = talk([first, body[:100_000], body[100_000:], last])
    assert answer.count(b"HTTP/1.1 200 OK") == 2
    assert b"431" not in answer


def test_its_address_is_known_once_it_listens() -> None:
    async def run() -> None:
        server = HttpServer(app, ServerConfig(port=0), lambda: None)
        serving = asyncio.create_task(server.serve())
        await server.listens()
        port = int(server.url.rpartition(":")[2])
        assert port > 0
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.close()
        server.stop()
        await serving

    asyncio.run(run())

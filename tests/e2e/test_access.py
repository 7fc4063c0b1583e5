"""Keys, TLS and slow clients, against a real server."""

from __future__ import annotations

import json
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import trustme

from tests.e2e.server import Server, serving
from tests.tiny import write_llama

KEY, ADMIN = "a-user's-key", "an-admin's-key"
TIMEOUTS = ("--request-header-timeout", "1", "--request-body-timeout", "1")
ASK = {"text": "Hi", "sampling_params": {"max_new_tokens": 2}}
LONG = {
    "text": "Hi",
    "stream": True,
    "sampling_params": {"max_new_tokens": 8000, "ignore_eos": True},
}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    directory = tmp_path_factory.mktemp("models") / "m"
    write_llama(directory, max_position_embeddings=8192)
    return ["--model", str(directory), "--load-format", "dummy", "--max-total-tokens", "65536"]


@pytest.fixture(scope="module")
def open_server(model: list[str]) -> Iterator[Server]:
    with serving(*model, *TIMEOUTS) as server:
        yield server


@pytest.fixture(scope="module")
def locked(model: list[str]) -> Iterator[Server]:
    with serving(*model, "--api-key", KEY, "--admin-api-key", ADMIN) as server:
        yield server


@pytest.mark.parametrize("has_key", [False, True])
def test_a_client_that_is_killed_mid_stream_leaves_no_page(
    open_server: Server, locked: Server, has_key: bool
) -> None:
    server = locked if has_key else open_server
    headers = bearer(KEY) if has_key else {}
    with httpx.Client(base_url=server.url, headers=headers, timeout=30) as client:

        def counters() -> dict[str, int]:
            return client.get("/server_info").raise_for_status().json()["internal_states"][0]

        before = counters()
        streams = [open_stream(server, headers) for _ in range(4)]
        assert counters()["num_leased_pages"] > 0
        for stream in streams:
            stream.close()
        end = time.monotonic() + 10
        while (after := counters())["num_running"] or after["num_leased_pages"]:
            assert time.monotonic() < end, after
            time.sleep(0.02)
        assert after["num_aborted"] - before["num_aborted"] == 4
        assert after["num_free_pages"] + after["num_cached_pages"] == after["num_pages"]


def open_stream(server: Server, headers: dict[str, str]) -> socket.socket:
    """A stream of which the first event has come, as a bare socket."""
    host, port = server.url.removeprefix("http://").split(":")
    body = json.dumps(LONG)
    head = [f"POST /generate HTTP/1.1\r\nHost: {host}", f"Content-Length: {len(body)}"]
    head += [f"{name}: {value}" for name, value in headers.items()]
    connection = socket.create_connection((host, int(port)), timeout=30)
    connection.sendall(("\r\n".join(head) + "\r\n\r\n" + body).encode())
    got = b""
    while b"data: " not in got:
        piece = connection.recv(65536)
        assert piece, got
        got += piece
    assert got.startswith(b"HTTP/1.1 200")
    return connection


@pytest.mark.parametrize(
    ("method", "path", "key", "status"),
    [
        ("POST", "/generate", None, 401),
        ("POST", "/generate", "wrong", 401),
        ("POST", "/generate", KEY, 200),
        ("POST", "/generate", ADMIN, 200),
        ("POST", "/flush_cache", None, 401),
        ("POST", "/flush_cache", KEY, 403),
        ("POST", "/flush_cache", ADMIN, 200),
        ("POST", "/abort_request", KEY, 403),
        ("GET", "/server_info", None, 401),
        ("GET", "/openapi.json", None, 401),
        ("GET", "/no/such/path", None, 401),
        ("GET", "/health", None, 200),
        ("GET", "/", None, 200),
    ],
)
def test_what_needs_which_key(
    locked: Server, method: str, path: str, key: str | None, status: int
) -> None:
    headers = {} if key is None else bearer(key)
    response = httpx.request(method, locked.url + path, json=ASK, headers=headers, timeout=30)
    assert response.status_code == status, response.text
    if status == 401:
        assert response.headers["WWW-Authenticate"] == "Bearer"
    if status in (401, 403):
        assert path in response.json()["error"]["message"]


def test_the_key_may_come_as_anthropics_clients_send_it(locked: Server) -> None:
    headers = {"x-api-key": KEY}
    body = {"max_tokens": 2, "messages": [{"role": "user", "content": "Hi"}], "model": "default"}
    url = f"{locked.url}/v1/messages"
    assert httpx.post(url, json=body, headers=headers, timeout=30).status_code == 200
    refused = httpx.post(url, json=body, headers={"x-api-key": "wrong"})
    assert refused.json()["error"]["type"] == "authentication_error"


def test_no_key_is_told_or_logged(locked: Server) -> None:
    told = httpx.get(f"{locked.url}/server_info", headers=bearer(KEY)).text + locked.log
    assert KEY not in told
    assert ADMIN not in told


def test_tls_with_the_servers_certificate_and_a_clients(model: list[str], tmp_path: Path) -> None:
    authority = trustme.CA()
    own = authority.issue_cert("127.0.0.1")
    cert, key, ca = (tmp_path / name for name in ("cert.pem", "key.pem", "ca.pem"))
    own.private_key_pem.write_to_path(key)
    cert.write_bytes(b"".join(pem.bytes() for pem in own.cert_chain_pems))
    authority.cert_pem.write_to_path(ca)
    files = ["--ssl-certfile", str(cert), "--ssl-keyfile", str(key), "--ssl-ca-certs", str(ca)]
    with serving(*model, *files) as server:
        assert server.url.startswith("https://")
        trusting = ssl.create_default_context(cafile=str(ca))
        with pytest.raises((httpx.ReadError, httpx.ConnectError, httpx.RemoteProtocolError)):
            httpx.get(f"{server.url}/health", verify=trusting)
        authority.issue_cert("a-client").configure_cert(trusting)
        assert httpx.get(f"{server.url}/health", verify=trusting).status_code == 200
        body = {**ASK, "stream": True}
        with httpx.stream("POST", f"{server.url}/generate", json=body, verify=trusting) as got:
            assert list(got.iter_lines())[-2] == "data: [DONE]"
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/health")


def ends_within(connection: socket.socket, limit_s: float) -> bytes:
    """What the server sends until it closes the connection."""
    connection.settimeout(limit_s)
    got = b""
    while True:
        try:
            piece = connection.recv(65536)
        except ConnectionResetError:
            return got
        if not piece:
            return got
        got += piece


def test_a_connection_that_brings_no_request_is_closed(open_server: Server) -> None:
    host, port = open_server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as silent:
        assert ends_within(silent, 5) == b""
    with socket.create_connection((host, int(port))) as dribbling:
        dribbling.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n")
        closed = False
        for _ in range(30):
            time.sleep(0.1)
            try:
                dribbling.sendall(b"X-A: b\r\n")
            except OSError:
                closed = True
                break
        assert closed, "each header line put the limit off"


def test_a_body_that_comes_too_slowly_is_408_and_its_connection_closed(
    open_server: Server,
) -> None:
    host, port = open_server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as slow:
        slow.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
        answer = ends_within(slow, 10)
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"--request-body-timeout" in answer


def test_a_long_stream_is_not_a_slow_client(open_server: Server) -> None:
    """The limits are on what the client sends, not on the time that an answer takes."""
    with open_stream(open_server, {}) as stream:
        stream.settimeout(10)
        got = b""
        while b"[DONE]" not in got:
            piece = stream.recv(1 << 20)
            assert piece, "the server cut the stream off"
            got = got[-20:] + piece

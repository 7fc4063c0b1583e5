"""Requests that are wrong in every way that a client can be wrong, drawn from a seed."""

from __future__ import annotations

import json
import random
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Body = dict[str, Any]

GOOD: dict[str, Body] = {
    "/generate": {"text": "Hi", "sampling_params": {"max_new_tokens": 2}},
    "/v1/completions": {"prompt": "Hi", "max_tokens": 2},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2},
    "/v1/messages": {
        "model": "default",
        "max_tokens": 2,
        "messages": [{"role": "user", "content": "Hi"}],
    },
    "/api/generate": {"model": "default", "prompt": "Hi", "options": {"num_predict": 2}},
    "/api/chat": {
        "model": "default",
        "messages": [{"role": "user", "content": "Hi"}],
        "options": {"num_predict": 2},
    },
    "/tokenize": {"prompt": "Hi"},
    "/detokenize": {"tokens": [1, 2]},
}
LIMIT_FIELD = {
    "/generate": ("sampling_params", "max_new_tokens"),
    "/v1/completions": ("max_tokens",),
    "/v1/chat/completions": ("max_tokens",),
    "/v1/messages": ("max_tokens",),
    "/api/generate": ("options", "num_predict"),
    "/api/chat": ("options", "num_predict"),
}
TEXT_FIELD = {
    "/generate": "text",
    "/v1/completions": "prompt",
    "/v1/chat/completions": "messages",
    "/v1/messages": "messages",
    "/api/generate": "prompt",
    "/api/chat": "messages",
    "/tokenize": "prompt",
    "/detokenize": "tokens",
}
BIG = 10 * 2**20
STRANGE: tuple[Any, ...] = (True, 1.5, -7, {"a": 1}, [[["x"]]], [None], [{"b": []}], [1.5])
JSON_HEADER = "Content-Type: application/json"


@dataclass(frozen=True)
class Case:
    """One request as bytes.

    keeps_open  it is not whole, and the client waits for the server to give up
    """

    kind: str
    raw: bytes
    keeps_open: bool = False


def http(
    path: str, body: bytes, *, method: str = "POST", headers: Sequence[str] = (JSON_HEADER,)
) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: test", f"Content-Length: {len(body)}", *headers]
    return ("\r\n".join([*lines, "Connection: close"]) + "\r\n\r\n").encode("latin-1") + body


def draw_path(rng: random.Random, among: Sequence[str] = tuple(GOOD)) -> tuple[str, Body]:
    path = rng.choice(list(among))
    return path, json.loads(json.dumps(GOOD[path]))


def dumped(body: Body) -> bytes:
    return json.dumps(body).encode()


def with_limit(path: str, body: Body, value: Any) -> bytes:
    at: Any = body
    *outer, last = LIMIT_FIELD[path]
    for name in outer:
        at = at[name]
    at[last] = value
    return dumped(body)


def wrong_type(rng: random.Random) -> bytes:
    path, body = draw_path(rng)
    body[TEXT_FIELD[path]] = rng.choice(STRANGE)
    return http(path, dumped(body))


def huge_number(rng: random.Random) -> bytes:
    path, body = draw_path(rng, tuple(LIMIT_FIELD))
    return http(path, with_limit(path, body, rng.choice([10**30, -(10**30), 1e308])))


def negative_length(rng: random.Random) -> bytes:
    path, body = draw_path(rng, tuple(set(LIMIT_FIELD) - {"/api/generate", "/api/chat"}))
    if rng.random() < 0.5:
        return http(path, with_limit(path, body, -rng.randint(1, 10**6)))
    return f"POST {path} HTTP/1.1\r\nHost: t\r\nContent-Length: -5\r\n\r\n".encode()


def not_a_number(rng: random.Random) -> bytes:
    path, body = draw_path(rng)
    word = rng.choice([b"NaN", b"Infinity", b"-Infinity", b"1e999", b"0x10", b"+1", b".5", b"01"])
    return http(path, dumped(body)[:-1] + b', "temperature": ' + word + b"}")


def broken_utf8(rng: random.Random) -> bytes:
    path, body = draw_path(rng)
    bad = rng.choice([b"\xff\xfe", b"\xc3\x28", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80", b"\x80"])
    return http(path, dumped(body)[:-1] + b', "model": "' + bad + b'"}')


def deep_json(rng: random.Random) -> bytes:
    path, body = draw_path(rng)
    depth = rng.choice([101, 500, 1023, 1024, 5000, 100_000])
    opened, closed = rng.choice([(b"[", b"]"), (b'{"a":', b"}")])
    inner = opened * depth + b"1" + closed * depth
    return http(path, dumped(body)[:-1] + b', "metadata": ' + inner + b"}")


def big_string(rng: random.Random) -> bytes:
    path, body = draw_path(rng)
    long = rng.choice(["x", "word ", "\u00e9", "\\"]) * (BIG // 4)
    where = rng.randrange(3)
    if where == 0 and path != "/tokenize" and TEXT_FIELD[path] in ("text", "prompt"):
        body[TEXT_FIELD[path]] = long
    elif where == 1:
        body[long] = 1
    else:
        body["max_tokens"] = long
    return http(path, dumped(body))


def unknown_field(rng: random.Random) -> bytes:
    path, body = draw_path(rng, tuple(set(GOOD) - {"/api/generate", "/api/chat"}))
    name = "".join(rng.choice("abcdefgh_\n\t\u20ac'\"<") for _ in range(rng.randint(1, 30)))
    return http(path, dumped({**body, f"zz{name}": rng.choice(STRANGE)}))


def wrong_content(rng: random.Random) -> bytes:
    path, _ = draw_path(rng)
    kind, body = rng.choice(
        [
            ("application/x-www-form-urlencoded", b"text=Hi&max_tokens=3"),
            ("multipart/form-data; boundary=x", b'--x\r\ncontent-disposition: form-data; name="a"'),
            ("application/xml", b"<a>Hi</a>"),
            ("application/octet-stream", bytes(rng.randrange(256) for _ in range(200))),
            ("application/json\r\nContent-Encoding: gzip", b"\x1f\x8b\x08\x00"),
            ("application/json; charset=utf-16", '{"text": "Hi"}'.encode("utf-16")),
            ("text/plain", b""),
            ("application/json", b"[1, 2]"),
        ]
    )
    return http(path, body, headers=[f"Content-Type: {kind}"])


def truncated_json(rng: random.Random) -> bytes:
    path, body = draw_path(rng)
    whole = dumped(body)
    return http(path, whole[: rng.randrange(1, len(whole))])


def bad_protocol(rng: random.Random) -> bytes:
    return rng.choice(
        [
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
            b"GARBAGE\r\n\r\n",
            b"POST /generate HTTP/9.9\r\nHost: t\r\n\r\n",
            b"POST /generate HTTP/1.1\r\nHost: t\r\nContent-Length: ten\r\n\r\n",
            b"POST / HTTP/1.1\r\nHost: t\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
            b"POST /generate HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
            b"POST /generate HTTP/1.1\r\nHost: t\r\nX: " + b"a" * 200_000 + b"\r\n\r\n",
            b"POST /generate HTTP/1.1\r\nNo-Colon\r\n\r\n",
            b"POST /gen\x00erate HTTP/1.1\r\nHost: t\r\n\r\n",
            b"POST /generate HTTP/1.1\r\n\r\n",
        ]
    )


def wrong_place(rng: random.Random) -> bytes:
    method, path = rng.choice(
        [
            ("GET", "/generate"),
            ("DELETE", "/v1/chat/completions"),
            ("POST", "/no/such/path"),
            ("POST", "/generate/"),
            ("POST", "/../../etc/passwd"),
            ("POST", "/%00%ff%2e%2e/x"),
            ("BREW", "/generate"),
            ("GET", "/v1/models/no-such-model"),
        ]
    )
    return http(path, b"{}", method=method)


MAKERS: dict[str, Callable[[random.Random], bytes]] = {
    "wrong type": wrong_type,
    "huge number": huge_number,
    "negative length": negative_length,
    "not a number": not_a_number,
    "broken UTF-8": broken_utf8,
    "deep JSON": deep_json,
    "unknown field": unknown_field,
    "wrong content": wrong_content,
    "truncated JSON": truncated_json,
    "bad protocol": bad_protocol,
    "wrong place": wrong_place,
}


def cases(count: int, seed: int) -> list[Case]:
    """`count` cases, of which a few are big, cut off, or slow."""
    rng = random.Random(seed)
    made: list[Case] = []
    for index in range(count):
        if index % 15 == 0:
            made.append(Case("big string", big_string(rng)))
        elif index % 15 == 1:
            whole = http(*_good(rng))
            made.append(Case("cut off", whole[: rng.randrange(10, len(whole))]))
        elif index % 15 == 2:
            whole = http(*_good(rng))
            made.append(Case("slow", whole[: rng.randrange(10, len(whole))], keeps_open=True))
        else:
            kind = rng.choice(list(MAKERS))
            made.append(Case(kind, MAKERS[kind](rng)))
    return made


def _good(rng: random.Random) -> tuple[str, bytes]:
    path, body = draw_path(rng)
    return path, dumped(body)


def answer_to(host: str, port: int, case: Case, timeout_s: float = 30.0) -> bytes:
    """All that the server sends until it closes the connection; b"still open" if it does not."""
    with socket.create_connection((host, port), timeout=timeout_s) as connection:
        try:
            connection.sendall(case.raw)
            if case.kind == "cut off":
                connection.shutdown(socket.SHUT_WR)
        except (BrokenPipeError, ConnectionResetError):
            # It has answered before everything was sent.
            pass
        got = bytearray()
        try:
            while piece := connection.recv(1 << 16):
                got += piece
        except ConnectionResetError:
            pass
        except TimeoutError:
            return b"still open"
        return bytes(got)

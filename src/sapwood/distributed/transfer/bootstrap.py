"""The HTTP part of the port for pages: where an engine that reads prompts can be found.

SGLang's engines and their tools ask `GET /route` and `GET /health` there (facts: SGLang 0.5.8). An
engine of sapwood has one rank, which listens at the same port, and registers itself; so nothing
from outside is written.
"""

from __future__ import annotations

import asyncio
import json
import socket
from urllib.parse import parse_qs, urlsplit

from sapwood.distributed.transfer.facts import PageFacts

HTTP_BEGINNINGS = frozenset({b"GET ", b"PUT ", b"POST", b"HEAD", b"DELE", b"OPTI", b"PATC"})
MAX_HEAD = 8192
HEAD_S = 5.0
_RANK = ("engine_rank", "target_dp_group", "target_pp_rank")


async def answer_http(
    connection: socket.socket, beginning: bytes, own_host: str, port: int, facts: PageFacts
) -> None:
    """Answer one request, whose first bytes were read already; TimeoutError if it never ends."""
    loop = asyncio.get_running_loop()
    head = beginning
    async with asyncio.timeout(HEAD_S):
        while b"\r\n\r\n" not in head and len(head) < MAX_HEAD:
            piece = await loop.sock_recv(connection, MAX_HEAD)
            if not piece:
                return
            head += piece
        status, kind, body = _answer(head, own_host, port, facts)
        content = b"" if head.startswith(b"HEAD") else body
        told = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
        await loop.sock_sendall(connection, told.encode() + b"Connection: close\r\n\r\n" + content)


def _answer(head: bytes, own_host: str, port: int, facts: PageFacts) -> tuple[str, str, bytes]:
    """(status, kind, body)"""
    text, json_ = "text/plain", "application/json"
    words = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ")
    if len(words) != 3:
        return "400 Bad Request", text, b"That is no HTTP request."
    method, target, _ = words
    try:
        url = urlsplit(target)
    except ValueError:
        return "400 Bad Request", text, b"That is no path."
    if url.path not in ("/route", "/health"):
        return "404 Not Found", text, b"There are /route and /health."
    if method not in ("GET", "HEAD"):
        return "405 Method Not Allowed", text, b"This engine's rank registers itself; only ask."
    if url.path == "/health":
        return "200 OK", text, b"OK"
    query = parse_qs(url.query)
    asked = [query.get(name, [""])[0] for name in _RANK]
    if not all(asked):
        return "400 Bad Request", text, f"The query lacks one of {', '.join(_RANK)}.".encode()
    if asked == ["-1", "-1", "-1"]:
        sizes = {f"prefill_{name}": 1 for name in ("attn_tp_size", "dp_size", "pp_size")}
        return "200 OK", json_, json.dumps(sizes | {"prefill_page_size": facts.page_size}).encode()
    if asked != ["0", "0", "0"]:
        return "404 Not Found", text, b"This engine has one rank: 0, 0, 0."
    return "200 OK", json_, json.dumps({"rank_ip": own_host, "rank_port": port}).encode()

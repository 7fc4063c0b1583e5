"""Pictures beside everything else that a request may ask for, in one server; and hostile ones."""

from __future__ import annotations

import base64
import io
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.e2e.server import Server, serving
from tests.pictures import data_url, picture
from tests.served_sight import save_served


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    model = save_served(tmp_path_factory.mktemp("sight"))
    flags = (
        "--model", str(model), "--dtype", "float32", "--page-size", "4", "--overlap-depth", "2",
        "--chunked-prefill-size", "16", "--max-total-tokens", "4096", "--enable-metrics",
        "--enable-lora", "--max-lora-rank", "8", "--lora-target-modules", "q_proj", "v_proj",
        "--tool-call-parser", "qwen25", "--allowed-media-domains", "127.0.0.1",
        "--mm-per-request-timeout", "3",
    )  # fmt: skip
    with serving(*flags) as one:
        yield one


def _shown(*urls: str, text: str = "what is it?") -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def _chat(server: Server, messages: Any, **fields: Any) -> Any:
    body = {"messages": messages, "temperature": 0, "max_tokens": 8, **fields}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text[:2000]
    return answer.json()


def test_a_grammar_holds_after_a_picture(server: Server) -> None:
    answer = _chat(server, _shown(data_url(picture(40, 28))), regex="(yes|no), [0-9]{2} dogs")
    said = answer["choices"][0]["message"]["content"]
    assert said.startswith(("yes, ", "no, ")[said[0] == "n"])


def test_samples_share_one_picture(server: Server) -> None:
    before = server.counters()["media"]["num_encoded"]
    messages = _shown(data_url(picture(44, 28)))
    answer = _chat(server, messages, n=3, temperature=1, seed=5, logprobs=True, top_logprobs=2)
    assert len(answer["choices"]) == 3
    for choice in answer["choices"]:
        entries = choice["logprobs"]["content"]
        assert entries
        assert all(entry["logprob"] <= 0 for entry in entries)
    assert server.counters()["media"]["num_encoded"] == before + 1
    usage = answer["usage"]
    assert 0 < usage["prompt_tokens_details"]["image_tokens"] < usage["prompt_tokens"]


def test_the_next_turn_hits_the_picture(server: Server) -> None:
    messages = _shown(data_url(picture(48, 36)))
    first = _chat(server, messages)
    before = server.counters()["media"]
    said = first["choices"][0]["message"]["content"]
    more = [*messages, {"role": "assistant", "content": said}, {"role": "user", "content": "and?"}]
    second = _chat(server, more)
    details = second["usage"]["prompt_tokens_details"]
    assert details["cached_tokens"] >= first["usage"]["prompt_tokens"] - 4
    assert details["image_tokens"] == first["usage"]["prompt_tokens_details"]["image_tokens"]
    after = server.counters()["media"]
    assert after["num_encoded"] == before["num_encoded"]


def test_a_tool_is_called_about_a_picture(server: Server) -> None:
    tool = {
        "type": "function",
        "function": {
            "name": "count",
            "parameters": {
                "type": "object",
                "properties": {"dogs": {"type": "integer", "maximum": 9, "minimum": 0}},
                "required": ["dogs"],
                "additionalProperties": False,
            },
        },
    }
    fields = {"tools": [tool], "tool_choice": "required", "max_tokens": 200}
    answer = _chat(server, _shown(data_url(picture(28, 28))), **fields)
    [call] = answer["choices"][0]["message"]["tool_calls"]
    # The arguments of a random model may be cut off within their blanks.
    assert call["function"]["name"] == "count"
    assert answer["usage"]["prompt_tokens_details"]["image_tokens"] > 0


def _leave(server: Server, url: str, wait_s: float) -> None:
    """Ask for a long answer, and be gone after that time."""
    body = {"messages": _shown(url), "max_tokens": 400, "ignore_eos": True}
    with suppress(httpx.TimeoutException):
        httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=wait_s)


def test_a_client_that_leaves_while_a_picture_is_fetched_or_prepared(server: Server) -> None:
    noise = data_url(picture(3000, 2000))
    for wait_s in (0.05, 0.2, 0.6):
        _leave(server, noise, wait_s)
    counters = server.wait_until_idle()
    assert counters["num_leased_pages"] == 0
    assert "aborted" not in _chat(server, _shown(noise))["choices"][0]["finish_reason"]
    metrics = httpx.get(f"{server.url}/metrics").text
    name = "sapwood:media_preparing_requests"
    [now] = [line for line in metrics.splitlines() if line.startswith(name)]
    assert now.endswith(" 0.0")


def test_many_at_once_of_which_some_are_aborted(server: Server) -> None:
    urls = [data_url(picture(28 + 4 * i, 28)) for i in range(6)]
    alone = [_chat(server, _shown(url))["choices"][0]["message"]["content"] for url in urls]

    def ask(i: int) -> str | None:
        if i % 3 == 2:
            _leave(server, urls[i // 2], 0.1)
            return None
        answer = _chat(server, _shown(urls[i // 2]))
        return str(answer["choices"][0]["message"]["content"])

    with ThreadPoolExecutor(12) as pool:
        said = list(pool.map(ask, range(12)))
    for i, one in enumerate(said):
        assert one is None or one == alone[i // 2]
    assert server.wait_until_idle()["num_leased_pages"] == 0


# ---- hostile -------------------------------------------------------------------------------------


def _chunk(kind: bytes, data: bytes) -> bytes:
    whole = kind + data
    return struct.pack(">I", len(data)) + whole + struct.pack(">I", zlib.crc32(whole))


def _bomb() -> bytes:
    """A PNG of some kilobytes that claims, and has, 9,000 x 9,000 pixels."""
    head = struct.pack(">IIBBBBB", 9000, 9000, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(9000 * (1 + 3 * 9000)), 9)
    return (
        b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head) + _chunk(b"IDAT", rows) + _chunk(b"IEND", b"")
    )


def _endless_gif() -> bytes:
    frames = [Image.new("P", (64, 64), i) for i in range(200)]
    out = io.BytesIO()
    frames[0].save(out, "GIF", save_all=True, append_images=frames[1:], loop=0, duration=1)
    return out.getvalue().rstrip(b";") * 50


@contextmanager
def _web(answer: bytes, *, drips_s: float = 0.0) -> Iterator[str]:
    """A server on this machine that gives that answer, or a byte now and then for ever."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:

        def serve() -> None:
            while True:
                try:
                    client, _ = listening.accept()
                except OSError:
                    return
                with client:
                    try:
                        client.recv(4096)
                        client.sendall(answer)
                        for _ in range(100 if drips_s else 0):
                            client.sendall(b"x")
                            time.sleep(drips_s)
                    except OSError:
                        continue

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/a.png"
        listening.shutdown(socket.SHUT_RDWR)


def _refusal(server: Server, url: str) -> str:
    body = {"messages": _shown(url), "max_tokens": 1}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 400, answer.text
    assert answer.json()["param"].startswith("messages[0].content[0]")
    return str(answer.json()["message"])


def _as_url(data: bytes) -> str:
    return "data:application/octet-stream;base64," + base64.b64encode(data).decode()


def test_hostile_media_are_refused_and_memory_returns(server: Server) -> None:
    bomb, gif = _as_url(_bomb()), _as_url(_endless_gif())
    _chat(server, _shown(data_url(picture(28, 28))))
    before = server.resident_bytes()
    redirect = b"HTTP/1.1 302 Found\r\nLocation: http://169.254.169.254/latest\r\n\r\n"
    for _ in range(3):
        # 81 million pixels are below the limit of pixels, and drawn: within time and memory only.
        large = httpx.post(
            f"{server.url}/v1/chat/completions",
            json={"messages": _shown(bomb), "max_tokens": 1},
            timeout=60,
        )
        assert large.status_code in (200, 400)
        # Of an endless animation the first frame is shown.
        assert _chat(server, _shown(gif), max_tokens=1)["usage"]["prompt_tokens"] > 12
        with _web(redirect) as url:
            assert "169.254.169.254" in _refusal(server, url)
        assert "is no picture of a known format" in _refusal(server, _as_url(b"<svg/>" * 50))
        png = data_url(picture(64, 64))
        assert "messages[0].content[0]" in _refusal(server, png[: len(png) // 2])
    start_s = time.monotonic()
    with _web(b"HTTP/1.1 200 OK\r\n\r\n", drips_s=0.5) as url:
        assert "was not fetched within 3 s" in _refusal(server, url)
    assert time.monotonic() - start_s < 10
    server.wait_until_idle()
    assert server.resident_bytes() < before + 64 * 2**20

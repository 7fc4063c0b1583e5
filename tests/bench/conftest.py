"""A server that says what a test tells it to, in the real wire formats, over a real socket."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest


@dataclass(frozen=True, kw_only=True)
class Reply:
    """events are the data of server-sent events; without them `body` is sent as JSON.

    framing  "chunked", or "close": no length, the end of the connection ends the body
    cut      close the connection after the events, before the body is whole
    """

    status: int = 200
    events: list[str] | None = None
    body: Any = None
    framing: str = "chunked"
    cut: bool = False


@dataclass
class FakeServer:
    reply: Callable[[str, dict[str, Any]], Reply]
    url: str = ""
    requests: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    headers: list[str] = field(default_factory=list)
    num_open: int = 0
    most_open: int = 0

    def bodies(self, path: str) -> list[dict[str, Any]]:
        return [body for asked, body in self.requests if asked == path]

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        try:
            await self._answer(reader, writer)
        finally:
            self.num_open -= 1
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        self.headers.append(head)
        length = next(
            (int(line.split(":")[1]) for line in head.split("\r\n") if "content-length" in line), 0
        )
        body = json.loads(await reader.readexactly(length)) if length else {}
        path = head.split(" ")[1]
        self.requests.append((path, body))
        reply = self.reply(path, body)
        if reply.events is None:
            data = json.dumps(reply.body).encode()
            writer.write(
                f"HTTP/1.1 {reply.status} X\r\ncontent-type: application/json\r\n"
                f"content-length: {len(data)}\r\n\r\n".encode()
                + data
            )
            await writer.drain()
            return
        chunked = reply.framing == "chunked"
        coding = "transfer-encoding: chunked\r\n" if chunked else ""
        writer.write(f"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n{coding}\r\n".encode())
        for event in reply.events:
            data = f"data: {event}\n\n".encode()
            writer.write(b"%x\r\n%b\r\n" % (len(data), data) if chunked else data)
            await writer.drain()
            await asyncio.sleep(0.002)
        if chunked and not reply.cut:
            writer.write(b"0\r\n\r\n")
            await writer.drain()


def openai_events(body: dict[str, Any], *, chat: bool, usage: bool = True) -> list[str]:
    """A stream of as many tokens as were asked for, and a usage that counts them."""
    count = body["max_tokens"]
    events: list[dict[str, Any]] = []
    if chat:
        events.append({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
    for index in range(count):
        finish = "length" if index == count - 1 else None
        piece = {"delta": {"content": " a"}} if chat else {"text": " a"}
        events.append({"choices": [{"index": 0, **piece, "finish_reason": finish}]})
    if usage:
        prompt = body["messages"][0]["content"].split() if chat else body["prompt"]
        events.append(
            {
                "choices": [],
                "usage": {
                    "prompt_tokens": len(prompt),
                    "completion_tokens": count,
                    "prompt_tokens_details": {"cached_tokens": 4},
                },
            }
        )
    return [*(json.dumps(event) for event in events), "[DONE]"]


def native_events(body: dict[str, Any]) -> list[str]:
    """Cumulative text; the last event only finishes."""
    count = body["sampling_params"]["max_new_tokens"]
    events = []
    for index in range(1, count + 2):
        meta = {
            "id": "1",
            "prompt_tokens": len(body["input_ids"]),
            "completion_tokens": min(index, count),
            "cached_tokens": 2,
            "finish_reason": {"type": "length", "length": count} if index > count else None,
        }
        events.append(json.dumps({"text": " a" * min(index, count), "meta_info": meta}))
    return [*events, "[DONE]"]


def answer_well(path: str, body: dict[str, Any]) -> Reply:
    """Every route that the benchmark uses, answered as it should be."""
    if path == "/v1/models":
        return Reply(body={"object": "list", "data": [{"id": "tiny", "object": "model"}]})
    if path == "/tokenize":
        return Reply(body={"tokens": list(range(100, 200)), "count": 100})
    if path == "/generate":
        return Reply(events=native_events(body))
    return Reply(events=openai_events(body, chat=path.endswith("chat/completions")))


@pytest.fixture
def fake() -> Any:
    """The building blocks of replies, for tests that tell the server what to say."""

    class Building:
        Reply = Reply
        openai_events = staticmethod(openai_events)
        native_events = staticmethod(native_events)
        answer_well = staticmethod(answer_well)

    return Building


@pytest.fixture
def server() -> Iterator[FakeServer]:
    """Answers well; a test may replace its `reply`."""
    with listening(answer_well) as fake_server:
        yield fake_server


@pytest.fixture
def serve() -> Iterator[Callable[[Callable[[str, dict[str, Any]], Reply]], FakeServer]]:
    """Makes servers that reply as a test says, any number of them."""
    with contextlib.ExitStack() as stack:
        yield lambda reply: stack.enter_context(listening(reply))


@contextlib.contextmanager
def listening(reply: Callable[[str, dict[str, Any]], Reply]) -> Iterator[FakeServer]:
    """A server on a free port, in a thread of its own."""
    fake_server = FakeServer(reply=reply)
    loop = asyncio.new_event_loop()
    started = loop.run_until_complete(asyncio.start_server(fake_server.handle, "127.0.0.1", 0))
    fake_server.url = f"http://127.0.0.1:{started.sockets[0].getsockname()[1]}"
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield fake_server

    async def stop() -> None:
        started.close()
        await started.wait_closed()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    asyncio.run_coroutine_threadsafe(stop(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()

"""A whole server around an engine that answers from a script."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import msgspec
import pytest
import tokenizers
import uvicorn

from sapwood.base.errors import EngineUnavailable
from sapwood.frontends.server import create_app
from sapwood.frontends.serving.services import Services
from sapwood.http.access import Access
from sapwood.schema.output import (
    CacheFlushed,
    CallDone,
    EngineReady,
    EngineStatus,
    Finish,
    PoolFacts,
    PoolUse,
    RequestOutput,
)
from sapwood.schema.request import (
    Generate,
    OrderWeights,
    RecordExperts,
    SentAdapter,
    StartProfile,
)
from sapwood.text.generation import TextGenerator
from sapwood.text.template import ChatTemplate, template_source
from sapwood.text.tokenizer import Tokenizer
from tests.frontends.scored import score_fields

EOS = "<|im_end|>"


def byte_tokenizer() -> Tokenizer:
    """One token per byte of UTF-8, then the special tokens."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE({letter: i for i, letter in enumerate(alphabet)}, [])
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<|im_start|>", EOS])
    return Tokenizer(backend, special_tokens={"eos_token": EOS})


@dataclass
class ScriptedEngine:
    """Answers every request with `reply`, a token per step, then the end of sequence.

    fail_after  tokens after which the engine fails; 0: before the first
    figures     of the engine's status, where they are not 0; options: the resolved ones
    refuses     whether profiles and adapters are refused; calls: of /start_profile and the like
    hold        True: no step is made, until it is False again
    hold_after  tokens of a request after which none follows; held: ids of requests that wait so
    most_open   requests that were open at the same time at most
    more_pools  of its cache, all of whose pages are free
    """

    tokenizer: Tokenizer
    reply: str = "Hello, wörld!"
    step_s: float = 0.0
    fail_after: int | None = None
    failure: Finish = Finish(kind="error", message="out of pages", status=503)  # noqa: RUF009
    hold: bool = False
    hold_after: int | None = None
    held: set[str] = field(default_factory=set)
    most_open: int = 0
    unavailable_reason: str | None = None
    flushes: bool = True
    num_cached_tokens: int = 0
    tier_tokens: tuple[int, int] = (0, 0)
    figures: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    refuses: bool = False
    calls: list[Any] = field(default_factory=list)
    submitted: list[Generate] = field(default_factory=list)
    adapters: dict[str, str] = field(default_factory=dict)
    more_pools: tuple[PoolFacts, ...] = ()
    open: dict[str, bool] = field(default_factory=dict)
    abandoned: dict[str, int] = field(default_factory=dict)

    @property
    def info(self) -> EngineReady:
        if self.unavailable_reason == "starting":
            raise EngineUnavailable("the engine is starting")
        return EngineReady(
            context_length=1024,
            max_total_tokens=4096,
            max_running_requests=8,
            page_size=16,
            pools=(PoolFacts(name="full", size=256, unit_bytes=1_000_000), *self.more_pools),
            weight_bytes=250_000_000,
            notes=["page_size 16: asked"],
            options=self.options,
        )

    async def generate(self, request: Generate) -> AsyncIterator[RequestOutput]:
        # What another process could not be sent must not come as far as here.
        msgspec.msgpack.encode(request)
        self.submitted.append(request)
        self.open[request.request_id] = True
        self.most_open = max(self.most_open, len(self.open))
        num_sent = 0
        try:
            async for output in self._outputs(request):
                num_sent += 1
                yield output
                if output.finish is not None:
                    return
        finally:
            del self.open[request.request_id]
            if num_sent == 0 or output.finish is None:
                self.abandoned[request.request_id] = num_sent

    async def _outputs(self, request: Generate) -> AsyncIterator[RequestOutput]:
        told: list[int] = []

        def output(token_ids: list[int], finish: Finish | None = None) -> RequestOutput:
            is_first = not told
            told.append(1)
            return RequestOutput(
                **score_fields(request, token_ids, is_first=is_first),
                request_id=request.request_id,
                token_ids=token_ids,
                num_prompt_tokens=len(request.prompt_ids),
                num_cached_tokens=self.num_cached_tokens,
                tier_tokens=self.tier_tokens,
                queue_time_s=0.25,
                finish=finish,
            )

        limit = request.options.sampling.max_new_tokens
        reply = self.tokenizer.encode(self.reply + EOS)
        for i, token_id in enumerate(reply):
            while (self.hold or i == self.hold_after) and self.open[request.request_id]:
                self.held.add(request.request_id)
                await asyncio.sleep(0.002)
            await asyncio.sleep(self.step_s)
            if not self.open[request.request_id]:
                yield output([], Finish(kind="abort"))
            elif i == self.fail_after:
                yield output([], self.failure)
            elif limit is not None and i + 1 >= limit:
                yield output([token_id], Finish(kind="length"))
            elif i + 1 == len(reply):
                yield output([token_id], Finish(kind="stop", matched=token_id))
            else:
                yield output([token_id])

    async def abort(self, request_id: str) -> None:
        if request_id in self.open:
            self.open[request_id] = False

    async def flush_cache(self) -> CacheFlushed:
        message = "flushed" if self.flushes else "2 requests are running; try again when idle"
        return CacheFlushed(call_id="1", done=self.flushes, message=message)

    async def status(self) -> EngineStatus:
        fields = msgspec.structs.fields(EngineStatus)
        counters = {one.name: 0 for one in fields if one.required}
        counters |= {"call_id": "1", "num_running": len(self.open)} | self.figures
        pool = PoolUse(num_free=counters["num_free_pages"], num_leased=counters["num_leased_pages"])
        more = (PoolUse(num_free=one.size, num_leased=0) for one in self.more_pools)
        return EngineStatus(**counters, pools=(pool, *more))

    async def start_profile(self, order: StartProfile) -> CallDone:
        self.calls.append(order)
        return CallDone("1", not self.refuses, "recording")

    async def stop_profile(self) -> CallDone:
        self.calls.append("stop_profile")
        return CallDone("1", not self.refuses, "no profile is being recorded")

    async def record_experts(self, order: RecordExperts) -> CallDone:
        self.calls.append(order.action)
        return CallDone("1", not self.refuses, "recording experts")

    async def freeze_gc(self) -> CallDone:
        self.calls.append("freeze_gc")
        return CallDone("1", True, "7 objects")

    async def load_adapter(
        self, adapter_id: str, path: str, sent: SentAdapter | None = None
    ) -> CallDone:
        self.calls.append(("load_adapter", sent or path))
        self.adapters[adapter_id] = path
        return CallDone("1", not self.refuses, "no such folder" if self.refuses else "loaded")

    async def unload_adapter(self, adapter_id: str) -> CallDone:
        self.calls.append(("unload_adapter", self.adapters.pop(adapter_id, adapter_id)))
        return CallDone("1", True, "unloaded")

    async def order_weights(self, order: OrderWeights) -> CallDone:
        self.calls.append(order)
        return CallDone("1", not self.refuses, "no" if self.refuses else "[[1.0]]")

    async def pause(self, mode: str) -> CallDone:
        self.calls.append(("pause", mode))
        return CallDone("1", True, "generation is paused")

    async def resume(self) -> CallDone:
        self.calls.append("resume")
        return CallDone("1", True, "generation goes on")

    async def slow_down(self, sleep_s: float) -> CallDone:
        self.calls.append(("slow_down", sleep_s))
        return CallDone("1", True, "slower")


class Api:
    """Calls the application in-process, each call on an event loop of its own."""

    def __init__(self, app: Any) -> None:
        self.app = app

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        async def call() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.request(method, path, **options)

        return asyncio.run(call())

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.request("GET", path, **options)

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        return self.request("POST", path, json=body, **options)


class Live:
    """The application behind uvicorn on a free port, in a thread."""

    def __init__(self, app: Any) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._server = uvicorn.Server(
            uvicorn.Config(app, log_level="warning", ws="none", lifespan="off")
        )
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],))
        self._thread.start()
        wait_until(lambda: self._server.started)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()


def wait_until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.005)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return byte_tokenizer()


@pytest.fixture
def engine(tokenizer: Tokenizer) -> ScriptedEngine:
    return ScriptedEngine(tokenizer)


@pytest.fixture
def services(engine: ScriptedEngine, tokenizer: Tokenizer) -> Services:
    return Services(
        engine=engine,
        generator=TextGenerator(engine, tokenizer),
        tokenizer=tokenizer,
        template=ChatTemplate(template_source("chatml")),
        model_name="org/tiny",
        model_path="/models/tiny",
        created=1_700_000_000,
        version="0.1.0",
        options={"max_running_requests": 8},
    )


@pytest.fixture
def api(services: Services) -> Api:
    return Api(create_app(services))


@pytest.fixture
def api_with(services: Services) -> Callable[..., Api]:
    """An application whose services differ in some fields."""
    return lambda **changes: Api(create_app(replace(services, **changes)))


@pytest.fixture
def live(services: Services) -> Iterator[Live]:
    server = Live(create_app(services))
    yield server
    server.stop()


@pytest.fixture
def guarded(services: Services) -> Callable[..., Api]:
    """An application with other guards: access, body_limits."""
    return lambda **guards: Api(create_app(services, **guards))


@pytest.fixture
def locked_live(services: Services) -> Iterator[Live]:
    """Live, and with the API key "open sesame"."""
    server = Live(create_app(services, access=Access(api_key="open sesame")))
    yield server
    server.stop()


@pytest.fixture
def until() -> Callable[..., None]:
    return wait_until


@pytest.fixture
def leave() -> Callable[..., None]:
    """POSTs, and closes the connection once a condition has come true."""

    def ask_and_leave(url: str, path: str, body: object, when: Callable[[], bool]) -> None:
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=20)
        connection.request("POST", path, json.dumps(body))
        wait_until(when)
        connection.close()

    return ask_and_leave


@pytest.fixture
def prompt_of(engine: ScriptedEngine, tokenizer: Tokenizer) -> Callable[..., str]:
    """The prompt that the engine got, special tokens shown."""
    return lambda i=-1: tokenizer.decode(engine.submitted[i].prompt_ids, skip_special_tokens=False)


@pytest.fixture
def events() -> Callable[[str], list[Any]]:
    """The events of a stream that must end with [DONE]."""
    import orjson

    def read(text: str) -> list[Any]:
        parts = text.split("\n\n")
        assert parts[-2:] == ["data: [DONE]", ""]
        assert all(part.startswith("data: ") for part in parts[:-1])
        return [orjson.loads(part[6:]) for part in parts[:-2]]

    return read

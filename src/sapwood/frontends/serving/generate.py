"""Text requests of one HTTP request, run together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from typing import TypeVar

import msgspec

from sapwood.base.errors import EngineUnavailable, SapwoodError
from sapwood.frontends.serving.services import Services
from sapwood.observe.requests import ObservedRequest
from sapwood.schema.output import Finish, summed
from sapwood.text.allowance import AnswerAllowance
from sapwood.text.generation import TextChunk, TextRequest

T = TypeVar("T")


class EngineFailed(SapwoodError):
    """The engine ended a request with an error; status and type are the engine's."""

    def __init__(self, finish: Finish) -> None:
        super().__init__(finish.message or "the engine failed on this request and gave no reason")
        self.status = finish.status
        self.type = finish.error_type


_NOTHING = TextChunk(index=0, text="", token_ids=(), num_prompt_tokens=0, num_output_tokens=0)
_PARTS_AT_MOST = 256
"""Chunks that are kept apart: adding each to a long text at once would copy that text each time."""


@dataclass(slots=True)
class Choice:
    """One sample so far.

    last                  the newest chunk, which has the counts so far and the finish
    num_reasoning_tokens  output tokens that were thinking; None: thinking is not separated
    """

    last: TextChunk = _NOTHING
    num_reasoning_tokens: int | None = None
    _parts: list[TextChunk] = field(default_factory=list)
    _first_s: float | None = None
    _num_first_tokens: int = 0
    _last_s: float = 0.0

    def add(self, chunk: TextChunk) -> None:
        self._take(chunk)
        self._keep(chunk)

    def count(self, chunk: TextChunk) -> None:
        """Take over the chunk's counts, and what it tells of tokens, for answers that keep no
        text."""
        self._take(chunk)
        if chunk.hidden_states or chunk.routed_experts:
            kept = msgspec.structs.replace(
                _NOTHING, hidden_states=chunk.hidden_states, routed_experts=chunk.routed_experts
            )
            self._keep(kept)

    @property
    def whole(self) -> TextChunk:
        """The sum of all chunks that were added; of those that were counted, what they tell of
        tokens."""
        if len(self._parts) > 1:
            self._parts = [summed(self._parts)]
        return self._parts[0] if self._parts else _NOTHING

    def _keep(self, chunk: TextChunk) -> None:
        self._parts.append(chunk)
        if len(self._parts) > _PARTS_AT_MOST:
            self._parts = [summed(self._parts)]

    def _take(self, chunk: TextChunk) -> None:
        self._last_s = time.monotonic()
        if self._first_s is None and chunk.num_output_tokens:
            self._first_s, self._num_first_tokens = self._last_s, chunk.num_output_tokens
        self.last = chunk

    @property
    def decode_throughput(self) -> float | None:
        """Output tokens per second after the first chunk; None until more tokens have come."""
        seconds = self._last_s - (self._first_s or self._last_s)
        num_tokens = self.last.num_output_tokens - self._num_first_tokens
        return num_tokens / seconds if num_tokens > 0 and seconds > 0 else None


async def generate(
    services: Services, requests: Sequence[TextRequest], *, keeps_logprobs: bool = False
) -> AsyncGenerator[tuple[int, TextChunk], None]:
    """The chunks of all these requests as they come, each with its request's position.

    keeps_logprobs  the caller keeps the output's log probabilities until its end, so that these
                    too count for the server's limit

    Every text request of every dialect comes through this function, which counts and times it.
    Closing the generator early aborts the open requests; so does an error of any of them.
    Raises EngineUnavailable, EngineFailed, and InvalidRequest if an id is open already or the call
    exceeds the server's limits.
    """
    services.limits.check(requests)
    allowance = services.limits.allowance()
    if any(
        request.options.logprobs is not None or request.options.tells_of_tokens
        for request in requests
    ):
        requests = [replace(request, allowance=allowance) for request in requests]
    with services.observer.observing(requests) as observed:
        async with AsyncExitStack() as held:
            requests = await held.enter_async_context(adapted(services, requests))
            reason = services.engine.unavailable_reason
            if reason is not None:
                raise EngineUnavailable(f"the engine does not serve: {reason}; try again later")
            opened = [
                held.enter_context(services.generator.opened(request.request_id, request.n))
                for request in requests
            ]
            streams = [
                services.generator.generate(
                    request if observation.trace is None else _traced(request, observation), one
                )
                for request, observation, one in zip(requests, observed, opened, strict=True)
            ]
            held.enter_context(_turns(requests))
            async with aclosing(merged(streams)) as chunks:
                async for position, chunk in chunks:
                    observed[position].chunk(chunk)
                    _take(allowance, requests[position], chunk, keeps_logprobs=keeps_logprobs)
                    if chunk.finish is not None and chunk.finish.kind == "error":
                        raise EngineFailed(chunk.finish)
                    turn = requests[position].turn
                    if turn is not None:
                        turn.heard(chunk.token_ids, is_last=chunk.finish is not None)
                    yield position, chunk


@contextmanager
def _turns(requests: Sequence[TextRequest]) -> Iterator[None]:
    """While the `with` block runs, the requests' turns of sessions run."""
    turns = [request.turn for request in requests if request.turn is not None]
    for turn in turns:
        turn.begun()
    try:
        yield
    finally:
        for turn in turns:
            turn.ended()


@asynccontextmanager
async def adapted(
    services: Services, requests: Sequence[TextRequest]
) -> AsyncIterator[Sequence[TextRequest]]:
    """The same requests, with the engine's ids of their adapters instead of names; the adapters
    stay loaded inside."""
    names = {request.options.adapter for request in requests} - {""}
    if not names or services.adapters is None:
        yield requests
        return
    async with services.adapters.held(names) as ids:
        yield [
            replace(
                request,
                options=msgspec.structs.replace(
                    request.options, adapter=ids.get(request.options.adapter, "")
                ),
            )
            for request in requests
        ]


def _take(
    allowance: AnswerAllowance, request: TextRequest, chunk: TextChunk, *, keeps_logprobs: bool
) -> None:
    """Count what the chunk brought; InvalidRequest if it is too much for one answer."""
    if keeps_logprobs and chunk.logprobs is not None and request.options.logprobs is not None:
        allowance.take_logprobs(len(chunk.logprobs) * request.options.logprobs.num_per_token)
    if chunk.hidden_states:
        allowance.take_bytes("return_hidden_states", sum(map(len, chunk.hidden_states)))
    if chunk.routed_experts:
        allowance.take_bytes("return_routed_experts", sum(map(len, chunk.routed_experts)))


def _traced(request: TextRequest, observed: ObservedRequest) -> TextRequest:
    return replace(request, trace=observed.trace)


async def collect(services: Services, requests: Sequence[TextRequest]) -> list[list[Choice]]:
    """The finished samples of each of these requests. Raises the errors of `generate`."""
    choices = [[Choice() for _ in range(request.n)] for request in requests]
    async with aclosing(generate(services, requests, keeps_logprobs=True)) as chunks:
        async for position, chunk in chunks:
            choices[position][chunk.index].add(chunk)
    return choices


async def merged(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[tuple[int, T], None]:
    """Items of all streams as they come, each with its stream's position.

    A single stream is passed through; several take one task each, not one per item. The first
    error ends all; streams that are still open at the end are closed.
    """
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for item in only:
                yield 0, item
        return
    arrived: asyncio.Queue[tuple[int, T] | tuple[int]] = asyncio.Queue()

    async def pump(position: int, stream: AsyncGenerator[T, None]) -> None:
        try:
            async with aclosing(stream) as items:
                async for item in items:
                    arrived.put_nowait((position, item))
        finally:
            arrived.put_nowait((position,))

    pumps = [asyncio.ensure_future(pump(i, stream)) for i, stream in enumerate(streams)]
    try:
        num_open = len(pumps)
        while num_open:
            arrival = await arrived.get()
            if len(arrival) == 1:
                await pumps[arrival[0]]
                num_open -= 1
            else:
                yield arrival
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


def cached_by_tier(firsts: Iterable[TextChunk]) -> dict[str, int]:
    """How many cached prompt tokens came from the KV pool, from the host and from a storage.

    firsts  the last chunk of one sample per prompt
    """
    lasts = list(firsts)
    host = sum(last.tier_tokens[0] for last in lasts)
    storage = sum(last.tier_tokens[1] for last in lasts)
    device = max(sum(last.num_cached_tokens for last in lasts) - host - storage, 0)
    return {"device": device, "host": host, "storage": storage}


def media_tokens(firsts: Iterable[Choice]) -> dict[str, int]:
    """Prompt tokens that show pictures and videos, if any do.

    firsts  one sample per prompt
    """
    lasts = [sample.last for sample in firsts]
    counts = {
        "image_tokens": sum(last.num_image_tokens for last in lasts),
        "video_tokens": sum(last.num_video_tokens for last in lasts),
    }
    return {name: count for name, count in counts.items() if count}

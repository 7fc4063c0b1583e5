"""Text requests of one HTTP request, run together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import ExitStack, aclosing
from dataclasses import dataclass, field
from typing import TypeVar

from sapwood.base.errors import EngineUnavailable
from sapwood.frontends.common.errors import EngineFailed
from sapwood.frontends.common.services import Services
from sapwood.schema.output import Finish
from sapwood.text.generation import TextChunk, TextRequest

T = TypeVar("T")


@dataclass(slots=True)
class Choice:
    """What one sample of one prompt has brought so far."""

    parts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_cached_tokens: int = 0
    queue_time_s: float = 0.0
    finish: Finish | None = None

    def add(self, chunk: TextChunk) -> None:
        self.parts.append(chunk.text)
        self.token_ids.extend(chunk.token_ids)
        self.count(chunk)

    def count(self, chunk: TextChunk) -> None:
        """Take over the chunk's counters but not its text, for answers that keep none."""
        self.num_prompt_tokens = chunk.num_prompt_tokens
        self.num_output_tokens = chunk.num_output_tokens
        self.num_cached_tokens = chunk.num_cached_tokens
        self.queue_time_s = chunk.queue_time_s
        self.finish = chunk.finish

    @property
    def text(self) -> str:
        return "".join(self.parts)


async def generate(
    services: Services, requests: Sequence[TextRequest]
) -> AsyncGenerator[tuple[int, TextChunk], None]:
    """Chunks of all those requests as they come, each with its request's position.

    Closing it early aborts what is still open; so does an error of any of the requests.
    Raises EngineUnavailable, EngineFailed, or InvalidRequest if an id is already open.
    """
    reason = services.engine.unavailable_reason
    if reason is not None:
        raise EngineUnavailable(f"the engine does not serve: {reason}; try again later")
    with ExitStack() as held:
        for request in requests:
            held.enter_context(services.open_requests.held(request.request_id))
        streams = [services.generator.generate(request) for request in requests]
        async with aclosing(merged(streams)) as chunks:
            async for position, chunk in chunks:
                if chunk.finish is not None and chunk.finish.kind == "error":
                    raise EngineFailed(chunk.finish)
                yield position, chunk


async def collect(services: Services, requests: Sequence[TextRequest]) -> list[list[Choice]]:
    """The finished samples of each of those requests; raises as `generate` does."""
    choices = [[Choice() for _ in range(request.n)] for request in requests]
    async with aclosing(generate(services, requests)) as chunks:
        async for position, chunk in chunks:
            choices[position][chunk.index].add(chunk)
    return choices


async def merged(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[tuple[int, T], None]:
    """Items of all streams as they come, each with its stream's position.

    One stream is passed through; several take one task each, not one per item. The first error
    ends it; streams that are still open when it ends are closed.
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

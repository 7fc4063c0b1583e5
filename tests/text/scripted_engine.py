"""An engine that answers from a script, for tests of the text around it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from typing import Any

from sapwood.schema.output import (
    CacheFlushed,
    EngineReady,
    EngineStatus,
    Finish,
    RequestOutput,
)
from sapwood.schema.request import Generate, RequestOptions
from sapwood.schema.sampling import SamplingParams
from sapwood.text.generation import TextChunk, TextGenerator, TextRequest
from sapwood.text.tokenizer import Tokenizer

LENGTH = Finish(kind="length")
Script = list[tuple[list[int], Finish | None]]


class ScriptedEngine:
    """Answers each request with a script; after the last line it waits until it is aborted.

    requests  what was submitted
    closed    ids of requests whose iterator was closed while they ran
    aborted   ids that were aborted by name
    """

    def __init__(self, script: Script | Callable[[Generate], Script], *, pause: int = 1) -> None:
        self._script = script
        self._pause = pause
        self.requests: list[Generate] = []
        self.closed: list[str] = []
        self.aborted: list[str] = []
        self._stop: dict[str, asyncio.Event] = {}
        self.info = EngineReady(context_length=32, max_total_tokens=64, page_size=8, notes=[])
        self.unavailable_reason: str | None = None

    async def generate(self, request: Generate) -> AsyncGenerator[RequestOutput, None]:
        self.requests.append(request)
        script = self._script(request) if callable(self._script) else self._script
        stop = self._stop[request.request_id] = asyncio.Event()
        finished = False
        try:
            for token_ids, finish in script:
                for _ in range(self._pause):
                    await asyncio.sleep(0)
                finished = finish is not None
                yield output(request, token_ids, finish)
                if finished:
                    return
            await stop.wait()
            finished = True
            yield output(request, [], Finish(kind="abort"))
        finally:
            if not finished:
                self.closed.append(request.request_id)

    async def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        if request_id in self._stop:
            self._stop[request_id].set()

    async def flush_cache(self) -> CacheFlushed:
        raise NotImplementedError

    async def status(self) -> EngineStatus:
        raise NotImplementedError


def output(request: Generate, token_ids: list[int], finish: Finish | None) -> RequestOutput:
    return RequestOutput(
        request_id=request.request_id,
        token_ids=token_ids,
        num_prompt_tokens=len(request.prompt_ids),
        num_cached_tokens=1,
        queue_time_s=0.5,
        finish=finish,
    )


def one_by_one(token_ids: Sequence[int], finish: Finish | None = LENGTH) -> Script:
    script: Script = [([token_id], None) for token_id in token_ids]
    if finish is not None:
        script[-1] = (script[-1][0], finish)
    return script


def ask(prompt: str | list[int] = "Hello", *, n: int = 1, **sampling: Any) -> TextRequest:
    return TextRequest(
        request_id="r",
        prompt=prompt,
        n=n,
        options=RequestOptions(sampling=SamplingParams(**sampling)),
    )


async def let_others_run() -> None:
    """Let every other task of the loop get as far as it can without waiting for time to pass."""
    for _ in range(200):
        await asyncio.sleep(0)


def run(work: Coroutine[Any, Any, Any]) -> Any:
    """Run to the end, and see that no task is left behind."""

    async def checked() -> Any:
        result = await work
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return result

    return asyncio.run(checked())


def chunks_of(
    engine: ScriptedEngine, tokenizer: Tokenizer, request: TextRequest
) -> list[TextChunk]:
    async def collect() -> list[TextChunk]:
        return [chunk async for chunk in TextGenerator(engine, tokenizer).generate(request)]

    return run(collect())  # type: ignore[no-any-return]


def text_of(chunks: Sequence[TextChunk], index: int = 0) -> str:
    return "".join(chunk.text for chunk in chunks if chunk.index == index)


def ids_of(chunks: Sequence[TextChunk], index: int = 0) -> list[int]:
    return [token_id for chunk in chunks if chunk.index == index for token_id in chunk.token_ids]

"""Requests that end before their text does: who leaves, and who is told."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import pytest

from sapwood.schema.output import (
    Finish,
    RequestOutput,
)
from sapwood.schema.request import Generate
from sapwood.text.generation import TextChunk, TextGenerator
from sapwood.text.tokenizer import Tokenizer
from tests.text.scripted_engine import (
    ScriptedEngine,
    ask,
    chunks_of,
    let_others_run,
    one_by_one,
    output,
    run,
    text_of,
)


@pytest.fixture
def tokenizer(byte_level_tokenizer) -> Tokenizer:
    return byte_level_tokenizer


@pytest.mark.parametrize("n", [1, 3])
def test_closing_early_aborts_every_sample(tokenizer, n):
    engine = ScriptedEngine(one_by_one(tokenizer.encode("a b c"), None))

    async def disconnect() -> None:
        generator = TextGenerator(engine, tokenizer)
        chunks = generator.generate(ask(n=n))
        await anext(chunks)
        await chunks.aclose()
        assert len(engine.closed) == n
        # The id is free again.
        again = generator.generate(ask(n=n))
        await anext(again)
        await again.aclose()

    run(disconnect())
    ids = ["r"] if n == 1 else ["r-0", "r-1", "r-2"]
    assert sorted(engine.closed) == sorted(ids * 2)


@pytest.mark.parametrize("n", [1, 3])
def test_cancelling_the_reader_aborts_every_sample(tokenizer, n):
    engine = ScriptedEngine(one_by_one(tokenizer.encode("a b c"), None))

    async def cancel() -> None:
        async def read() -> None:
            async for _ in TextGenerator(engine, tokenizer).generate(ask(n=n)):
                continue

        reader = asyncio.create_task(read())
        while len(engine.requests) < n:
            await asyncio.sleep(0)
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader

    run(cancel())
    assert len(engine.closed) == n


def test_an_iterator_that_cannot_be_closed_is_aborted_by_its_id(tokenizer):
    ids = tokenizer.encode("stop STOP more")

    class PlainIterator:
        def __init__(self, request: Generate) -> None:
            self._outputs = iter([output(request, [token_id], None) for token_id in ids])

        def __aiter__(self) -> AsyncIterator[RequestOutput]:
            return self

        async def __anext__(self) -> RequestOutput:
            return next(self._outputs)

    class PlainEngine(ScriptedEngine):
        def generate(self, request: Generate) -> Any:
            return PlainIterator(request)

    engine = PlainEngine([])
    assert text_of(chunks_of(engine, tokenizer, ask(stop=("STOP",)))) == "stop "
    assert engine.aborted == ["r"]


@pytest.mark.parametrize("n", [1, 2])
def test_abort_reaches_every_sample_and_ends_it(tokenizer, n):
    engine = ScriptedEngine(one_by_one(tokenizer.encode("a b"), None))

    async def aborted() -> list[TextChunk]:
        generator = TextGenerator(engine, tokenizer)
        chunks = []
        async for chunk in generator.generate(ask(n=n)):
            chunks.append(chunk)
            if chunk.finish is None and chunk.index == 0:
                await generator.abort("r")
        await generator.abort("r")
        await generator.abort("unknown")
        return chunks

    chunks = run(aborted())
    finishes = [chunk.finish for chunk in chunks if chunk.finish]
    assert finishes == [Finish(kind="abort")] * n
    assert set(engine.aborted) == ({"r"} if n == 1 else {"r-0", "r-1"})


@pytest.mark.parametrize("n", [1, 2])
def test_an_abort_while_the_prompt_is_encoded_is_heard(tokenizer, monkeypatch, n):
    engine = ScriptedEngine(one_by_one(tokenizer.encode("a b"), None))
    generator = TextGenerator(engine, tokenizer, context_length=256)
    encoding, may_end = threading.Event(), threading.Event()
    encode = tokenizer.encode

    def slowly(text: str, add_special_tokens: bool = True) -> list[int]:
        encoding.set()
        assert may_end.wait(10)
        return encode("Hello", add_special_tokens)

    monkeypatch.setattr(tokenizer, "encode", slowly)

    async def abort_early() -> list[TextChunk]:
        async def read() -> list[TextChunk]:
            return [chunk async for chunk in generator.generate(ask("Hello " * 2000, n=n))]

        reader = asyncio.create_task(read())
        await asyncio.to_thread(encoding.wait, 10)
        await generator.abort("r")
        may_end.set()
        return await reader

    chunks = run(abort_early())
    assert [(chunk.index, chunk.finish) for chunk in chunks] == [
        (index, Finish(kind="abort")) for index in range(n)
    ]
    assert chunks[0].num_prompt_tokens == len(encode("Hello"))
    assert (engine.requests, engine.aborted) == ([], [])


def test_a_client_that_leaves_while_its_prompt_is_encoded_starts_nothing(tokenizer, monkeypatch):
    engine = ScriptedEngine(one_by_one(tokenizer.encode("a b"), None))
    generator = TextGenerator(engine, tokenizer, context_length=256)
    encoding, may_end, has_ended = threading.Event(), threading.Event(), threading.Event()

    def slowly(text: str, add_special_tokens: bool = True) -> list[int]:
        encoding.set()
        assert may_end.wait(10)
        has_ended.set()
        return [1, 2]

    async def leave() -> None:
        monkeypatch.setattr(tokenizer, "encode", slowly)
        reader = asyncio.ensure_future(anext(generator.generate(ask("Hello " * 2000))))
        await asyncio.to_thread(encoding.wait, 10)
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        may_end.set()
        assert await asyncio.to_thread(has_ended.wait, 10)
        await let_others_run()
        assert engine.requests == []
        # The id is free again.
        monkeypatch.undo()
        again = generator.generate(ask())
        await anext(again)
        await again.aclose()

    run(leave())


def test_an_abort_between_two_samples_stops_the_one_that_has_not_started(tokenizer):
    engine = ScriptedEngine(one_by_one(tokenizer.encode("a b"), None))
    generator = TextGenerator(engine, tokenizer)

    class Curious(ScriptedEngine):
        def generate(self, request: Generate) -> AsyncGenerator[RequestOutput, None]:
            aborting.append(asyncio.ensure_future(generator.abort("r")))
            return super().generate(request)

    aborting: list[asyncio.Future[None]] = []
    engine.__class__ = Curious

    async def read() -> list[TextChunk]:
        chunks = [chunk async for chunk in generator.generate(ask(n=3))]
        await asyncio.gather(*aborting)
        return chunks

    finishes = [chunk.finish for chunk in run(read()) if chunk.finish]
    assert finishes == [Finish(kind="abort")] * 3

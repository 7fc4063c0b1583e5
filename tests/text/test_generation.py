"""Text in, text out, over an engine that answers from a script."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from typing import Any

import pytest

from sapwood.base.errors import EngineUnavailable, InvalidRequest, PromptTooLong
from sapwood.schema.output import (
    CacheFlushed,
    EngineReady,
    EngineStatus,
    Finish,
    RequestOutput,
)
from sapwood.schema.request import Generate
from sapwood.schema.sampling import SamplingParams
from sapwood.text.generation import MAX_SAMPLES, TextChunk, TextGenerator, TextRequest
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
    return TextRequest(request_id="r", prompt=prompt, n=n, sampling=SamplingParams(**sampling))


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


@pytest.fixture
def tokenizer(byte_level_tokenizer) -> Tokenizer:
    return byte_level_tokenizer


def test_tokens_become_text_with_the_counts(tokenizer):
    ids = tokenizer.encode("Hello, 你好 😀")
    engine = ScriptedEngine(one_by_one(ids))
    chunks = chunks_of(engine, tokenizer, ask("Hello world", temperature=0.0))
    assert text_of(chunks) == "Hello, 你好 😀"
    assert ids_of(chunks) == ids
    assert [chunk.num_output_tokens for chunk in chunks] == list(range(1, len(ids) + 1))
    assert [chunk.finish for chunk in chunks] == [None] * (len(ids) - 1) + [LENGTH]
    prompt_ids = tokenizer.encode("Hello world")
    last = chunks[-1]
    assert (last.num_prompt_tokens, last.num_cached_tokens) == (len(prompt_ids), 1)
    assert last.queue_time_s == 0.5
    [request] = engine.requests
    assert (request.request_id, request.prompt_ids) == ("r", prompt_ids)
    assert (engine.closed, engine.aborted) == ([], [])


def test_what_is_incomplete_comes_with_the_last_chunk(tokenizer):
    ids = tokenizer.encode("ok \U0001f9ff")[:-1]
    chunks = chunks_of(ScriptedEngine(one_by_one(ids)), tokenizer, ask())
    assert text_of(chunks) == "ok \ufffd"
    assert "\ufffd" not in text_of(chunks[:-1])


@pytest.mark.parametrize("no_stop_trim", [False, True])
@pytest.mark.parametrize("at_once", [False, True])
def test_a_stop_string_ends_the_request_at_its_token(tokenizer, no_stop_trim, at_once):
    ids = tokenizer.encode("one. two\n\nUser: three")
    end = next(i for i in range(len(ids)) if "User:" in tokenizer.decode(ids[: i + 1])) + 1
    script = [(ids, None)] if at_once else one_by_one(ids, None)
    engine = ScriptedEngine(script)
    request = ask(stop=("never", "\n\nUser:"), no_stop_trim=no_stop_trim)
    chunks = chunks_of(engine, tokenizer, request)
    assert text_of(chunks) == ("one. two\n\nUser:" if no_stop_trim else "one. two")
    assert ids_of(chunks) == ids[:end]
    assert chunks[-1].num_output_tokens == end
    assert [chunk.finish for chunk in chunks if chunk.finish] == [
        Finish(kind="stop", matched="\n\nUser:")
    ]
    assert engine.closed == ["r"]


@pytest.mark.parametrize("n", [1, 2])
def test_the_engine_has_stopped_before_the_last_chunk_is_out(tokenizer, n):
    engine = ScriptedEngine(one_by_one(tokenizer.encode("one STOP two"), None))

    async def read() -> None:
        async for chunk in TextGenerator(engine, tokenizer).generate(ask(n=n, stop=("STOP",))):
            if chunk.finish is not None:
                assert engine.closed[chunk.index] == ("r" if n == 1 else f"r-{chunk.index}")

    run(read())
    assert len(engine.closed) == n


def test_text_that_only_began_like_a_stop_is_shown_at_the_end(tokenizer):
    ids = tokenizer.encode("one\n\nUse")
    chunks = chunks_of(ScriptedEngine(one_by_one(ids)), tokenizer, ask(stop=("\n\nUser:",)))
    assert text_of(chunks) == "one\n\nUse"
    assert chunks[-1].finish == LENGTH


def test_a_stop_that_the_end_completes_counts(tokenizer):
    ids = tokenizer.encode("ok \U0001f9ff")[:-1]
    chunks = chunks_of(ScriptedEngine(one_by_one(ids)), tokenizer, ask(stop=("\ufffd",)))
    assert text_of(chunks) == "ok "
    assert chunks[-1].finish == Finish(kind="stop", matched="\ufffd")
    assert ids_of(chunks) == ids


@pytest.mark.parametrize("stop", [(), ("never",)])
@pytest.mark.parametrize(
    ("token", "options", "expected"),
    [
        ("<|end|>", {}, "yes"),
        ("<|end|>", {"skip_special_tokens": False}, "yes"),
        ("<|end|>", {"no_stop_trim": True}, "yes"),
        ("<|end|>", {"no_stop_trim": True, "skip_special_tokens": False}, "yes<|end|>"),
        ("!", {}, "yes"),
        ("!", {"no_stop_trim": True}, "yes!"),
    ],
)
def test_the_stop_token_is_trimmed(tokenizer, token, options, expected, stop):
    [stop_id] = tokenizer.encode(token)
    ids = [*tokenizer.encode("yes"), stop_id]
    finish = Finish(kind="stop", matched=stop_id)
    engine = ScriptedEngine(one_by_one(ids, finish))
    chunks = chunks_of(engine, tokenizer, ask(stop_token_ids=(stop_id,), stop=stop, **options))
    assert text_of(chunks) == expected
    assert ids_of(chunks) == ids
    assert chunks[-1].finish == finish
    assert chunks[-1].num_output_tokens == len(ids)


def test_a_token_at_a_length_limit_is_not_trimmed(tokenizer):
    ids = tokenizer.encode("yes!")
    assert text_of(chunks_of(ScriptedEngine(one_by_one(ids)), tokenizer, ask())) == "yes!"


def test_samples_are_merged_with_their_own_ids_and_seeds(tokenizer):
    texts = ["first answer", "second, longer answer", "third"]

    def script(request: Generate) -> Script:
        return one_by_one(tokenizer.encode(texts[int(request.request_id[-1])]))

    engine = ScriptedEngine(script)
    chunks = chunks_of(engine, tokenizer, ask(n=3, seed=2**64 - 2))
    for index, text in enumerate(texts):
        assert text_of(chunks, index) == text
        own = [chunk for chunk in chunks if chunk.index == index]
        assert [chunk.finish for chunk in own if chunk.finish] == [LENGTH]
        assert own[-1].num_output_tokens == len(tokenizer.encode(text))
    assert [request.request_id for request in engine.requests] == ["r-0", "r-1", "r-2"]
    assert [request.sampling.seed for request in engine.requests] == [2**64 - 2, 2**64 - 1, 0]
    assert (engine.closed, engine.aborted) == ([], [])


def test_samples_without_a_seed_get_none(tokenizer):
    engine = ScriptedEngine(one_by_one(tokenizer.encode("x")))
    chunks_of(engine, tokenizer, ask(n=2))
    assert [request.sampling.seed for request in engine.requests] == [None, None]


def test_chunks_of_a_sample_that_wait_together_are_one(tokenizer):
    ids = tokenizer.encode("a text of several tokens")

    async def slowly() -> list[TextChunk]:
        chunks = []
        generator = TextGenerator(ScriptedEngine(one_by_one(ids)), tokenizer)
        async for chunk in generator.generate(ask(n=2)):
            chunks.append(chunk)
            await asyncio.sleep(0.02)
        return chunks

    chunks = run(slowly())
    assert len(chunks) <= 4
    for index in (0, 1):
        assert text_of(chunks, index) == "a text of several tokens"
        assert ids_of(chunks, index) == ids


def test_one_sample_that_stops_leaves_the_others_running(tokenizer):
    def script(request: Generate) -> Script:
        if request.request_id == "r-0":
            return one_by_one(tokenizer.encode("stop STOP never shown"), None)
        return one_by_one(tokenizer.encode("this one goes on for longer"))

    engine = ScriptedEngine(script)
    chunks = chunks_of(engine, tokenizer, ask(n=2, stop=("STOP",)))
    assert (text_of(chunks, 0), text_of(chunks, 1)) == ("stop ", "this one goes on for longer")
    assert engine.closed == ["r-0"]


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
        await asyncio.sleep(0.02)
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
def test_an_engine_error_is_passed_on_after_the_text(tokenizer, n):
    error = Finish(kind="error", message="the engine died", status=503)
    ids = tokenizer.encode("partial")
    chunks = chunks_of(ScriptedEngine([(ids, None), ([], error)]), tokenizer, ask(n=n))
    for index in range(n):
        assert text_of(chunks, index) == "partial"
        own = [chunk for chunk in chunks if chunk.index == index]
        assert own[-1].finish == error


def test_a_stream_that_ends_without_a_finish_becomes_an_error(tokenizer):
    class Silent(ScriptedEngine):
        async def generate(self, request: Generate) -> AsyncGenerator[RequestOutput, None]:
            yield output(request, tokenizer.encode("so"), None)

    [first, last] = chunks_of(Silent([]), tokenizer, ask())
    assert first.text == "so"
    assert last.finish is not None
    assert last.finish.kind == "error"
    assert last.num_output_tokens == first.num_output_tokens


@pytest.mark.parametrize("n", [1, 2])
def test_what_the_engine_raises_reaches_the_reader(tokenizer, n):
    class Failing(ScriptedEngine):
        async def generate(self, request: Generate) -> AsyncGenerator[RequestOutput, None]:
            if request.request_id == "r-0" or n == 1:
                raise EngineUnavailable("the engine is starting")
            async for each in super().generate(request):
                yield each

    engine = Failing([])
    with pytest.raises(EngineUnavailable, match="starting"):
        chunks_of(engine, tokenizer, ask(n=n))


def test_prompts_that_cannot_be_served_are_refused_before_the_engine_sees_them(tokenizer):
    engine = ScriptedEngine([])
    size = tokenizer.vocab_size
    cases: list[tuple[TextRequest, type[Exception], str]] = [
        (ask(""), InvalidRequest, "empty"),
        (ask([]), InvalidRequest, "empty"),
        (ask([1, size, 2]), InvalidRequest, rf"token id {size} but .* in \[0, {size - 1}\]"),
        (ask([1, -3]), InvalidRequest, "token id -3"),
        (ask([1] * 32), PromptTooLong, "32 tokens but the context length of 32 allows at most 31"),
        (ask("a" + " a" * 40), PromptTooLong, "shorten it"),
    ]
    for request, error, message in cases:
        with pytest.raises(error, match=message) as info:
            chunks_of(engine, tokenizer, request)
        assert info.value.param == "prompt"  # type: ignore[attr-defined]
    assert engine.requests == []


def test_the_longest_prompt_that_fits_is_served(tokenizer):
    engine = ScriptedEngine([([1], LENGTH)])
    assert len(chunks_of(engine, tokenizer, ask([1] * 31))) == 1
    generator = TextGenerator(engine, tokenizer, context_length=8)
    with pytest.raises(PromptTooLong):
        asyncio.run(generator.encode_prompt(ask([1] * 8)))


def test_ids_are_taken_as_they_are_and_text_gets_bos_if_asked(backends, bos_processor):
    backend = backends["byte_level"]()
    backend.post_processor = bos_processor(backend, "<|begin|>")
    tokenizer = Tokenizer(backend)
    generator = TextGenerator(ScriptedEngine([]), tokenizer)

    def encoded(prompt: str | list[int], add: bool) -> list[int]:
        request = TextRequest(
            request_id="r", prompt=prompt, add_special_tokens=add, sampling=SamplingParams()
        )
        return asyncio.run(generator.encode_prompt(request))

    bare = tokenizer.encode("Hello", False)
    assert encoded("Hello", True) == [0, *bare]
    assert encoded("Hello", False) == bare
    assert encoded(bare, True) == bare


def test_a_long_prompt_is_encoded_off_the_event_loop(tokenizer):
    text = "Hello world, how are you today? " * 20_000
    generator = TextGenerator(ScriptedEngine([]), tokenizer, context_length=10**9)

    async def ticks_while_encoding() -> int:
        encoding = asyncio.create_task(generator.encode_prompt(ask(text)))
        ticks = 0
        while not encoding.done():
            await asyncio.sleep(0.001)
            ticks += 1
        assert await encoding == tokenizer.encode(text)
        return ticks

    assert asyncio.run(ticks_while_encoding()) > 10


def test_an_id_that_still_runs_is_refused(tokenizer):
    engine = ScriptedEngine(one_by_one(tokenizer.encode("a b"), None))

    async def twice() -> None:
        generator = TextGenerator(engine, tokenizer)
        first = generator.generate(ask())
        await anext(first)
        with pytest.raises(InvalidRequest, match="still running"):
            await anext(generator.generate(ask()))
        await first.aclose()

    run(twice())
    assert len(engine.requests) == 1


@pytest.mark.parametrize("n", [0, MAX_SAMPLES + 1])
def test_a_number_of_samples_out_of_range_is_refused(n):
    with pytest.raises(InvalidRequest, match=rf"n is {n} but must be in \[1, {MAX_SAMPLES}\]"):
        ask(n=n)


def test_one_sample_needs_no_task_of_its_own(tokenizer):
    engine = ScriptedEngine(one_by_one(tokenizer.encode("a b c")))

    async def count_tasks() -> set[int]:
        counts = set()
        async for _ in TextGenerator(engine, tokenizer).generate(ask()):
            counts.add(len(asyncio.all_tasks()))
        return counts

    assert asyncio.run(count_tasks()) == {1}


@pytest.mark.parametrize(
    ("sampling", "param", "wrong"),
    [
        ({"logit_bias": {1: 1.0, 5_000_000: 1.0}}, "logit_bias", 5_000_000),
        ({"stop_token_ids": (1, -2)}, "stop_token_ids", -2),
    ],
)
def test_parameters_that_name_no_token_are_refused(tokenizer, sampling, param, wrong):
    engine = ScriptedEngine([])
    last = tokenizer.vocab_size - 1
    message = rf"{param} has the token id {wrong} but this model's ids are in \[0, {last}\]"
    with pytest.raises(InvalidRequest, match=message) as info:
        chunks_of(engine, tokenizer, ask(**sampling))
    assert info.value.param == param
    assert engine.requests == []


def test_a_model_with_fewer_ids_than_its_tokenizer_says_so(tokenizer):
    """An id without an embedding must not reach the engine, whoever brings it."""
    text = "Hello world"
    largest = max(tokenizer.encode(text))
    engine = ScriptedEngine([([1], LENGTH)])

    async def first(generator: TextGenerator, request: TextRequest) -> TextChunk:
        return await anext(generator.generate(request))

    small = TextGenerator(engine, tokenizer, vocab_size=largest)
    for request, param in [
        (ask(text), "prompt"),
        (ask([largest]), "prompt"),
        (ask("a", stop_token_ids=(largest,)), "stop_token_ids"),
    ]:
        with pytest.raises(InvalidRequest, match=rf"id {largest} .* \[0, {largest - 1}\]") as info:
            asyncio.run(first(small, request))
        assert info.value.param == param
    assert engine.requests == []
    padded = TextGenerator(engine, tokenizer, vocab_size=tokenizer.vocab_size + 64)
    assert padded.vocab_size == tokenizer.vocab_size
    assert asyncio.run(first(padded, ask(text))).finish == LENGTH


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
    encoding, may_end = threading.Event(), threading.Event()

    def slowly(text: str, add_special_tokens: bool = True) -> list[int]:
        encoding.set()
        assert may_end.wait(10)
        return [1, 2]

    async def leave() -> None:
        monkeypatch.setattr(tokenizer, "encode", slowly)
        reader = asyncio.ensure_future(anext(generator.generate(ask("Hello " * 2000))))
        await asyncio.to_thread(encoding.wait, 10)
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        may_end.set()
        await asyncio.sleep(0.02)
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


def test_a_refused_request_leaves_its_id_free(tokenizer):
    generator = TextGenerator(ScriptedEngine([([1], LENGTH)]), tokenizer)

    async def read(request: TextRequest) -> list[TextChunk]:
        return [chunk async for chunk in generator.generate(request)]

    for request in (ask(""), ask(stop_token_ids=(10**9,))):
        with pytest.raises(InvalidRequest):
            asyncio.run(read(request))
    assert len(asyncio.run(read(ask()))) == 1


def test_a_text_that_cannot_fit_is_refused_before_it_is_encoded(tokenizer, monkeypatch):
    def never(text: str, add_special_tokens: bool = True) -> list[int]:
        raise AssertionError("it was encoded")

    monkeypatch.setattr(tokenizer, "encode", never)
    generator = TextGenerator(ScriptedEngine([]), tokenizer, context_length=8)
    with pytest.raises(InvalidRequest, match="1025 characters"):
        asyncio.run(anext(generator.generate(ask("x" * 1025))))

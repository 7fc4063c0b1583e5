"""Text in, text out, over an engine that answers from a script."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from sapwood.base.errors import EngineUnavailable, InvalidRequest, PromptTooLong
from sapwood.schema.output import (
    Finish,
    RequestOutput,
)
from sapwood.schema.request import Generate, RequestOptions
from sapwood.schema.sampling import SamplingParams
from sapwood.text.generation import MAX_SAMPLES, TextChunk, TextGenerator, TextRequest
from sapwood.text.tokenizer import Tokenizer
from tests.text.scripted_engine import (
    LENGTH,
    Script,
    ScriptedEngine,
    ask,
    chunks_of,
    ids_of,
    let_others_run,
    one_by_one,
    output,
    run,
    text_of,
)


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
    assert [request.options.sampling.seed for request in engine.requests] == [
        2**64 - 2,
        2**64 - 1,
        0,
    ]
    assert (engine.closed, engine.aborted) == ([], [])


def test_samples_without_a_seed_get_none(tokenizer):
    engine = ScriptedEngine(one_by_one(tokenizer.encode("x")))
    chunks_of(engine, tokenizer, ask(n=2))
    assert [request.options.sampling.seed for request in engine.requests] == [None, None]


def test_chunks_of_a_sample_that_wait_together_are_one(tokenizer):
    ids = tokenizer.encode("a text of several tokens")

    async def slowly() -> list[TextChunk]:
        chunks = []
        generator = TextGenerator(ScriptedEngine(one_by_one(ids)), tokenizer)
        async for chunk in generator.generate(ask(n=2)):
            chunks.append(chunk)
            await let_others_run()
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
        (
            ask([1] * 32),
            PromptTooLong,
            "prompt is too long: it has 32 tokens, but the context length of 32 allows at most 31",
        ),
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
            request_id="r",
            prompt=prompt,
            add_special_tokens=add,
            options=RequestOptions(sampling=SamplingParams()),
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
        with pytest.raises(InvalidRequest, match="'r' is still open"):
            await anext(generator.generate(ask()))
        await first.aclose()

    run(twice())
    assert len(engine.requests) == 1


def test_an_id_may_not_be_that_of_a_sample_of_an_open_request(tokenizer):
    generator = TextGenerator(ScriptedEngine([]), tokenizer)
    with generator.opened("r", 3), generator.opened("r-3"):
        assert generator.open_ids("r") == ["r", "r-3"]
        for name, n in (("r-1", 1), ("r-3", 1), ("r", 3)):
            refused = pytest.raises(InvalidRequest, match=f"rid '{name}' is still open")
            with refused, generator.opened(name, n):
                pass
    assert generator.open_ids("") == []
    with generator.opened("r-1"):
        pass


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

"""The Python API over a real engine with a tiny model."""

from __future__ import annotations

import asyncio
import gc
import importlib.metadata
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sapwood import LLM, GenerationResult, SamplingParams
from sapwood.base import registry
from sapwood.base.errors import (
    ConfigError,
    EngineUnavailable,
    InvalidRequest,
    ModelSourceError,
    Overloaded,
)
from sapwood.schema.config.engine import EngineConfig
from sapwood.schema.config.model import ModelConfig
from sapwood.schema.step import StepPlan, StepResult
from sapwood.text.generation import TextChunk
from tests.tiny import CONTEXT

MakeLLM = Callable[..., LLM]
GREEDY = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
LONG = {"temperature": 0, "max_new_tokens": 200, "ignore_eos": True}


def until(condition: Callable[[], bool], limit_s: float = 10.0) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "the condition did not come true"
        time.sleep(0.002)


def is_idle(llm: LLM) -> bool:
    stats = llm.stats()
    return stats.num_running == 0 and stats.num_waiting == 0 and stats.num_leased_pages == 0


def slow_down(llm: LLM, step_s: float = 0.01) -> None:
    """Make every step last, so that a request is still open when the test gets to it."""
    replace_step(llm, lambda execute, plan: (time.sleep(step_s), execute(plan))[1])


def replace_step(
    llm: LLM, step: Callable[[Callable[[StepPlan], StepResult], StepPlan], StepResult]
) -> None:
    engine = llm._engine._engine
    assert engine is not None
    execute = engine.executor._execute
    engine.executor._execute = lambda plan: step(execute, plan)


@pytest.fixture
def sigint() -> Iterator[None]:
    """SIGINT as in a terminal: a shell's background job starts with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class TestPrompts:
    def test_text_and_token_ids_are_the_same_prompt(self, make_llm: MakeLLM) -> None:
        llm = make_llm()
        token_ids = llm.services.tokenizer.encode("Hello")
        [text] = llm.generate("Hello", GREEDY)
        [ids] = llm.generate(token_ids, GREEDY)
        [as_tuple] = llm.generate(tuple(token_ids), GREEDY)
        both = llm.generate(["Hello", token_ids], GREEDY)
        assert {one.token_ids for one in [text, ids, as_tuple, *both]} == {text.token_ids}
        assert len(text.token_ids) == text.num_output_tokens == 8
        assert text.num_prompt_tokens == 5
        assert [one.prompt_index for one in both] == [0, 1]

    def test_a_step_does_not_look_through_the_packages(
        self, make_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """That takes ten times as long as a small model's step."""
        llm = make_llm()
        llm.generate(["Hi"])

        def look(**_: object) -> None:
            raise AssertionError("a step looks for entry points")

        monkeypatch.setattr(importlib.metadata, "entry_points", look)
        monkeypatch.setattr(registry, "entry_points", look)
        assert llm.generate(["Hi", "Ho"])

    def test_no_prompts_give_no_results(self, make_llm: MakeLLM) -> None:
        llm = make_llm()
        assert llm.generate([]) == []
        assert llm.chat([]) == []

    @pytest.mark.parametrize(
        ("prompts", "words"),
        [
            (5, "not a int"),
            (b"bytes", "not a bytes"),
            ([1, "a"], "a list with a str in it"),
            (["a", None], r"prompts\[1\] must be a text or a list of token ids, not a NoneType"),
            (["a", [1, 2.5]], r"prompts\[1\] .* with a float in it"),
            ("", "the prompt is empty"),
            ([[]], "the prompt is empty"),
            ([5000], r"the token id 5000 but this model's ids are in \[0, 257\]"),
            ([1] * CONTEXT, "shorten it by 1"),
        ],
    )
    def test_what_is_no_prompt_is_refused(
        self, make_llm: MakeLLM, prompts: object, words: str
    ) -> None:
        with pytest.raises(InvalidRequest, match=words):
            make_llm().generate(prompts, GREEDY)  # type: ignore[arg-type]

    def test_conversations(self, make_llm: MakeLLM) -> None:
        llm = make_llm()
        message = [{"role": "user", "content": "Hi"}]
        [one] = llm.chat(message, GREEDY)
        two = llm.chat([message, message], [GREEDY, {**GREEDY, "max_new_tokens": 3}])
        assert [result.num_output_tokens for result in two] == [8, 3]
        assert two[0].token_ids == one.token_ids
        streamed = "".join(chunk.text for chunk in llm.stream_chat(message, GREEDY))
        assert streamed == one.text
        for wrong in ([[]], "Hi", [["Hi"]]):
            with pytest.raises(InvalidRequest, match="a conversation must be"):
                llm.chat(wrong)  # type: ignore[arg-type]
        with pytest.raises(InvalidRequest, match="a conversation must be"):
            llm.stream_chat([])


class TestSampling:
    @pytest.mark.parametrize(
        ("sampling", "param", "words"),
        [
            ({"max_tokens": 4}, "max_tokens", "did you mean 'max_new_tokens'"),
            ({"sampling_seed": 4}, "sampling_seed", "did you mean 'seed'"),
            ({"qqq": 4}, "qqq", "known: max_new_tokens, min_new_tokens"),
            ({"temperature": "hot"}, "temperature", "temperature: expected float, got str"),
            ({"temperature": -1}, "temperature", "must be in"),
            ({"stop": ["a", 5]}, "stop", r"stop\[1\]: expected str"),
            (SamplingParams(ignore_eos=1), "ignore_eos", "expected bool, got int"),
            ({"logit_bias": {258: 1.0}}, "logit_bias", "logit_bias has the token id 258"),
            ({"stop_token_ids": [7, 9000]}, "stop_token_ids", r"9000 .* in \[0, 257\]"),
            ({"stop_token_ids": [-1]}, "stop_token_ids", "the token id -1"),
        ],
    )
    def test_a_mistake_is_named(
        self, make_llm: MakeLLM, sampling: object, param: str, words: str
    ) -> None:
        with pytest.raises(InvalidRequest, match=words) as caught:
            make_llm().generate("Hi", sampling)  # type: ignore[arg-type]
        assert caught.value.param == param

    def test_a_stop_string_may_stand_alone(self, make_llm: MakeLLM) -> None:
        llm = make_llm()
        [whole] = llm.generate("Hello there", GREEDY)
        stop = llm.services.tokenizer.decode(whole.token_ids[3:4])
        for given in (
            {**GREEDY, "stop": stop},
            {**GREEDY, "stop": [stop]},
            SamplingParams(temperature=0.0, stop=stop),
        ):
            [stopped] = llm.generate("Hello there", given)
            assert stopped.finish.matched == stop
            assert stopped.text == whole.text[: whole.text.index(stop)]

    def test_one_for_all_or_one_each(self, make_llm: MakeLLM) -> None:
        llm = make_llm()
        lengths = [1, 2, 3]
        each = [{**GREEDY, "max_new_tokens": length} for length in lengths]
        assert [one.num_output_tokens for one in llm.generate(["a"] * 3, each)] == lengths
        with pytest.raises(InvalidRequest, match="2 sampling parameters for 3 prompts"):
            llm.generate(["a"] * 3, each[:2])

    def test_only_allowed_tokens_come(self, make_llm: MakeLLM) -> None:
        allowed = {"temperature": 1.0, "max_new_tokens": 12, "allowed_token_ids": [65, 66, 67]}
        [result] = make_llm().generate("Hello", allowed)
        assert len(result.token_ids) == 12
        assert set(result.token_ids) <= {65, 66, 67}

    def test_a_mapping_gets_the_models_defaults(self, tmp_path: Path, make_llm: MakeLLM) -> None:
        llm = make_llm()
        object.__setattr__(llm.services, "default_sampling", {"top_k": 1})
        results = [llm.generate("Hello", {"max_new_tokens": 6})[0].token_ids for _ in range(3)]
        assert len(set(results)) == 1


class TestManyPrompts:
    @pytest.mark.parametrize(("queued", "running"), [(0, 2), (1, 1), (3, 2), (2, 8)])
    def test_more_prompts_than_the_queue_holds(
        self, make_llm: MakeLLM, queued: int, running: int
    ) -> None:
        llm = make_llm(max_queued_requests=queued, max_running_requests=running)
        results = llm.generate([f"prompt {index}" for index in range(60)], GREEDY)
        assert [one.prompt_index for one in results] == list(range(60))
        assert all(one.num_output_tokens == 8 for one in results)
        assert llm.stats().num_refused == 0

    def test_threads_share_the_room(self, make_llm: MakeLLM) -> None:
        llm = make_llm(max_queued_requests=1, max_running_requests=2)
        alone = llm.generate("Hello", GREEDY)[0].token_ids
        results: list[tuple[int, ...]] = []

        def many() -> None:
            results.extend(one.token_ids for one in llm.generate(["Hello"] * 10, GREEDY))

        def one() -> None:
            chunks = list(llm.stream("Hello", GREEDY))
            results.append(tuple(token for chunk in chunks for token in chunk.token_ids))

        threads = [threading.Thread(target=target) for target in (many, one) * 3]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert results == [alone] * 33
        assert llm.stats().num_refused == 0

    def test_results_are_told_as_they_end(self, make_llm: MakeLLM) -> None:
        llm = make_llm()
        told: dict[int, GenerationResult] = {}
        sampling = [{**GREEDY, "max_new_tokens": length} for length in (200, 1, 5)]
        results = llm.generate(["a", "b", "c"], sampling, on_finish=told.__setitem__)
        assert list(told) == [1, 2, 0]
        assert [told[index] for index in range(3)] == results

    def test_an_error_of_one_ends_all_and_says_which(self, make_llm: MakeLLM) -> None:
        llm = make_llm()
        told: list[int] = []
        prompts = ["fine", "short", [9999], "fine"]
        sampling = [LONG, {**GREEDY, "max_new_tokens": 1}, LONG, LONG]
        slow_down(llm)
        with pytest.raises(InvalidRequest, match="9999") as caught:
            llm.generate(prompts, sampling, on_finish=lambda index, _: told.append(index))
        assert caught.value.__notes__ == ["this was prompt 2 of 4, from 0"]
        until(lambda: is_idle(llm))
        assert set(told) <= {1}
        assert llm.generate("again", GREEDY)[0].num_output_tokens == 8

    def test_an_error_of_on_finish_ends_all(self, make_llm: MakeLLM) -> None:
        llm = make_llm()

        def fail(index: int, result: GenerationResult) -> None:
            raise ZeroDivisionError("mine")

        with pytest.raises(ZeroDivisionError, match="mine"):
            llm.generate(["a", "b"], [GREEDY, LONG], on_finish=fail)
        until(lambda: is_idle(llm))

    def test_on_finish_cannot_wait_for_its_own_loop(self, make_llm: MakeLLM) -> None:
        llm = make_llm()
        for wait in (llm.stats, llm.close, lambda: next(llm.stream("a"))):
            with pytest.raises(RuntimeError, match=r"own event loop|on the loop"):
                llm.generate("a", GREEDY, on_finish=lambda *_, wait=wait: wait())
        assert llm.stats().num_finished == 3


class TestStreams:
    def test_chunks_make_up_the_whole(self, make_llm: MakeLLM) -> None:
        llm = make_llm()
        [whole] = llm.generate("Hello", GREEDY)
        chunks = list(llm.stream("Hello", GREEDY))
        assert "".join(chunk.text for chunk in chunks) == whole.text
        assert [chunk.finish is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]

    def test_closing_aborts(self, make_llm: MakeLLM) -> None:
        llm = make_llm()
        slow_down(llm)
        chunks = llm.stream("Hello", LONG)
        next(chunks)
        chunks.close()
        assert llm.stats().num_aborted == 1
        assert is_idle(llm)

    def test_a_stream_that_was_never_read_costs_nothing(self, make_llm: MakeLLM) -> None:
        llm = make_llm()
        llm.stream("Hello", LONG).close()
        llm.stream("Hello", LONG)
        assert llm.stats().num_steps == 0

    def test_errors_are_raised(self, make_llm: MakeLLM) -> None:
        llm = make_llm()
        with pytest.raises(InvalidRequest, match="empty"):
            list(llm.stream("", GREEDY))
        with pytest.raises(InvalidRequest, match="max_new_tokens"):
            llm.stream("Hello", {"max_tokens": 1})

    @pytest.mark.parametrize(
        "use",
        [
            lambda llm: list(llm.stream("a", LONG)),
            lambda llm: llm.generate(["a", "b", "c"], LONG),
        ],
    )
    def test_ctrl_c_aborts_what_is_open(
        self, make_llm: MakeLLM, use: Callable[[LLM], object], sigint: None
    ) -> None:
        llm = make_llm()
        slow_down(llm)

        def interrupt() -> None:
            until(lambda: llm.stats().num_running > 0)
            os.kill(os.getpid(), signal.SIGINT)

        helper = threading.Thread(target=interrupt)
        helper.start()
        with pytest.raises(KeyboardInterrupt):
            use(llm)
        helper.join()
        assert is_idle(llm)
        assert llm.generate("again", GREEDY)[0].num_output_tokens == 8

    def test_a_slow_reader_loses_nothing(self, make_llm: MakeLLM) -> None:
        llm = make_llm()
        [whole] = llm.generate("Hello", GREEDY)
        stream = llm.stream("Hello", GREEDY)
        text = next(stream).text
        # The engine puts out all the rest before any of it is read.
        until(lambda: is_idle(llm))
        assert text + "".join(chunk.text for chunk in stream) == whole.text


class TestAsyncio:
    def test_streams_and_results(self, make_llm: MakeLLM) -> None:
        llm = make_llm()
        [whole] = llm.generate("Hello", GREEDY)

        async def read() -> str:
            return "".join([chunk.text async for chunk in llm.astream("Hello", GREEDY)])

        async def together() -> list[object]:
            return await asyncio.gather(read(), llm.agenerate("Hello", GREEDY), read())

        text, result, again = asyncio.run(together())
        assert text == again == whole.text
        assert result.token_ids == whole.token_ids

    def test_the_callers_loop_goes_on_and_no_thread_is_made(self, make_llm: MakeLLM) -> None:
        llm = make_llm()
        slow_down(llm)
        num_threads = threading.active_count()

        async def ticks_while_reading() -> int:
            reading = asyncio.create_task(llm.agenerate("Hello", {**GREEDY, "max_new_tokens": 20}))
            ticks = 0
            while not reading.done():
                assert threading.active_count() == num_threads
                await asyncio.sleep(0.001)
                ticks += 1
            await reading
            return ticks

        assert asyncio.run(ticks_while_reading()) > 20

    def test_closing_and_cancelling_abort(self, make_llm: MakeLLM) -> None:
        llm = make_llm()
        slow_down(llm)

        async def leave() -> None:
            chunks = llm.astream("Hello", LONG)
            await anext(chunks)
            await chunks.aclose()
            assert llm.stats().num_aborted == 1
            waiting = asyncio.create_task(llm.agenerate("Hello", LONG))
            while llm.stats().num_running == 0:
                await asyncio.sleep(0.001)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting

        asyncio.run(leave())
        assert llm.stats().num_aborted == 2
        assert is_idle(llm)

    def test_a_loop_that_ends_while_it_reads_leaves_nothing_running(
        self, make_llm: MakeLLM
    ) -> None:
        llm = make_llm()
        slow_down(llm)
        loop = asyncio.new_event_loop()
        chunks = llm.astream("Hello", LONG)
        loop.run_until_complete(anext(chunks))
        loop.close()
        until(lambda: is_idle(llm))
        assert llm.stats().num_aborted == 1
        del chunks

    def test_errors_are_raised(self, make_llm: MakeLLM) -> None:
        llm = make_llm()
        with pytest.raises(InvalidRequest, match="empty"):
            asyncio.run(llm.agenerate("", GREEDY))
        with pytest.raises(InvalidRequest, match="max_new_tokens"):
            llm.astream("Hello", {"max_tokens": 1})


class TestLifecycle:
    def test_two_at_once_and_one_after_the_other(self, make_llm: MakeLLM) -> None:
        first, second = make_llm(), make_llm()
        [one], [other] = first.generate("Hello", GREEDY), second.generate("Hello", GREEDY)
        assert one.token_ids == other.token_ids
        first.close()
        assert second.generate("Hello", GREEDY)[0].token_ids == one.token_ids
        assert make_llm().generate("Hello", GREEDY)[0].token_ids == one.token_ids

    def test_after_close_everything_says_so(self, make_llm: MakeLLM) -> None:
        llm = make_llm()
        llm.close()
        llm.close()
        messages = [{"role": "user", "content": "Hi"}]
        for use in (
            llm.stats,
            llm.flush_cache,
            lambda: llm.generate("a"),
            lambda: llm.chat(messages),
            lambda: next(llm.stream("a")),
            lambda: next(llm.stream_chat(messages)),
            lambda: asyncio.run(llm.agenerate("a")),
        ):
            with pytest.raises(EngineUnavailable, match="was closed"):
                use()

    def test_closing_ends_what_is_open_in_other_threads(self, make_llm: MakeLLM) -> None:
        llm = make_llm(max_queued_requests=1, max_running_requests=1)
        slow_down(llm)
        ends: dict[str, object] = {}

        def read() -> None:
            chunks: list[TextChunk] = list(llm.stream("a", LONG))
            ends["stream"] = chunks[-1].finish.kind if chunks[-1].finish else None

        def generate() -> None:
            try:
                llm.generate("a", LONG)
            except EngineUnavailable:
                ends["generate"] = "unavailable"

        waits = threading.Event()

        async def wait_long() -> None:
            waits.set()
            await asyncio.sleep(3600)

        def wait() -> None:
            try:
                llm.run(wait_long())
            except EngineUnavailable as error:
                ends["run"] = str(error)

        reader = threading.Thread(target=read)
        reader.start()
        until(lambda: llm.stats().num_running == 1)
        threads = [reader, threading.Thread(target=generate), threading.Thread(target=wait)]
        for thread in threads[1:]:
            thread.start()
        assert waits.wait(10)
        llm.close()
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()
        assert ends["stream"] == "abort"
        assert ends["generate"] == "unavailable"
        assert "was closed" in str(ends["run"])

    def test_closing_frees_the_memory_and_the_threads(self, make_llm: MakeLLM) -> None:
        before = threading.active_count()
        llm = make_llm()
        engine = llm._engine._engine
        assert engine is not None
        alive = weakref.ref(engine.scheduler)
        del engine
        llm.generate("Hello", GREEDY)
        llm.close()
        gc.collect()
        assert alive() is None
        assert threading.active_count() == before

    def test_a_failed_start_leaves_no_thread(self, make_llm: MakeLLM, tmp_path: Path) -> None:
        before = threading.active_count()
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(ConfigError):
            LLM(str(tmp_path), load_format="dummy")
        with pytest.raises(ModelSourceError, match="tokenizer"):
            make_llm(tokenizer_path=str(tmp_path / "none"))
        assert threading.active_count() == before

    def test_options_are_checked(self, make_llm: MakeLLM) -> None:
        with pytest.raises(ConfigError, match="did you mean max_total_tokens"):
            make_llm(max_total_token=5)
        config = EngineConfig(model=ModelConfig(model="one"))
        with pytest.raises(ConfigError, match="not both"):
            LLM(config=config, page_size=8)
        with pytest.raises(ConfigError, match="'two' but that of the config is 'one'"):
            LLM("two", config=config)

    def test_a_script_that_just_ends(self, tiny_llama: Path) -> None:
        """With a stream half read and nothing closed; the interpreter ends without a word."""
        script = (
            "from sapwood import LLM\n"
            f"llm = LLM({str(tiny_llama)!r}, load_format='dummy', max_total_tokens=2048,\n"
            "          num_threads=1)\n"
            "chunks = llm.stream('Hello', {'max_new_tokens': 200, 'ignore_eos': True})\n"
            "print(len(next(chunks).token_ids) > 0)\n"
        )
        ended = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
        )
        assert (ended.returncode, ended.stdout, ended.stderr) == (0, "True\n", "")


class TestFailure:
    @pytest.mark.parametrize("depth", [1, 2])
    def test_a_step_that_raises_ends_everything_with_its_reason(
        self, make_llm: MakeLLM, depth: int
    ) -> None:
        llm = make_llm(overlap_depth=depth, max_running_requests=2, max_queued_requests=1)
        num_steps = 0

        def fail(execute: Callable[[StepPlan], StepResult], plan: StepPlan) -> StepResult:
            nonlocal num_steps
            num_steps += 1
            if num_steps == 5:
                raise RuntimeError("the matrix is on fire")
            return execute(plan)

        replace_step(llm, fail)
        caught: list[BaseException] = []

        def run(use: Callable[[], object]) -> None:
            try:
                use()
            except EngineUnavailable as error:
                caught.append(error)

        uses: list[Callable[[], object]] = [
            lambda: llm.generate(["a"] * 10, LONG),
            lambda: list(llm.stream("b", LONG)),
            lambda: asyncio.run(llm.agenerate("c", LONG)),
        ]
        threads = [threading.Thread(target=run, args=(use,)) for use in uses]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()
        assert len(caught) == 3
        assert all("the matrix is on fire" in str(error) for error in caught)
        for use in (llm.stats, llm.flush_cache, lambda: llm.generate("d")):
            with pytest.raises(EngineUnavailable, match="the matrix is on fire"):
                use()
        llm.close()
        with pytest.raises(EngineUnavailable, match="was closed"):
            llm.generate("e")

    def test_a_queue_that_others_filled_is_overload(self, make_llm: MakeLLM) -> None:
        llm = make_llm(max_queued_requests=0, max_running_requests=1)
        slow_down(llm)

        async def beside() -> None:
            generator = llm.services.generator
            other = generator.generate(llm._request("a", LONG, None, add_special_tokens=True))
            await anext(other)
            try:
                await llm._collect(0, llm._request("b", GREEDY, None, add_special_tokens=True))
            finally:
                await other.aclose()

        with pytest.raises(Overloaded, match="queue is full"):
            llm.run(beside())

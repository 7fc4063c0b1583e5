"""The engine's client: streams, calls and failures, against messages sent by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from sapwood.base.errors import EngineUnavailable
from sapwood.engine.client import AsyncEngineClient
from sapwood.schema.output import (
    CacheFlushed,
    EngineFatal,
    EngineReady,
    EngineStatus,
    Finish,
    RequestOutput,
    StepOutputs,
)
from sapwood.schema.request import (
    Abort,
    Drain,
    EngineInput,
    FlushCache,
    Generate,
    GetStatus,
    RequestOptions,
)
from sapwood.schema.sampling import SamplingParams

READY = EngineReady(context_length=64, max_total_tokens=256, page_size=4, notes=[])
LENGTH = Finish(kind="length")


class Wire:
    """What the client has sent, and a client that is ready unless told otherwise."""

    def __init__(self, *, ready: bool = True) -> None:
        self.sent: list[EngineInput] = []
        self.cannot_send: set[str] = set()
        self.client = AsyncEngineClient(self)
        if ready:
            self.client.deliver(READY)

    def send(self, message: EngineInput) -> None:
        if isinstance(message, Generate) and message.request_id in self.cannot_send:
            "\ud800".encode()
        self.sent.append(message)

    def answer(self, request_id: str, token_ids: list[int], finish: Finish | None = None) -> None:
        self.client.deliver(StepOutputs([output(request_id, token_ids, finish)]))


def output(request_id: str, token_ids: list[int], finish: Finish | None = None) -> RequestOutput:
    return RequestOutput(
        request_id=request_id, token_ids=token_ids, num_prompt_tokens=2, finish=finish
    )


def ask(request_id: str = "a") -> Generate:
    return Generate(
        request_id=request_id, prompt_ids=[1, 2], options=RequestOptions(sampling=SamplingParams())
    )


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 10))


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def read(wire: Wire, request_id: str = "a") -> list[RequestOutput]:
    return [one async for one in wire.client.generate(ask(request_id))]


class TestStreams:
    def test_outputs_come_to_the_stream_of_their_id(self) -> None:
        async def work() -> None:
            wire = Wire()
            readers = [asyncio.create_task(read(wire, name)) for name in "ab"]
            await settle()
            assert wire.sent == [ask("a"), ask("b")]
            wire.client.deliver(StepOutputs([output("a", [1]), output("b", [2])]))
            await settle()
            wire.client.deliver(StepOutputs([output("b", [3], LENGTH), output("a", [4], LENGTH)]))
            first, second = await asyncio.gather(*readers)
            assert [one.token_ids for one in first] == [[1], [4]]
            assert [one.token_ids for one in second] == [[2], [3]]
            assert first[-1].finish == second[-1].finish == LENGTH
            assert len(wire.sent) == 2

        run(work())

    def test_what_has_piled_up_is_one_output(self) -> None:
        async def work() -> None:
            wire = Wire()
            reader = asyncio.create_task(read(wire))
            await settle()
            for token_id in range(5):
                wire.answer("a", [token_id])
            wire.answer("a", [5], LENGTH)
            [merged] = await reader
            assert merged.token_ids == [0, 1, 2, 3, 4, 5]
            assert merged.finish == LENGTH

        run(work())

    def test_nothing_after_the_end_is_merged_in(self) -> None:
        async def work() -> None:
            wire = Wire()
            reader = asyncio.create_task(read(wire))
            await settle()
            wire.answer("a", [1], LENGTH)
            wire.client.fail("gone")
            [last] = await reader
            assert (last.token_ids, last.finish) == ([1], LENGTH)

        run(work())

    @pytest.mark.parametrize("how", ["close", "cancel"])
    def test_leaving_aborts(self, how: str) -> None:
        async def work() -> None:
            wire = Wire()
            stream = wire.client.generate(ask())
            reader = asyncio.ensure_future(anext(stream))
            await settle()
            if how == "close":
                wire.answer("a", [1])
                await reader
                await stream.aclose()  # type: ignore[attr-defined]
            else:
                reader.cancel()
                await asyncio.gather(reader, return_exceptions=True)
            assert wire.sent == [ask(), Abort("a")]
            wire.answer("a", [], Finish(kind="abort"))

        run(work())

    def test_leaving_after_the_end_aborts_nothing(self) -> None:
        async def work() -> None:
            wire = Wire()
            stream = wire.client.generate(ask())
            reader = asyncio.ensure_future(anext(stream))
            await settle()
            wire.answer("a", [1])
            await reader
            wire.answer("a", [2], LENGTH)
            await stream.aclose()  # type: ignore[attr-defined]
            assert wire.sent == [ask()]
            # Nothing is remembered of it either: the next one of that id gets all its outputs.
            again = asyncio.create_task(read(wire))
            await settle()
            wire.answer("a", [3], LENGTH)
            [last] = await again
            assert last.token_ids == [3]

        run(work())

    def test_late_outputs_do_not_reach_a_newer_request_of_the_same_id(self) -> None:
        async def work() -> None:
            wire = Wire()
            for _ in range(2):
                stream = wire.client.generate(ask())
                reader = asyncio.ensure_future(anext(stream))
                await settle()
                reader.cancel()
                await asyncio.gather(reader, return_exceptions=True)
            newest = asyncio.create_task(read(wire))
            await settle()
            wire.answer("a", [1])
            wire.answer("a", [], Finish(kind="abort"))
            wire.answer("a", [2], LENGTH)
            wire.answer("a", [3])
            await settle()
            wire.answer("a", [4], LENGTH)
            outputs = await newest
            assert [one.token_ids for one in outputs] == [[3], [4]]

        run(work())

    def test_a_request_that_cannot_be_sent_leaves_nothing_behind(self) -> None:
        async def work() -> None:
            wire = Wire()
            wire.cannot_send = {"a"}
            with pytest.raises(UnicodeEncodeError):
                await read(wire)
            assert wire.sent == [], "the engine has nothing to abort"
            wire.cannot_send = set()
            again = asyncio.create_task(read(wire))
            await settle()
            wire.answer("a", [1], LENGTH)
            [last] = await again
            assert last.token_ids == [1]

        run(work())

    def test_outputs_for_nobody_are_dropped(self) -> None:
        wire = Wire()
        wire.answer("nobody", [1], LENGTH)
        assert wire.sent == []


class TestCalls:
    def test_answers_find_their_callers(self) -> None:
        async def work() -> None:
            wire = Wire()
            status = asyncio.create_task(wire.client.status())
            flush = asyncio.create_task(wire.client.flush_cache())
            await settle()
            asked, asked_to_flush = wire.sent
            assert isinstance(asked, GetStatus)
            assert isinstance(asked_to_flush, FlushCache)
            flushed = CacheFlushed(asked_to_flush.call_id, True, "done")
            counters = dict.fromkeys(EngineStatus.__struct_fields__[1:], 3)
            told = EngineStatus(call_id=asked.call_id, **counters)
            wire.client.deliver(flushed)
            wire.client.deliver(told)
            wire.client.deliver(told)
            assert await flush == flushed
            assert await status == told

        run(work())

    def test_a_caller_that_left_is_forgotten(self) -> None:
        async def work() -> None:
            wire = Wire()
            call = asyncio.create_task(wire.client.flush_cache())
            await settle()
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)
            [asked] = wire.sent
            assert isinstance(asked, FlushCache)
            wire.client.deliver(CacheFlushed(asked.call_id, True, "late"))

        run(work())

    @pytest.mark.parametrize("state", ["starting", "draining", "failed"])
    def test_nobody_waits_for_an_engine_that_does_not_serve(self, state: str) -> None:
        async def work() -> None:
            wire = Wire(ready=state != "starting")
            if state == "draining":
                wire.client.drain(5.0)
            elif state == "failed":
                wire.client.fail("out of memory")
            words = {
                "starting": "is starting",
                "draining": "is shutting down",
                "failed": "out of memory",
            }[state]
            num_sent = len(wire.sent)
            for call in (wire.client.status, wire.client.flush_cache):
                with pytest.raises(EngineUnavailable, match=words):
                    await call()
            [refused] = await read(wire)
            assert refused.finish is not None
            assert refused.finish.status == 503
            assert words in (refused.finish.message or "")
            assert words in (wire.client.unavailable_reason or "")
            assert len(wire.sent) == num_sent

        run(work())


class TestLifecycle:
    def test_starting_then_ready(self) -> None:
        async def work() -> None:
            wire = Wire(ready=False)
            with pytest.raises(EngineUnavailable, match="starting"):
                _ = wire.client.info
            waiting = asyncio.create_task(wire.client.wait_for_change())
            await settle()
            assert not waiting.done()
            wire.client.deliver(READY)
            await waiting
            assert wire.client.info == READY
            assert wire.client.unavailable_reason is None
            assert wire.client.failure is None

        run(work())

    @pytest.mark.parametrize("how", ["fatal message", "fail"])
    def test_a_failure_ends_every_stream_and_call(self, how: str) -> None:
        async def work() -> None:
            wire = Wire()
            readers = [asyncio.create_task(read(wire, name)) for name in "ab"]
            call = asyncio.create_task(wire.client.status())
            await settle()
            wire.answer("a", [1])
            await settle()
            if how == "fail":
                wire.client.fail("the engine died")
            else:
                wire.client.deliver(EngineFatal("the engine died"))
            wire.client.fail("the second reason does not count")
            for outputs in await asyncio.gather(*readers):
                finish = outputs[-1].finish
                assert finish is not None
                assert (finish.kind, finish.status) == ("error", 503)
                assert finish.message == "the engine died"
            with pytest.raises(EngineUnavailable, match="the engine died"):
                await call
            await wire.client.wait_until_failed()
            assert wire.client.failure == "the engine died"
            num_sent = len(wire.sent)
            await wire.client.abort("a")
            wire.client.drain(1.0)
            assert len(wire.sent) == num_sent

        run(work())

    def test_a_failure_before_it_was_ready_is_a_change(self) -> None:
        async def work() -> None:
            wire = Wire(ready=False)
            waiting = asyncio.create_task(wire.client.wait_for_change())
            await settle()
            wire.client.fail("no such model")
            await waiting
            assert wire.client.failure == "no such model"

        run(work())

    def test_a_drain_goes_to_the_engine_and_lets_open_requests_end(self) -> None:
        async def work() -> None:
            wire = Wire()
            reader = asyncio.create_task(read(wire))
            await settle()
            wire.client.drain(5.0)
            assert wire.sent == [ask(), Drain(5.0)]
            wire.answer("a", [1], LENGTH)
            [last] = await reader
            assert last.finish == LENGTH

        run(work())

    def test_an_engine_that_gets_ready_during_a_drain_is_told_to_end(self) -> None:
        async def work() -> None:
            wire = Wire(ready=False)
            wire.client.drain(5.0)
            wire.client.deliver(READY)
            assert wire.sent == [Drain(5.0), Drain(0.0)]
            assert wire.client.unavailable_reason == "the server is shutting down"

        run(work())


class TestRestart:
    def test_another_engine_takes_the_place_of_the_one_that_failed(self) -> None:
        async def work() -> None:
            wire, second = Wire(), Wire(ready=False)
            reader = asyncio.create_task(read(wire))
            await settle()
            wire.client.fail("it was killed")
            wire.client.restart(second, "the engine is being restarted: it was killed")
            [ended] = await reader
            assert ended.finish is not None
            assert ended.finish.status == 503
            assert wire.client.failure is None
            assert not wire.client.is_ready
            assert "being restarted" in (wire.client.unavailable_reason or "")
            [refused] = await read(wire)
            assert refused.finish is not None
            assert refused.finish.status == 503
            wire.client.deliver(READY)
            again = asyncio.create_task(read(wire))
            await settle()
            assert second.sent == [ask("a")]
            wire.answer("a", [1], LENGTH)
            [last] = await again
            assert last.token_ids == [1]

        run(work())

    def test_only_what_has_failed_is_replaced(self) -> None:
        wire = Wire()
        with pytest.raises(RuntimeError, match="has not failed"):
            wire.client.restart(wire, "why")

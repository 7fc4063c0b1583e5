"""The registry of adapters: what is loaded, held, left out and forgotten."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

import pytest

from sapwood.base.errors import InvalidRequest, NotFound
from sapwood.frontends.serving import adapters as serving
from sapwood.frontends.serving.adapters import SENT, AdapterRegistry
from sapwood.schema.config.lora import LoraConfig
from sapwood.schema.output import CallDone
from sapwood.schema.request import SentAdapter


class Engine:
    """Loads slowly; `there` has the folders of what is loaded, by id."""

    def __init__(self) -> None:
        self.there: dict[str, str] = {}
        self.sent: list[SentAdapter | None] = []
        self.most = 0

    async def load_adapter(
        self, adapter_id: str, path: str, sent: SentAdapter | None = None
    ) -> CallDone:
        await asyncio.sleep(0)
        self.sent.append(sent)
        if path == "/nowhere":
            return CallDone("1", False, "no such folder")
        assert adapter_id not in self.there
        self.there[adapter_id] = path
        self.most = max(self.most, len(self.there))
        return CallDone("1", True, "loaded")

    async def unload_adapter(self, adapter_id: str) -> CallDone:
        await asyncio.sleep(0)
        del self.there[adapter_id]
        return CallDone("1", True, "unloaded")


def registry(**options: Any) -> tuple[AdapterRegistry, Engine]:
    engine = Engine()
    config = LoraConfig(**{"enable_lora": True, "max_lora_rank": 8, **options})
    return AdapterRegistry(engine, config), engine  # type: ignore[arg-type]


async def held(adapters: AdapterRegistry, *names: str) -> dict[str, str]:
    async with adapters.held(names) as ids:
        return dict(ids)


def run(work: Awaitable[None]) -> None:
    asyncio.run(asyncio.wait_for(work, 20))  # type: ignore[arg-type]


def test_what_the_engine_starts_with_is_there() -> None:
    adapters, _ = registry(lora_paths="a=/a b=/b")

    async def work() -> None:
        assert adapters.loaded == ["a", "b"]
        assert await held(adapters, "a", "b", "a") == {"a": "a", "b": "b"}

    run(work())


def test_each_load_has_a_new_id() -> None:
    adapters, engine = registry()

    async def work() -> None:
        await adapters.load("a", "/a")
        first = await held(adapters, "a")
        await adapters.unload("a")
        assert engine.there == {}
        await adapters.load("a", "/other")
        assert await held(adapters, "a") != first
        assert adapters.paths == {"a": "/other"}

    run(work())


def test_the_one_unused_longest_is_left_out_and_comes_back() -> None:
    adapters, engine = registry(max_loaded_loras=8)

    async def work() -> None:
        for number in range(10):
            await adapters.load(str(number), f"/{number}")
        assert adapters.loaded == [str(number) for number in range(2, 10)]
        await held(adapters, "2")
        await held(adapters, "0")
        assert adapters.loaded == ["0", "2", *map(str, range(4, 10))]
        assert engine.most == 8

    run(work())


def test_what_is_held_or_pinned_stays() -> None:
    adapters, engine = registry(max_loaded_loras=2, max_loras_per_batch=2)

    async def work() -> None:
        await adapters.load("pinned", "/p", pinned=True)
        await adapters.load("a", "/a")
        async with adapters.held(["a"]):
            load = asyncio.create_task(adapters.load("b", "/b"))
            await asyncio.sleep(0.01)
            assert not load.done()
            assert adapters.loaded == ["pinned", "a"]
        await load
        assert adapters.loaded == ["pinned", "b"]
        with pytest.raises(InvalidRequest, match="wanted by the same call"):
            await held(adapters, "a", "b")
        with pytest.raises(InvalidRequest, match="pinned already"):
            await adapters.load("c", "/c", pinned=True)
        assert sorted(engine.there.values()) == ["/b", "/p"]

    run(work())


def test_calls_that_wait_for_room_do_not_wait_for_each_other() -> None:
    adapters, engine = registry(max_loaded_loras=2, max_loras_per_batch=2)
    done: list[tuple[str, ...]] = []

    async def call(*names: str) -> None:
        async with adapters.held(names) as ids:
            assert {engine.there[ids[name]] for name in names} == {f"/{name}" for name in names}
            await asyncio.sleep(0)
            assert {engine.there[ids[name]] for name in names} == {f"/{name}" for name in names}
        done.append(names)

    async def work() -> None:
        for name in "cdab":
            await adapters.load(name, f"/{name}")
        # Each call has one of the two that are loaded, and wants another.
        calls = [("a", "c"), ("b", "d"), ("a",), ("d",), ("c", "b"), ("b",)]
        await asyncio.gather(*(call(*names) for names in calls * 3))
        assert sorted(done) == sorted(calls * 3)
        assert engine.most == 2

    run(work())


def test_unloading_waits_for_calls_and_lets_no_new_ones_in() -> None:
    adapters, engine = registry()

    async def work() -> None:
        await adapters.load("a", "/a")
        async with adapters.held(["a"]):
            unload = asyncio.create_task(adapters.unload("a"))
            await asyncio.sleep(0.01)
            assert not unload.done()
            assert engine.there
            with pytest.raises(NotFound, match="unloaded"):
                await held(adapters, "a")
        await unload
        assert engine.there == {}

    run(work())


def test_a_load_that_fails_leaves_nothing() -> None:
    adapters, _ = registry()

    async def work() -> None:
        with pytest.raises(InvalidRequest, match="no such folder"):
            await adapters.load("a", "/nowhere")
        assert adapters.paths == {}
        with pytest.raises(InvalidRequest, match="cannot be an adapter's name"):
            await adapters.load("a b", "/a")
        await adapters.load("a", "/a")
        with pytest.raises(InvalidRequest, match="loaded already, from /a"):
            await adapters.load("a", "/b")

    run(work())


def test_calls_that_come_at_once_load_once() -> None:
    adapters, engine = registry(max_loaded_loras=2, max_loras_per_batch=2)

    async def work() -> None:
        for name in "abc":
            await adapters.load(name, f"/{name}")
        assert adapters.loaded == ["b", "c"]
        many = await asyncio.gather(*(held(adapters, "a") for _ in range(20)))
        assert len({ids["a"] for ids in many}) == 1
        assert engine.most == 2

    run(work())


def test_a_new_engine_has_what_it_starts_with_and_the_rest_comes_back() -> None:
    adapters, engine = registry(lora_paths="a=/a")

    async def work() -> None:
        await adapters.load("b", "/b")
        engine.there.clear()
        adapters.restarted()
        assert adapters.loaded == ["a"]
        ids = await held(adapters, "b")
        assert engine.there == {ids["b"]: "/b"}

    run(work())


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_callers_that_leave_lose_no_adapter(turns: int) -> None:
    """The engine has what the registry says, whenever a call, a load or an unload is cancelled."""
    adapters, engine = registry(max_loaded_loras=2, max_loras_per_batch=2)

    async def left(work: Awaitable[Any]) -> None:
        task = asyncio.ensure_future(work)
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        while adapters._begun:
            await asyncio.sleep(0)
        ids = {entry.adapter_id for entry in adapters._entries.values()} - {None}
        assert set(engine.there) == ids

    async def work() -> None:
        for name in "abc":
            await adapters.load(name, f"/{name}")
        await left(held(adapters, "a"))
        await left(adapters.load("d", "/d"))
        await left(adapters.unload("b"))
        await left(adapters.load("e", "/nowhere"))
        assert not adapters.knows("b")

    run(work())


def test_without_adapters() -> None:
    adapters, _ = registry(enable_lora=False, max_lora_rank=None)

    async def work() -> None:
        with pytest.raises(InvalidRequest, match="--enable-lora"):
            await adapters.load("a", "/a")
        with pytest.raises(InvalidRequest, match="--enable-lora"):
            await held(adapters, "a")

    run(work())


def test_what_came_as_tensors_comes_back_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "MAX_SENT_BYTES", 5)
    adapters, engine = registry(max_loras_per_batch=1, max_loaded_loras=1)
    one = SentAdapter(config=b"{}", tensors=b"123")

    async def work() -> None:
        await adapters.load("one", SENT, sent=one)
        with pytest.raises(InvalidRequest, match="may have 5 bytes together"):
            await adapters.load("two", SENT, sent=one)
        await adapters.load("folder", "/folder")
        assert adapters.loaded == ["folder"]
        await held(adapters, "one")
        assert adapters.loaded == ["one"]
        assert engine.sent == [one, None, one]
        assert adapters.paths == {"one": SENT, "folder": "/folder"}
        await adapters.unload("one")
        await adapters.load("two", SENT, sent=one)

    run(work())

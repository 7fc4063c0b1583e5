"""What every store of responses and conversations does, whatever keeps it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from sapwood.base.errors import InvalidRequest, NotFound
from sapwood.history.interface import DAY_S, Conversation, History, Item, Record, new_id
from tests.history.conftest import Opened


def message(text: str) -> Item:
    return {"type": "message", "role": "user", "id": new_id("msg"), "content": text}


def response(
    previous: str | None = None, *, said: str = "yes", status: str = "completed"
) -> Record:
    return {
        "id": new_id("resp"),
        "created_at": time.time(),
        "status": status,
        "previous_response_id": previous,
        "output": [message(said)],
    }


def texts(items: list[Item]) -> list[str]:
    return [item["content"] for item in items]


def within(opened: Opened, work: Callable[[History], Awaitable[None]], **options: Any) -> None:
    async def run() -> None:
        async with asyncio.timeout(60), opened(**options) as history:
            await work(history)

    asyncio.run(run())


async def conversation(history: History, *items: Item) -> str:
    made = Conversation(id=new_id("conv"), created_at=1.5, metadata={"a": "é"})
    await history.create_conversation(made, items)
    assert await history.conversation(made.id) == made
    return made.id


def test_responses_are_read_and_deleted(opened: Opened) -> None:
    async def work(history: History) -> None:
        record, items = response(said="n\u00f6 \x00"), [message("a"), message("b")]
        await history.add(record, items)
        assert await history.record(record["id"]) == record
        assert await history.items(record["id"]) == items
        await history.delete(record["id"])
        for gone in (history.record, history.items, history.delete):
            with pytest.raises(NotFound, match="there is no response"):
                await gone(record["id"])
        with pytest.raises(NotFound) as refused:
            await history.context(record["id"])
        assert refused.value.param == "previous_response_id"

    within(opened, work)


def test_a_context_is_all_that_was_said_in_order(opened: Opened) -> None:
    async def work(history: History) -> None:
        previous = None
        for number in range(5):
            record = response(previous, said=f"answer {number}")
            await history.add(record, [message(f"question {number}")])
            previous = record["id"]
        assert previous is not None
        expected = [f"{kind} {n}" for n in range(5) for kind in ("question", "answer")]
        assert texts(await history.context(previous)) == expected
        with pytest.raises(InvalidRequest, match="more than 500 bytes"):
            await history.context(previous, 500)

    within(opened, work)


def test_a_context_with_a_gap_or_without_an_end_is_refused(opened: Opened) -> None:
    async def work(history: History) -> None:
        first, running = response(), response(status="in_progress")
        second, third = response(first["id"]), response(running["id"])
        for record in (first, second, running, third):
            await history.add(record, [])
        with pytest.raises(InvalidRequest, match="has not ended yet"):
            await history.context(third["id"])
        await history.delete(first["id"])
        with pytest.raises(NotFound, match=first["id"]):
            await history.context(second["id"])

    within(opened, work)


def test_a_conversation_keeps_its_items_in_order(opened: Opened) -> None:
    async def work(history: History) -> None:
        id_ = await conversation(history, message("0"))
        await history.add_items(id_, [message("1"), message("2")])
        record = response(said="4")
        await history.add(record, [message("3")], id_)
        items = await history.conversation_items(id_)
        assert texts(items) == list("01234")
        assert await history.item(id_, items[3]["id"]) == items[3]
        await history.delete_item(id_, items[1]["id"])
        assert texts(await history.conversation_items(id_)) == list("0234")
        for gone in (history.item, history.delete_item):
            with pytest.raises(NotFound, match="no item"):
                await gone(id_, items[1]["id"])
        with pytest.raises(InvalidRequest, match="more than 300 bytes"):
            await history.conversation_items(id_, 300)
        await history.set_metadata(id_, {"b": "c"})
        assert (await history.conversation(id_)).metadata == {"b": "c"}

    within(opened, work)


def test_pages_of_items(opened: Opened) -> None:
    async def work(history: History) -> None:
        id_ = await conversation(history, *(message(str(n)) for n in range(12)))

        async def page(after: str | None, *, newest_first: bool) -> tuple[list[str], bool, str]:
            items, more = await history.page_of_items(
                id_, after=after, limit=5, newest_first=newest_first
            )
            return texts(items), more, items[-1]["id"]

        for newest_first in (False, True):
            expected = [str(n) for n in range(12)]
            if newest_first:
                expected.reverse()
            first, more, last = await page(None, newest_first=newest_first)
            assert (first, more) == (expected[:5], True)
            second, more, last = await page(last, newest_first=newest_first)
            assert (second, more) == (expected[5:10], True)
            third, more, _ = await page(last, newest_first=newest_first)
            assert (third, more) == (expected[10:], False)
        with pytest.raises(InvalidRequest, match="which is not there"):
            await page("msg_other", newest_first=False)

    within(opened, work)


def test_a_conversation_that_is_gone_takes_nothing(opened: Opened) -> None:
    async def work(history: History) -> None:
        id_ = await conversation(history, item := message("0"))
        await history.delete_conversation(id_)
        calls: list[Awaitable[object]] = [
            history.conversation(id_),
            history.conversation_items(id_),
            history.page_of_items(id_, after=None, limit=1, newest_first=True),
            history.set_metadata(id_, {}),
            history.add_items(id_, [item]),
            history.delete_conversation(id_),
        ]
        for call in calls:
            with pytest.raises(NotFound, match="there is no conversation"):
                await call
        # The response is kept; the conversation does not come back by it.
        await history.add(record := response(), [], id_)
        assert await history.record(record["id"]) == record
        with pytest.raises(NotFound):
            await history.item(id_, record["output"][0]["id"])

    within(opened, work)


def test_items_that_are_added_at_the_same_time_all_stay(opened: Opened) -> None:
    async def work(history: History) -> None:
        id_ = await conversation(history)
        await asyncio.gather(
            *(history.add_items(id_, [message(f"{n}a"), message(f"{n}b")]) for n in range(8))
        )
        told = texts(await history.conversation_items(id_))
        assert len(told) == 16
        # Those of one call stay together.
        assert all(told[n][0] == told[n + 1][0] for n in range(0, 16, 2))

    within(opened, work)


def test_what_is_kept_is_there_when_the_store_is_opened_again(
    opened: Opened, request: pytest.FixtureRequest
) -> None:
    async def run() -> None:
        record = response()
        async with opened() as history:
            await history.add(record, [])
            id_ = await conversation(history, message("0"))
        async with opened() as history:
            if "memory" in request.node.name:
                with pytest.raises(NotFound):
                    await history.record(record["id"])
                return
            assert await history.record(record["id"]) == record
            assert texts(await history.conversation_items(id_)) == ["0"]

    asyncio.run(run())


def test_what_is_too_old_is_gone(
    opened: Opened, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "redis" in request.node.name:
        pytest.skip("Redis itself forgets: test_redis.py")

    async def work(history: History) -> None:
        record = response()
        await history.add(record, [])
        id_ = await conversation(history, message("0"))
        later = time.time() + 1.1 * DAY_S
        monkeypatch.setattr(time, "time", lambda: later)
        await history.add(response(), [])
        for call in (history.record(record["id"]), history.conversation(id_)):
            with pytest.raises(NotFound):
                await call

    within(opened, work, history_retention_days=1.0)

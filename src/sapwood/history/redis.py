"""Responses and conversations in Redis. What is not used for long enough, Redis itself forgets."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import orjson
from redis.asyncio import Redis
from redis.exceptions import RedisError

from sapwood.base.errors import ConfigError
from sapwood.history.interface import (
    DAY_S,
    MAX_CONTEXT_BYTES,
    Conversation,
    HistoryUnavailable,
    Item,
    Record,
    is_open,
    no_conversation,
    no_cursor,
    no_item,
    no_predecessor,
    no_response,
    not_ended,
    too_long,
)

PREFIX = "sapwood:history:"
TIMEOUT_S = 10.0
_MAKE_PLACE = """
    if redis.call('EXISTS', KEYS[1]) == 0 then return -1 end
    return redis.call('HINCRBY', KEYS[1], 'next', ARGV[1])
"""


class RedisHistory:
    """A History (interface.py).

    A response is a hash. A conversation is three keys: a hash with its metadata, a hash of its
    items by position, and the positions by item.
    """

    def __init__(self, client: Redis, *, retention_days: float) -> None:
        self._client: Any = client
        self._retention_s = max(1, int(retention_days * DAY_S))

    async def add(
        self, record: Record, items: Sequence[Item], conversation_id: str | None = None
    ) -> None:
        key = _response(record["id"])
        told = {
            "record": orjson.dumps(record),
            "input": orjson.dumps(items),
            "previous": record["previous_response_id"] or "",
        }
        pipe = self._client.pipeline(transaction=True)
        pipe.hset(key, mapping=told)
        pipe.expire(key, self._retention_s)
        if conversation_id is not None:
            output = [*items, *record["output"]]
            await self._append(pipe, conversation_id, output)
        await _asked(pipe.execute())

    async def record(self, response_id: str) -> Record:
        record: Record = orjson.loads(await self._field(response_id, "record"))
        return record

    async def items(self, response_id: str) -> list[Item]:
        items: list[Item] = orjson.loads(await self._field(response_id, "input"))
        return items

    async def context(self, response_id: str, max_bytes: int = MAX_CONTEXT_BYTES) -> list[Item]:
        parts: list[list[Item]] = []
        num_bytes = 0
        current = response_id
        while current:
            names = ["record", "input", "previous"]
            found = await _asked(self._client.hmget(_response(current), names))
            if found[0] is None:
                raise no_predecessor(current)
            num_bytes += len(found[0]) + len(found[1])
            if num_bytes > max_bytes:
                raise too_long(max_bytes, "previous_response_id")
            record = orjson.loads(found[0])
            if is_open(record):
                raise not_ended(current)
            parts.append(orjson.loads(found[1]) + record["output"])
            current = found[2].decode()
        return [item for part in reversed(parts) for item in part]

    async def delete(self, response_id: str) -> None:
        if not await _asked(self._client.delete(_response(response_id))):
            raise no_response(response_id)

    async def create_conversation(self, conversation: Conversation, items: Sequence[Item]) -> None:
        head = {
            "created_at": repr(conversation.created_at),
            "metadata": orjson.dumps(conversation.metadata),
            "next": 0,
        }
        key = _conversation(conversation.id)
        await _asked(self._client.hset(key, mapping=head))
        await self.add_items(conversation.id, items)

    async def conversation(self, conversation_id: str) -> Conversation:
        names = ["created_at", "metadata"]
        found = await _asked(self._client.hmget(_conversation(conversation_id), names))
        if found[0] is None:
            raise no_conversation(conversation_id)
        return Conversation(
            id=conversation_id, created_at=float(found[0]), metadata=orjson.loads(found[1])
        )

    async def set_metadata(self, conversation_id: str, metadata: dict[str, str]) -> None:
        await self.conversation(conversation_id)
        told = {"metadata": orjson.dumps(metadata)}
        await _asked(self._client.hset(_conversation(conversation_id), mapping=told))

    async def delete_conversation(self, conversation_id: str) -> None:
        keys = _keys(conversation_id)
        pipe = self._client.pipeline(transaction=True)
        for key in keys:
            pipe.delete(key)
        if not (await _asked(pipe.execute()))[0]:
            raise no_conversation(conversation_id)

    async def add_items(self, conversation_id: str, items: Sequence[Item]) -> None:
        pipe = self._client.pipeline(transaction=True)
        if not await self._append(pipe, conversation_id, items):
            raise no_conversation(conversation_id)
        await _asked(pipe.execute())

    async def conversation_items(
        self, conversation_id: str, max_bytes: int = MAX_CONTEXT_BYTES
    ) -> list[Item]:
        await self.conversation(conversation_id)
        found: list[Item] = []
        num_bytes = 0
        positions = await self._positions(conversation_id, newest_first=False)
        for start in range(0, len(positions), 256):
            for told in await self._at(conversation_id, positions[start : start + 256]):
                num_bytes += len(told)
                if num_bytes > max_bytes:
                    raise too_long(max_bytes, "conversation")
                found.append(orjson.loads(told))
        return found

    async def page_of_items(
        self, conversation_id: str, *, after: str | None, limit: int, newest_first: bool
    ) -> tuple[list[Item], bool]:
        await self.conversation(conversation_id)
        positions = await self._positions(conversation_id, newest_first=newest_first)
        if after is not None:
            position = await self._position(conversation_id, after)
            if position not in positions:
                raise no_cursor(after)
            positions = positions[positions.index(position) + 1 :]
        told = await self._at(conversation_id, positions[:limit])
        return [orjson.loads(item) for item in told], len(positions) > limit

    async def item(self, conversation_id: str, item_id: str) -> Item:
        position = await self._position(conversation_id, item_id)
        told = [] if position is None else await self._at(conversation_id, [position])
        if not told:
            raise no_item(item_id)
        item: Item = orjson.loads(told[0])
        return item

    async def delete_item(self, conversation_id: str, item_id: str) -> None:
        position = await self._position(conversation_id, item_id)
        if position is None:
            raise no_item(item_id)
        _, items, positions = _keys(conversation_id)
        pipe = self._client.pipeline(transaction=True)
        pipe.hdel(items, position.decode())
        pipe.hdel(positions, item_id)
        await _asked(pipe.execute())

    # ---- inside ------------------------------------------------------------------------------

    async def _append(self, pipe: Any, conversation_id: str, items: Sequence[Item]) -> bool:
        """Put into the pipeline what adds the items; False if there is no such conversation."""
        key, items_key, positions_key = _keys(conversation_id)
        end = int(await _asked(self._client.eval(_MAKE_PLACE, 1, key, str(len(items)))))
        if end < 0:
            return False
        if items:
            by_position = {end - len(items) + i: orjson.dumps(each) for i, each in enumerate(items)}
            pipe.hset(items_key, mapping=by_position)
            by_id = {each["id"]: end - len(items) + i for i, each in enumerate(items)}
            pipe.hset(positions_key, mapping=by_id)
        for each in (key, items_key, positions_key):
            pipe.expire(each, self._retention_s)
        return True

    async def _positions(self, conversation_id: str, *, newest_first: bool) -> list[bytes]:
        _, items, _ = _keys(conversation_id)
        found = await _asked(self._client.hkeys(items))
        return sorted(found, key=int, reverse=newest_first)

    async def _position(self, conversation_id: str, item_id: str) -> bytes | None:
        _, _, positions = _keys(conversation_id)
        position: bytes | None = await _asked(self._client.hget(positions, item_id))
        return position

    async def _at(self, conversation_id: str, positions: Sequence[bytes]) -> list[bytes]:
        if not positions:
            return []
        _, items, _ = _keys(conversation_id)
        found = await _asked(self._client.hmget(items, list(positions)))
        return [told for told in found if told is not None]

    async def _field(self, response_id: str, name: str) -> bytes:
        found: bytes | None = await _asked(self._client.hget(_response(response_id), name))
        if found is None:
            raise no_response(response_id)
        return found


@asynccontextmanager
async def open_redis(
    url: str, *, max_connections: int, retention_days: float
) -> AsyncIterator[RedisHistory]:
    """The history in the Redis at that address; ConfigError if it cannot be used."""
    async with open_client(url, max_connections=max_connections) as client:
        yield RedisHistory(client, retention_days=retention_days)


@asynccontextmanager
async def open_client(url: str, *, max_connections: int) -> AsyncIterator[Redis]:
    try:
        client = Redis.from_url(
            url,
            max_connections=max_connections,
            socket_timeout=TIMEOUT_S,
            socket_connect_timeout=TIMEOUT_S,
        )
    except ValueError as error:
        raise ConfigError(f"--redis-url cannot be used: {type(error).__name__}") from error
    try:
        await client.ping()
    except (RedisError, OSError, TimeoutError) as error:
        await client.aclose()
        # The error's text may hold the address, and that a password.
        raise ConfigError(
            f"the Redis of --redis-url does not answer ({type(error).__name__})"
        ) from error
    try:
        yield client
    finally:
        await client.aclose()


async def _asked(answer: Any) -> Any:
    """The answer, whose type depends on the client's version."""
    try:
        return await answer
    except (RedisError, OSError, TimeoutError) as error:
        raise HistoryUnavailable(
            f"the Redis of conversations does not answer ({type(error).__name__}); try again later"
        ) from error


def _response(response_id: str) -> str:
    return f"{PREFIX}response:{response_id}"


def _conversation(conversation_id: str) -> str:
    return f"{PREFIX}conversation:{conversation_id}"


def _keys(conversation_id: str) -> tuple[str, str, str]:
    """The keys of the conversation itself, of its items by position, of positions by item."""
    key = _conversation(conversation_id)
    return key, f"{key}:items", f"{key}:positions"

"""Responses and conversations in SQL, in words that SQLite and PostgreSQL both understand."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Protocol

import orjson

from sapwood.history.interface import (
    DAY_S,
    MAX_CONTEXT_BYTES,
    SWEEP_EVERY_S,
    Conversation,
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

Statement = tuple[str, tuple[Any, ...]]
"""A query with $1, $2, … and its values."""

MIGRATIONS = (
    # The columns' types are PostgreSQL's; SQLite keeps bytes as bytes whatever a type is called.
    """
    CREATE TABLE IF NOT EXISTS responses (
        id TEXT PRIMARY KEY, created_at DOUBLE PRECISION NOT NULL, is_open INTEGER NOT NULL,
        previous_id TEXT, record BYTEA NOT NULL, input BYTEA NOT NULL, events BYTEA);
    CREATE INDEX IF NOT EXISTS responses_by_age ON responses (created_at);
    """,
    """
    CREATE TABLE IF NOT EXISTS conversations (
        id TEXT PRIMARY KEY, created_at DOUBLE PRECISION NOT NULL,
        used_at DOUBLE PRECISION NOT NULL, next_position BIGINT NOT NULL, metadata BYTEA NOT NULL);
    CREATE INDEX IF NOT EXISTS conversations_by_use ON conversations (used_at);
    CREATE TABLE IF NOT EXISTS conversation_items (
        conversation_id TEXT NOT NULL, position BIGINT NOT NULL, id TEXT NOT NULL,
        item BYTEA NOT NULL, PRIMARY KEY (conversation_id, position));
    CREATE INDEX IF NOT EXISTS conversation_items_by_id
        ON conversation_items (conversation_id, id);
    """,
)
"""One script per version. A script may run twice without harm."""

_ADD_RESPONSE = (
    "INSERT INTO responses (id, created_at, is_open, previous_id, record, input) "
    "VALUES ($1, $2, $3, $4, $5, $6)"
)
# The walk ends by itself at the limit, so that no more than that is read.
_CHAIN = """
    WITH RECURSIVE chain (id, previous_id, depth, num_bytes) AS (
        SELECT id, previous_id, 0, length(record) + length(input) FROM responses WHERE id = $1
        UNION ALL
        SELECT earlier.id, earlier.previous_id, chain.depth + 1,
            chain.num_bytes + length(earlier.record) + length(earlier.input)
        FROM chain JOIN responses AS earlier ON earlier.id = chain.previous_id
        WHERE chain.num_bytes <= $2)
    SELECT responses.id, chain.previous_id, chain.num_bytes, is_open, record, input
    FROM chain JOIN responses ON responses.id = chain.id ORDER BY depth DESC
"""
_ADD_CONVERSATION = (
    "INSERT INTO conversations (id, created_at, used_at, next_position, metadata) "
    "VALUES ($1, $2, $3, 0, $4)"
)
# Inserts nothing if the conversation is gone.
_ADD_ITEM = (
    "INSERT INTO conversation_items (conversation_id, position, id, item) "
    "SELECT id, next_position - $2, $3, $4 FROM conversations WHERE id = $1"
)
_MAKE_PLACE = (
    "UPDATE conversations SET next_position = next_position + $2, used_at = $3 WHERE id = $1"
)


class SqlRows(Protocol):
    """A database."""

    async def fetch(self, query: str, *values: Any) -> Sequence[Sequence[Any]]: ...

    async def change(self, statements: Sequence[Statement]) -> list[int]:
        """Run the statements as one transaction. Returns how many rows each has changed."""
        ...


class SqlHistory:
    """A History (interface.py) in a database that has the tables of MIGRATIONS.

    retention_days  for which responses are kept, and conversations after their last use
    """

    def __init__(self, rows: SqlRows, *, retention_days: float) -> None:
        self._rows = rows
        self._retention_s = retention_days * DAY_S
        self._swept_at = time.time()

    async def add(
        self, record: Record, items: Sequence[Item], conversation_id: str | None = None
    ) -> None:
        values = (
            record["id"],
            record["created_at"],
            int(is_open(record)),
            record["previous_response_id"],
            orjson.dumps(record),
            orjson.dumps(items),
        )
        statements = [*self._due_sweeps(), (_ADD_RESPONSE, values)]
        if conversation_id is not None:
            statements += _adding(conversation_id, [*items, *record["output"]])
        await self._rows.change(statements)

    async def record(self, response_id: str) -> Record:
        record: Record = orjson.loads(await self._column("record", response_id))
        return record

    async def items(self, response_id: str) -> list[Item]:
        items: list[Item] = orjson.loads(await self._column("input", response_id))
        return items

    async def context(self, response_id: str, max_bytes: int = MAX_CONTEXT_BYTES) -> list[Item]:
        rows = await self._rows.fetch(_CHAIN, response_id, max_bytes)
        if not rows:
            raise no_predecessor(response_id)
        _, previous_id, num_bytes, *_ = rows[0]
        if num_bytes > max_bytes:
            raise too_long(max_bytes, "previous_response_id")
        if previous_id is not None:
            raise no_predecessor(previous_id)
        found: list[Item] = []
        for id_, _, _, has_not_ended, record, items in rows:
            if has_not_ended:
                raise not_ended(id_)
            found += orjson.loads(items) + orjson.loads(record)["output"]
        return found

    async def delete(self, response_id: str) -> None:
        (num_deleted,) = await self._rows.change(
            [("DELETE FROM responses WHERE id = $1", (response_id,))]
        )
        if not num_deleted:
            raise no_response(response_id)

    async def create_conversation(self, conversation: Conversation, items: Sequence[Item]) -> None:
        created_at = conversation.created_at
        metadata = orjson.dumps(conversation.metadata)
        values = (conversation.id, created_at, created_at, metadata)
        await self._rows.change(
            [
                *self._due_sweeps(),
                (_ADD_CONVERSATION, values),
                *_adding(conversation.id, items),
            ]
        )

    async def conversation(self, conversation_id: str) -> Conversation:
        query = "SELECT created_at, metadata FROM conversations WHERE id = $1"
        rows = await self._rows.fetch(query, conversation_id)
        if not rows:
            raise no_conversation(conversation_id)
        created_at, metadata = rows[0]
        return Conversation(
            id=conversation_id, created_at=created_at, metadata=orjson.loads(metadata)
        )

    async def set_metadata(self, conversation_id: str, metadata: dict[str, str]) -> None:
        query = "UPDATE conversations SET metadata = $2 WHERE id = $1"
        values = (conversation_id, orjson.dumps(metadata))
        if await self._rows.change([(query, values)]) == [0]:
            raise no_conversation(conversation_id)

    async def delete_conversation(self, conversation_id: str) -> None:
        _, num_deleted = await self._rows.change(
            [
                ("DELETE FROM conversation_items WHERE conversation_id = $1", (conversation_id,)),
                ("DELETE FROM conversations WHERE id = $1", (conversation_id,)),
            ]
        )
        if not num_deleted:
            raise no_conversation(conversation_id)

    async def add_items(self, conversation_id: str, items: Sequence[Item]) -> None:
        num_changed, *_ = await self._rows.change(_adding(conversation_id, items))
        if not num_changed:
            raise no_conversation(conversation_id)

    async def conversation_items(
        self, conversation_id: str, max_bytes: int = MAX_CONTEXT_BYTES
    ) -> list[Item]:
        await self.conversation(conversation_id)
        mine = "FROM conversation_items WHERE conversation_id = $1"
        ((num_bytes,),) = await self._rows.fetch(
            f"SELECT COALESCE(SUM(length(item)), 0) {mine}", conversation_id
        )
        if num_bytes > max_bytes:
            raise too_long(max_bytes, "conversation")
        rows = await self._rows.fetch(f"SELECT item {mine} ORDER BY position", conversation_id)
        return [orjson.loads(item) for (item,) in rows]

    async def page_of_items(
        self, conversation_id: str, *, after: str | None, limit: int, newest_first: bool
    ) -> tuple[list[Item], bool]:
        await self.conversation(conversation_id)
        position = 2**62 if newest_first else -1
        if after is not None:
            query = "SELECT position FROM conversation_items WHERE conversation_id = $1 AND id = $2"
            rows = await self._rows.fetch(query, conversation_id, after)
            if not rows:
                raise no_cursor(after)
            position = rows[0][0]
        is_behind, order = ("<", "DESC") if newest_first else (">", "ASC")
        rows = await self._rows.fetch(
            "SELECT item FROM conversation_items WHERE conversation_id = $1 "
            f"AND position {is_behind} $2 ORDER BY position {order} LIMIT $3",
            conversation_id,
            position,
            limit + 1,
        )
        return [orjson.loads(item) for (item,) in rows[:limit]], len(rows) > limit

    async def item(self, conversation_id: str, item_id: str) -> Item:
        query = "SELECT item FROM conversation_items WHERE conversation_id = $1 AND id = $2"
        rows = await self._rows.fetch(query, conversation_id, item_id)
        if not rows:
            raise no_item(item_id)
        item: Item = orjson.loads(rows[0][0])
        return item

    async def delete_item(self, conversation_id: str, item_id: str) -> None:
        query = "DELETE FROM conversation_items WHERE conversation_id = $1 AND id = $2"
        if await self._rows.change([(query, (conversation_id, item_id))]) == [0]:
            raise no_item(item_id)

    def sweeps(self) -> list[Statement]:
        """Statements that delete what is too old."""
        self._swept_at = time.time()
        limit = (self._swept_at - self._retention_s,)
        return [
            ("DELETE FROM responses WHERE created_at < $1 AND is_open = 0", limit),
            (
                "DELETE FROM conversation_items WHERE conversation_id IN "
                "(SELECT id FROM conversations WHERE used_at < $1)",
                limit,
            ),
            ("DELETE FROM conversations WHERE used_at < $1", limit),
        ]

    def _due_sweeps(self) -> list[Statement]:
        return self.sweeps() if time.time() - self._swept_at > SWEEP_EVERY_S else []

    async def _column(self, name: str, response_id: str) -> bytes:
        query = f"SELECT {name} FROM responses WHERE id = $1"
        rows = await self._rows.fetch(query, response_id)
        if not rows:
            raise no_response(response_id)
        column: bytes = rows[0][0]
        return column


def _adding(conversation_id: str, items: Sequence[Item]) -> list[Statement]:
    """Statements that add items at the end; the first one changes a row if there is such a
    conversation."""
    num_items = len(items)
    place: Statement = (_MAKE_PLACE, (conversation_id, num_items, time.time()))
    return [
        place,
        *(
            (_ADD_ITEM, (conversation_id, num_items - i, item["id"], orjson.dumps(item)))
            for i, item in enumerate(items)
        ),
    ]

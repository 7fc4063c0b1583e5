"""What is kept of responses and conversations, whatever store keeps it."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from sapwood.base.errors import InvalidRequest, NotFound, SapwoodError

Record = dict[str, Any]
"""A response as the API shows it."""
Item = dict[str, Any]
"""A message, a function call, its output or a reasoning; each has an `id`."""

MAX_CONTEXT_BYTES = 64 << 20
"""JSON of one conversation that a store reads for a request."""

SWEEP_EVERY_S = 600.0
DAY_S = 24 * 3600.0


class HistoryUnavailable(SapwoodError):
    """The store does not answer."""

    status = 503
    type = "ServiceUnavailableError"


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """created_at: seconds since 1970; metadata: the client's own notes"""

    id: str
    created_at: float
    metadata: dict[str, str]


class History(Protocol):
    """A store of responses, each with the items that it answers, and of conversations.

    Methods that name a response, a conversation or an item raise NotFound if there is none; all
    raise HistoryUnavailable if the store does not answer.
    """

    async def add(
        self, record: Record, items: Sequence[Item], conversation_id: str | None = None
    ) -> None:
        """Keep a response.

        items            its input, without what came before
        conversation_id  a conversation to which input and output are added
        """
        ...

    async def record(self, response_id: str) -> Record: ...

    async def items(self, response_id: str) -> list[Item]:
        """The input of the response, without what came before."""
        ...

    async def context(self, response_id: str, max_bytes: int = MAX_CONTEXT_BYTES) -> list[Item]:
        """All items up to the end of the response, those of earlier responses first.

        Raises InvalidRequest if one of the responses has not ended, or if they are longer."""
        ...

    async def delete(self, response_id: str) -> None: ...

    async def create_conversation(
        self, conversation: Conversation, items: Sequence[Item]
    ) -> None: ...

    async def conversation(self, conversation_id: str) -> Conversation: ...

    async def set_metadata(self, conversation_id: str, metadata: dict[str, str]) -> None: ...

    async def delete_conversation(self, conversation_id: str) -> None: ...

    async def add_items(self, conversation_id: str, items: Sequence[Item]) -> None: ...

    async def conversation_items(
        self, conversation_id: str, max_bytes: int = MAX_CONTEXT_BYTES
    ) -> list[Item]:
        """All items, the oldest first; InvalidRequest if they are longer."""
        ...

    async def page_of_items(
        self, conversation_id: str, *, after: str | None, limit: int, newest_first: bool
    ) -> tuple[list[Item], bool]:
        """At most `limit` items behind the item `after`, and whether there are more.

        Raises InvalidRequest if `after` is no item of the conversation."""
        ...

    async def item(self, conversation_id: str, item_id: str) -> Item: ...

    async def delete_item(self, conversation_id: str, item_id: str) -> None: ...


def new_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"


def is_open(record: Record) -> bool:
    """Whether the response has not ended."""
    return record["status"] in ("queued", "in_progress")


def no_response(response_id: str) -> NotFound:
    return NotFound(f"there is no response {response_id[:80]!r}", param="response_id")


def no_predecessor(response_id: str) -> NotFound:
    return NotFound(
        f"there is no response {response_id[:80]!r}; it may have been deleted",
        param="previous_response_id",
    )


def not_ended(response_id: str) -> InvalidRequest:
    return InvalidRequest(
        f"the response {response_id!r} has not ended yet; wait until it has",
        param="previous_response_id",
    )


def no_conversation(conversation_id: str) -> NotFound:
    return NotFound(
        f"there is no conversation {conversation_id[:80]!r}; it may have been deleted",
        param="conversation",
    )


def no_item(item_id: str) -> NotFound:
    return NotFound(f"the conversation has no item {item_id[:80]!r}", param="item_id")


def no_cursor(item_id: str) -> InvalidRequest:
    return InvalidRequest(f"after is {item_id[:80]!r}, which is not there", param="after")


def too_long(max_bytes: int, param: str) -> InvalidRequest:
    return InvalidRequest(
        f"the conversation has more than {max_bytes} bytes of JSON; begin a new one, with a "
        "summary of this one",
        param=param,
    )

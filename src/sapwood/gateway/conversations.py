"""/v1/conversations: items that responses go on from and are added to.

Source: OpenAI's API reference.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from sapwood.base.errors import InvalidRequest, UnsupportedFeature
from sapwood.gateway.items import input_items, is_item_id
from sapwood.history.interface import (
    Conversation,
    History,
    Item,
    new_id,
    no_conversation,
    no_item,
)
from sapwood.http.body import read_json
from sapwood.http.endpoints import Dialect, Endpoint
from sapwood.http.errors import NATIVE_ERRORS, json_response
from sapwood.http.listing import CURSOR_QUERY, check_query, cursor, page
from sapwood.schema import limits

MAX_ITEMS = limits.CONVERSATION_ITEMS.most
"""Items that one call adds to a conversation."""

_ID = re.compile(r"conv_[0-9a-f]{32}")
_ROOT = "/v1/conversations"
_ONE = "/v1/conversations/{conversation_id}"
_ITEMS = "/v1/conversations/{conversation_id}/items"
_ITEM = "/v1/conversations/{conversation_id}/items/{item_id}"

MAX_PAIRS, MAX_NAME_CHARS, MAX_VALUE_CHARS = (
    limits.METADATA_PAIRS.most,
    limits.METADATA_NAME.most,
    limits.METADATA_VALUE.most,
)
"""Of metadata."""


def conversations_dialect(history: History | None) -> Dialect:
    """history  None: the gateway keeps none, and says so"""
    dialect = Dialect("conversations", errors={_ROOT: NATIVE_ERRORS})
    routes = [
        (_ROOT, ("POST",)),
        (_ONE, ("GET",)),
        (_ONE, ("POST",)),
        (_ONE, ("DELETE",)),
        (_ITEMS, ("GET",)),
        (_ITEMS, ("POST",)),
        (_ITEM, ("GET",)),
        (_ITEM, ("DELETE",)),
    ]
    if history is None:
        handlers = [_not_kept] * len(routes)
    else:
        api = _Conversations(history)
        handlers = [
            api.create,
            api.retrieve,
            api.change,
            api.delete,
            api.list_items,
            api.add_items,
            api.retrieve_item,
            api.delete_item,
        ]
    for (path, methods), handler in zip(routes, handlers, strict=True):
        endpoint = Endpoint(paths=(path,), methods=methods, access="user", is_documented=False)
        dialect.serves(endpoint)(handler)
    return dialect


def conversation_id_of(asked: Mapping[str, Any]) -> str | None:
    """The conversation that a request for a response names; NotFound if it cannot be one."""
    told = asked.get("conversation")
    if told is None:
        return None
    id_ = told.get("id") if isinstance(told, Mapping) else told
    if not isinstance(id_, str):
        raise InvalidRequest("conversation must be a conversation's id", param="conversation")
    return _checked(id_)


class _Conversations:
    def __init__(self, history: History) -> None:
        self._history = history

    async def create(self, request: Request) -> Response:
        told = await read_json(request, optional=True)
        _check_fields(told, ("metadata", "items"))
        conversation = Conversation(
            id=new_id("conv"), created_at=time.time(), metadata=_metadata(told)
        )
        await self._history.create_conversation(conversation, _new_items(told))
        return json_response(_shown(conversation))

    async def retrieve(self, request: Request) -> Response:
        return json_response(_shown(await self._history.conversation(_id(request))))

    async def change(self, request: Request) -> Response:
        told = await read_json(request)
        _check_fields(told, ("metadata",))
        id_ = _id(request)
        await self._history.set_metadata(id_, _metadata(told))
        return json_response(_shown(await self._history.conversation(id_)))

    async def delete(self, request: Request) -> Response:
        id_ = _id(request)
        await self._history.delete_conversation(id_)
        return json_response({"id": id_, "object": "conversation.deleted", "deleted": True})

    async def list_items(self, request: Request) -> Response:
        check_query(request.query_params, CURSOR_QUERY)
        limit, newest_first, after = cursor(request.query_params)
        items, has_more = await self._history.page_of_items(
            _id(request), after=after, limit=limit, newest_first=newest_first
        )
        return json_response(page(items, has_more=has_more))

    async def add_items(self, request: Request) -> Response:
        check_query(request.query_params, ("include", "include[]"))
        told = await read_json(request)
        _check_fields(told, ("items",))
        items = _new_items(told)
        if not items:
            raise InvalidRequest("items is required: a list of items to add", param="items")
        await self._history.add_items(_id(request), items)
        return json_response(page(items, has_more=False))

    async def retrieve_item(self, request: Request) -> Response:
        check_query(request.query_params, ("include", "include[]"))
        return json_response(await self._history.item(_id(request), _item_id(request)))

    async def delete_item(self, request: Request) -> Response:
        id_ = _id(request)
        await self._history.delete_item(id_, _item_id(request))
        return json_response(_shown(await self._history.conversation(id_)))


async def _not_kept(request: Request) -> Response:
    raise UnsupportedFeature(
        "this gateway keeps no conversations; start it with --history-backend sqlite"
    )


def _id(request: Request) -> str:
    return _checked(request.path_params["conversation_id"])


def _checked(id_: str) -> str:
    if not _ID.fullmatch(id_):
        raise no_conversation(id_)
    return id_


def _item_id(request: Request) -> str:
    id_: str = request.path_params["item_id"]
    if not is_item_id(id_):
        raise no_item(id_)
    return id_


def _shown(conversation: Conversation) -> dict[str, Any]:
    return {
        "id": conversation.id,
        "object": "conversation",
        "created_at": int(conversation.created_at),
        "metadata": conversation.metadata,
    }


def _check_fields(told: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for name in told:
        if name not in known:
            raise InvalidRequest(
                f"unknown field {name[:80]!r}; known are {', '.join(known)}", param=name
            )


def _new_items(told: Mapping[str, Any]) -> list[Item]:
    given = told.get("items")
    if given is None:
        return []
    if not isinstance(given, list) or len(given) > MAX_ITEMS:
        raise InvalidRequest(
            f"items must be a list of at most {MAX_ITEMS} items; add more by further calls",
            param="items",
        )
    return input_items(given, "items")


def _metadata(told: Mapping[str, Any]) -> dict[str, str]:
    given = told.get("metadata")
    if given is None:
        return {}
    is_right = (
        isinstance(given, dict)
        and len(given) <= MAX_PAIRS
        and all(
            len(name) <= MAX_NAME_CHARS and isinstance(value, str) and len(value) <= MAX_VALUE_CHARS
            for name, value in given.items()
        )
    )
    if not is_right:
        raise InvalidRequest(
            f"metadata must be an object of at most {MAX_PAIRS} texts, with names of at most "
            f"{MAX_NAME_CHARS} characters and values of at most {MAX_VALUE_CHARS}",
            param="metadata",
        )
    return dict(given)

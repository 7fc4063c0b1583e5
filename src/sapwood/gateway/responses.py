"""/v1/responses with a history at the gateway: any worker can go on from any response.

What came before is put in front of a request's input, and the worker keeps nothing. Responses that
only a worker has, such as those that are generated in the background, are looked for there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import orjson
from starlette.requests import Request
from starlette.responses import Response

from sapwood.base.errors import InvalidRequest, NotFound, UnsupportedFeature
from sapwood.gateway.chats import Respond
from sapwood.gateway.conversations import conversation_id_of
from sapwood.gateway.exchange import Proxy
from sapwood.gateway.found import owner
from sapwood.gateway.items import for_worker, input_items
from sapwood.gateway.kept import Keeping, Kept
from sapwood.gateway.proxy import Forwarded
from sapwood.history.interface import History, Item, new_id, too_long
from sapwood.http.body import body_limits, parse_object, read_bytes
from sapwood.http.endpoints import Dialect, Endpoint
from sapwood.http.errors import json_response
from sapwood.http.listing import CURSOR_QUERY, check_query, paged, query_bool

_OURS = re.compile(r"resp_[0-9a-f]{32}")
_MAX_CONTEXT_BYTES = 2**30
"""Sums of lengths must fit into the integers of a database."""


class Tools(Protocol):
    """Tools that the gateway itself calls."""

    def concerns(self, asked: Mapping[str, Any], earlier: Sequence[Item]) -> bool: ...

    async def respond(
        self,
        proxy: Proxy,
        answer: Respond,
        request: Request,
        asked: Mapping[str, Any],
        *,
        earlier: Sequence[Item],
        new: Sequence[Item],
        max_bytes: int,
    ) -> Response:
        """The answer to a request that they concern."""
        ...

    async def close(self) -> None: ...


def responses_dialect(
    proxy: Proxy, history: History, tools: Tools | None = None, answer: Respond | None = None
) -> Dialect:
    """answer: what answers requests for new responses; None: the workers"""
    dialect = Dialect("responses")
    api = _Responses(proxy, history, tools, answer or _from_workers(proxy))
    for path, method, handler in (
        ("/v1/responses", "POST", api.create),
        ("/v1/responses/{response_id}", "GET", api.retrieve),
        ("/v1/responses/{response_id}", "DELETE", api.delete),
        ("/v1/responses/{response_id}/cancel", "POST", api.cancel),
        ("/v1/responses/{response_id}/input_items", "GET", api.list_input_items),
    ):
        endpoint = Endpoint(paths=(path,), methods=(method,), access="user", is_documented=False)
        dialect.serves(endpoint)(handler)
    return dialect


class _Responses:
    def __init__(
        self, proxy: Proxy, history: History, tools: Tools | None, answer: Respond
    ) -> None:
        self._proxy = proxy
        self._answer = answer
        self._history = history
        self._tools = tools

    async def create(self, request: Request) -> Response:
        raw = await read_bytes(request)
        limits = body_limits(request)
        asked = parse_object(raw, max_depth=limits.max_depth)
        previous_id, conversation_id = _previous(asked), conversation_id_of(asked)
        is_background = bool(asked.get("background"))
        is_kept = asked.get("store") is not False and not is_background
        if conversation_id is not None:
            _check_conversation(previous_id, is_background=is_background, is_kept=is_kept)
        max_bytes = min(limits.max_bytes, _MAX_CONTEXT_BYTES)
        earlier: list[Item] | None = None
        if conversation_id is not None:
            earlier = await self._history.conversation_items(conversation_id, max_bytes)
        elif previous_id is not None:
            earlier = await self._context(previous_id, max_bytes)
            if earlier is None:
                worker = await owner(self._proxy, request, previous_id)
                return Forwarded(self._proxy, request, body=raw, worker=worker)
        tools = self._tools
        if tools is not None and not tools.concerns(asked, earlier or ()):
            tools = None
        if earlier is None and not is_kept and tools is None:
            return self._answer(request, raw)
        items = input_items(asked.get("input"))
        answer: Response
        if tools is None:
            body = _for_worker(asked, earlier, items, is_kept=is_kept)
            if len(body) > limits.max_bytes:
                raise too_long(limits.max_bytes, "input")
            answer = self._answer(request, body)
        else:
            given = asked.get("input")
            answer = await tools.respond(
                self._proxy,
                self._answer,
                request,
                asked,
                earlier=for_worker(earlier or ()),
                # By a client's own ids an approval names the call that it is about.
                new=given if isinstance(given, list) else for_worker(items),
                max_bytes=limits.max_bytes,
            )
        if not is_kept:
            return answer
        keeping = Keeping(
            history=self._history,
            response_id=new_id("resp"),
            items=items,
            previous_id=previous_id,
            conversation_id=conversation_id,
        )
        return Kept(answer, keeping)

    async def retrieve(self, request: Request) -> Response:
        id_ = request.path_params["response_id"]
        try:
            record = await self._history.record(_ours(id_))
        except NotFound:
            return await self._from_worker(request, id_)
        check_query(request.query_params, ("stream", "include", "include[]"))
        if query_bool(request.query_params, "stream"):
            raise InvalidRequest(
                "the gateway keeps no events of a response; retrieve it with stream=false",
                param="stream",
            )
        return json_response(record)

    async def delete(self, request: Request) -> Response:
        id_ = request.path_params["response_id"]
        try:
            await self._history.delete(_ours(id_))
        except NotFound:
            return await self._from_worker(request, id_)
        return json_response({"id": id_, "object": "response", "deleted": True})

    async def cancel(self, request: Request) -> Response:
        id_ = request.path_params["response_id"]
        try:
            await self._history.record(_ours(id_))
        except NotFound:
            return await self._from_worker(request, id_)
        raise InvalidRequest(
            "only a response that was made with background=true can be cancelled, and this one "
            "has ended"
        )

    async def list_input_items(self, request: Request) -> Response:
        id_ = request.path_params["response_id"]
        try:
            record = await self._history.record(_ours(id_))
        except NotFound:
            return await self._from_worker(request, id_)
        check_query(request.query_params, CURSOR_QUERY)
        items = await self._history.items(id_)
        previous_id = record["previous_response_id"]
        if previous_id is not None:
            items = [*await self._history.context(previous_id), *items]
        return json_response(paged(items, request.query_params))

    async def _context(self, previous_id: str, max_bytes: int) -> list[Item] | None:
        """None: the gateway has no such response."""
        try:
            record = await self._history.record(_ours(previous_id))
        except NotFound:
            return None
        if record.get("conversation") is not None:
            raise InvalidRequest(
                f"the response {previous_id!r} belongs to a conversation, whose items are not "
                "kept twice; send conversation instead",
                param="previous_response_id",
            )
        return await self._history.context(previous_id, max_bytes)

    async def _from_worker(self, request: Request, id_: str) -> Response:
        worker = await owner(self._proxy, request, id_)
        return Forwarded(self._proxy, request, worker=worker)


def _from_workers(proxy: Proxy) -> Respond:
    def forward(request: Request, body: bytes) -> Response:
        return Forwarded(proxy, request, body=body)

    return forward


def _ours(response_id: str) -> str:
    """NotFound if no response of the gateway's can have that id."""
    if not _OURS.fullmatch(response_id):
        raise NotFound("the gateway made no such id")
    return response_id


def _previous(asked: Mapping[str, Any]) -> str | None:
    previous = asked.get("previous_response_id")
    if previous is not None and not isinstance(previous, str):
        raise InvalidRequest(
            "previous_response_id must be a response's id", param="previous_response_id"
        )
    return previous


def _check_conversation(previous_id: str | None, *, is_background: bool, is_kept: bool) -> None:
    if previous_id is not None:
        raise InvalidRequest(
            "a response goes on from previous_response_id or from conversation; send only one",
            param="conversation",
        )
    if is_background:
        raise UnsupportedFeature(
            "a response in the background is kept by a worker, which does not know the gateway's "
            "conversations; leave background out",
            param="background",
        )
    if not is_kept:
        raise InvalidRequest(
            "a response that is added to a conversation is kept; leave store out", param="store"
        )


def _for_worker(
    asked: Mapping[str, Any],
    earlier: Sequence[Item] | None,
    items: Sequence[Item],
    *,
    is_kept: bool,
) -> bytes:
    """The body of the request that a worker gets.

    earlier  what came before; None: nothing, and the input stays as the client spelled it
    """
    ours = ("previous_response_id", "conversation")
    body = {name: value for name, value in asked.items() if name not in ours}
    if earlier is not None:
        body["input"] = for_worker([*earlier, *items])
    if is_kept:
        body["store"] = False
    return orjson.dumps(body)

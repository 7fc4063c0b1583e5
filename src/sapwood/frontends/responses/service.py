"""The service behind the routes of /v1/responses."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from sapwood.base.errors import InvalidRequest, NotFound, SapwoodError, UnsupportedFeature
from sapwood.frontends.responses.answer import Answer, Event, encoded
from sapwood.frontends.responses.items import input_items
from sapwood.frontends.responses.protocol import REQUEST_FIELDS, ResponsesRequest
from sapwood.frontends.responses.request import NAMES, chat_body, has_logprobs, head, in_our_words
from sapwood.frontends.responses.running import Running
from sapwood.frontends.responses.store import ResponseStore
from sapwood.frontends.serving.services import Services
from sapwood.history.interface import Item, Record, new_id
from sapwood.http.body import read_json
from sapwood.http.errors import internal_error, json_response, native_body
from sapwood.http.in_process import Refused, streamed
from sapwood.http.listing import CURSOR_QUERY, check_query, paged, query_bool, query_int
from sapwood.http.routing import ROUTING_KEY_HEADER
from sapwood.http.sse import EVENT_STREAM, EventStream, Framing, until_disconnect
from sapwood.schema.fields import parse
from sapwood.schema.unsupported import refuse, translate

log = logging.getLogger(__name__)

CHAT = "/v1/chat/completions"
_PASSED_HEADERS = frozenset({ROUTING_KEY_HEADER.encode()})
_RETRIEVE_QUERY = ("stream", "starting_after", "include", "include[]", "include_obfuscation")


def _failure(error: SapwoodError) -> bytes:
    """The event that ends a stream if not even response.failed could be sent."""
    content = {"code": str(error.status), "message": error.message, "param": error.param}
    return encoded({"type": "error", "sequence_number": 0, **content})


FRAMING = Framing(content_type=EVENT_STREAM, end=b"", failure=_failure)
"""No [DONE]: the last event is response.completed, .incomplete or .failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """One response to be made.

    body  of the chat that makes it
    """

    answer: Answer
    body: dict[str, Any]
    headers: list[tuple[bytes, bytes]]
    is_stored: bool

    @property
    def record(self) -> Record:
        return self.answer.record


class Responses:
    """Makes responses out of chat completions, and keeps them.

    store     where responses are kept; None: nowhere
    chat_app  the application that answers chat completions
    """

    def __init__(self, services: Services, store: ResponseStore | None, chat_app: ASGIApp) -> None:
        self._services = services
        self._store = store
        self._chat_app = chat_app
        self._running: dict[str, Running] = {}

    async def create(self, request: Request) -> Response:
        asked = parse(await read_json(request), REQUEST_FIELDS)
        self._services.adapter_of(asked.model)
        is_stored = self._is_stored(asked)
        new_items = input_items(asked.input)
        items = [*await self._conversation(asked), *new_items]
        if not items:
            raise InvalidRequest("input is required", param="input")
        response_id = new_id("resp")
        work = _Work(
            answer=Answer(
                head(asked, self._services, response_id, is_stored=is_stored),
                with_logprobs=has_logprobs(asked),
            ),
            body=chat_body(asked, items, response_id),
            headers=[header for header in request.headers.raw if header[0] in _PASSED_HEADERS],
            is_stored=is_stored,
        )
        translate(NAMES)
        if asked.background:
            return await self._in_background(work, new_items, is_streamed=asked.stream)
        if asked.stream:
            return EventStream(self._encoded(work, new_items), native_body, FRAMING)
        await until_disconnect(self._whole(work, new_items), request.receive)
        return json_response(work.record)

    async def retrieve(self, request: Request) -> Response:
        response_id = request.path_params["response_id"]
        query = request.query_params
        check_query(query, _RETRIEVE_QUERY)
        store = self._kept(response_id)
        if not query_bool(query, "stream"):
            if "starting_after" in query:
                raise InvalidRequest(
                    "starting_after is only for stream=true; leave it out", param="starting_after"
                )
            return json_response(await store.history.record(response_id))
        first = 0
        if "starting_after" in query:
            first = 1 + query_int(query, "starting_after", 0, low=0, high=2**31)
        running = self._running.get(response_id)
        if running is not None:
            return EventStream(running.listen(first), native_body, FRAMING)
        told = await store.events(response_id)
        if told is None:
            raise InvalidRequest(
                "only responses that were made with background=true and stream=true can be "
                "streamed again; retrieve it with stream=false",
                param="stream",
            )
        return EventStream(_replayed(told, first), native_body, FRAMING)

    async def delete(self, request: Request) -> Response:
        response_id = request.path_params["response_id"]
        store = self._kept(response_id)
        running = self._running.get(response_id)
        if running is not None:
            await running.cancel()
        await store.history.delete(response_id)
        return json_response({"id": response_id, "object": "response", "deleted": True})

    async def cancel(self, request: Request) -> Response:
        response_id = request.path_params["response_id"]
        store = self._kept(response_id)
        record = await store.history.record(response_id)
        if not record["background"]:
            raise InvalidRequest(
                "only a response that was made with background=true can be cancelled; close the "
                "connection of another one instead"
            )
        running = self._running.get(response_id)
        if running is not None:
            await running.cancel()
            record = await store.history.record(response_id)
        return json_response(record)

    async def list_input_items(self, request: Request) -> Response:
        query = request.query_params
        check_query(query, CURSOR_QUERY)
        response_id = request.path_params["response_id"]
        history = self._kept(response_id).history
        record = await history.record(response_id)
        items = await history.items(response_id)
        if record["previous_response_id"] is not None:
            items = [*await history.context(record["previous_response_id"]), *items]
        return json_response(paged(items, query))

    # ---- inside ------------------------------------------------------------------------------

    def _is_stored(self, asked: ResponsesRequest) -> bool:
        if self._store is None and (asked.store or asked.background):
            impossible = UnsupportedFeature(
                "this server keeps no responses, so neither store nor background is possible; "
                "leave them out, or start the server with --responses-store sqlite",
                param="background" if asked.background else "store",
            )
            # A client that is not answered at once waits for a response that nobody keeps.
            if asked.background:
                raise impossible
            refuse(impossible)
        if asked.background and asked.store is False:
            raise InvalidRequest(
                "background needs the response to be stored; leave store out", param="store"
            )
        return self._store is not None and asked.store is not False

    def _kept(self, response_id: str) -> ResponseStore:
        if self._store is None:
            raise NotFound(
                f"there is no response {response_id[:80]!r}: this server keeps none; start it "
                "with --responses-store sqlite"
            )
        return self._store

    async def _conversation(self, asked: ResponsesRequest) -> list[Item]:
        previous = asked.previous_response_id
        if previous is None:
            return []
        if self._store is None:
            raise UnsupportedFeature(
                "this server keeps no responses, so none can be gone on from; send the whole "
                "conversation as input, or start the server with --responses-store sqlite",
                param="previous_response_id",
            )
        return await self._store.history.context(previous)

    async def _in_background(
        self, work: _Work, items: Sequence[Item], *, is_streamed: bool
    ) -> Response:
        assert self._store is not None
        running = Running()
        running.tell(work.answer.queue())
        await self._store.history.add(work.record, items)
        shown = {**work.record, "output": []}
        response_id = work.record["id"]
        self._running[response_id] = running

        def ended() -> None:
            del self._running[response_id]
            # The response may have been cancelled before its first step.
            running.tell(work.answer.cancel())
            self._save(work, running.events if is_streamed else None)

        running.start(self._work_on(work, running), ended)
        if is_streamed:
            return EventStream(running.listen(0), native_body, FRAMING)
        return json_response(shown)

    async def _work_on(self, work: _Work, running: Running) -> None:
        answer = work.answer
        is_begun = False
        try:
            async with aclosing(self._chat(work)) as chunks:
                async for chunk in chunks:
                    if not is_begun:
                        is_begun = True
                        running.tell(answer.go_on())
                        self._save(work)
                    running.tell(answer.add(chunk))
            running.tell(answer.finish())
        except Refused as error:
            running.tell(answer.fail(in_our_words(error)))
        except Exception:
            log.exception("a response in the background failed")
            running.tell(answer.fail(internal_error()))

    async def _whole(self, work: _Work, items: Sequence[Item]) -> None:
        async with aclosing(self._told(work, items, raises=True)) as events:
            async for _ in events:
                continue

    async def _encoded(self, work: _Work, items: Sequence[Item]) -> AsyncGenerator[bytes, None]:
        async with aclosing(self._told(work, items, raises=False)) as parts:
            async for events in parts:
                if events:
                    yield b"".join(map(encoded, events))

    async def _told(
        self, work: _Work, items: Sequence[Item], *, raises: bool
    ) -> AsyncGenerator[list[Event], None]:
        """The events of a response in the foreground, from its first token on.

        raises  whether an error after the first token is raised, instead of becoming an event
        """
        answer = work.answer
        is_begun = False
        try:
            async with aclosing(self._chat(work)) as chunks:
                async for chunk in chunks:
                    begun: list[Event] = []
                    if not is_begun:
                        begun = answer.begin()
                        if work.is_stored and self._store is not None:
                            await self._store.history.add(work.record, items)
                        is_begun = True
                    yield begun + answer.add(chunk)
            yield answer.finish()
        except Refused as error:
            refused = in_our_words(error)
            failed = answer.fail(refused)
            if raises or not is_begun:
                raise refused from None
            yield failed
        finally:
            # If the client has left, the response is still open: what exists of it is kept.
            answer.cancel()
            if is_begun:
                self._save(work)

    def _chat(self, work: _Work) -> AsyncGenerator[dict[str, Any], None]:
        return streamed(self._chat_app, CHAT, work.body, work.headers)

    def _save(self, work: _Work, events: Sequence[bytes] | None = None) -> None:
        if work.is_stored and self._store is not None:
            self._store.replace_soon(work.record, events)


async def _replayed(told: bytes, first: int) -> AsyncGenerator[bytes, None]:
    """The kept events from number `first` on; each event ends with an empty line."""
    events = told.split(b"\n\n")[:-1]
    if first < len(events):
        yield b"\n\n".join(events[first:]) + b"\n\n"

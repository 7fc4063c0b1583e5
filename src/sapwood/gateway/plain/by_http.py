"""An answer of /generate as tokens."""

from __future__ import annotations

from sapwood.base.errors import SapwoodError
from sapwood.gateway.client import Answer
from sapwood.gateway.headers import is_event_stream
from sapwood.gateway.metrics import EVENT
from sapwood.gateway.plain.generate import GenerateEvents, MalformedAnswer
from sapwood.gateway.plain.refused import Refused, message_of
from sapwood.schema.output import RequestOutput
from sapwood.schema.request import Generate

MAX_ERROR_BYTES = 64 << 10


class EventTokens:
    """A worker's answer by HTTP: a TokenAnswer."""

    def __init__(self, answer: Answer, request: Generate) -> None:
        self._answer = answer
        self._events = GenerateEvents(request)

    @property
    def status(self) -> int:
        return self._answer.status

    async def refusal(self) -> SapwoodError | None:
        answer = self._answer
        if answer.status == 200 and is_event_stream(answer.headers):
            return None
        body = await answer.body(MAX_ERROR_BYTES)
        if answer.status < 400:
            return Refused(
                502, f"the worker answered /generate with {answer.status}, but no stream"
            )
        return Refused(answer.status, message_of(body) or f"the worker answered {answer.status}")

    def watch(self, idle_s: float) -> None:
        self._answer.watch(idle_s)

    async def next(self) -> tuple[list[RequestOutput], int]:
        answer = self._answer
        while True:
            is_complete = answer.is_complete
            piece = answer.take()
            outputs = self._events.feed(piece)
            if outputs:
                return outputs, piece.count(EVENT)
            if is_complete:
                raise MalformedAnswer("the answer has ended without a finish_reason")
            await answer.more()

    def close(self) -> None:
        self._answer.close()

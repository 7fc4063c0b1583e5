"""How the gateway talks to a worker that does not speak HTTP, and answers that are tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from sapwood.base.errors import SapwoodError
from sapwood.schema.output import RequestOutput
from sapwood.schema.request import Generate

Metadata = Sequence[tuple[str, str]]
"""What goes with a request beside it, as HTTP's headers do."""


class TokenAnswer(Protocol):
    """A worker's answer to a request for tokens, of which the beginning has come."""

    @property
    def status(self) -> int:
        """As HTTP's."""
        ...

    async def refusal(self) -> SapwoodError | None:
        """What the worker says instead of tokens; None: there will be tokens."""
        ...

    def watch(self, idle_s: float) -> None:
        """From now on the answer fails if nothing of it comes for that many seconds; 0: never."""
        ...

    async def next(self) -> tuple[list[RequestOutput], int]:
        """(outputs that have come, how many pieces of the answer they were). The last one has a
        `finish`. Raises WorkerFailure or MalformedAnswer."""
        ...

    def close(self) -> None:
        """End the request at the worker, if it has not ended."""
        ...


class Link(Protocol):
    """The connection to one worker."""

    async def send(
        self, request: Generate, *, lora: str, max_new_tokens: int | None, metadata: Metadata
    ) -> TokenAnswer:
        """Send a request for tokens, or for an embedding, and wait for the answer's beginning.

        lora    name of the adapter; "": none
        Raises  WorkerFailure; UnsupportedFeature for what such a request cannot ask for
        """
        ...

    async def ask(
        self, method: str, path: str, *, body: bytes, metadata: Metadata, timeout_s: float
    ) -> tuple[int, bytes]:
        """(status, body), as HTTP would answer what the gateway asks all workers.

        Raises WorkerFailure"""
        ...

    def give_up_unanswered(self, reason: str) -> None:
        """Requests that have no answer yet fail now."""
        ...

    async def close(self) -> None: ...

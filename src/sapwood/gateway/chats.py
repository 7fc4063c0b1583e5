"""Chats of plain engines as the gateway's application sees them; `app` makes them of dialects."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

from starlette.requests import Request
from starlette.responses import Response

from sapwood.gateway.exchange import Proxy
from sapwood.http.endpoints import Dialect, Handler
from sapwood.schema.config.gateway import GatewayConfig

if TYPE_CHECKING:
    # Needs packages that a gateway without tokenizers has not.
    from sapwood.gateway.tokenizers.served import ServedTokenizers

Respond = Callable[[Request, bytes], Response]
"""What answers a request for a response with this body: a worker, or the gateway by its tokens."""


class Chats(Protocol):
    """What the gateway answers by a model's tokenizer, template and parsers."""

    @property
    def handlers(self) -> Mapping[str, Handler]:
        """Path -> what answers it; requests about other models go to a worker."""
        ...

    @property
    def dialect(self) -> Dialect:
        """The endpoints of the parsers alone."""
        ...

    def respond(self, request: Request, body: bytes) -> Response:
        """The answer to a request for a response, which keeps nothing."""
        ...


ChatMaker = Callable[[GatewayConfig, "ServedTokenizers", Proxy], Chats]

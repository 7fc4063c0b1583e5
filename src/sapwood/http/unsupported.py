"""Names the fields that had no effect in a header of the answer."""

from __future__ import annotations

import logging

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sapwood.schema.unsupported import plain, warning_only

log = logging.getLogger(__name__)

HEADER = "x-sapwood-unsupported-fields"


class NamesUnsupported:
    """ASGI middleware of a server that warns: names the fields without effect in the answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        with warning_only() as noted:

            async def sending(message: Message) -> None:
                if message["type"] == "http.response.start" and noted:
                    path = plain(scope["path"])
                    log.warning("%s: answered without the unsupported fields %s", path, noted)
                    header = (HEADER.encode(), str(noted).encode())
                    message = {**message, "headers": [*message.get("headers", ()), header]}
                await send(message)

            await self._app(scope, receive, sending)

"""An answer that is held back until it is whole."""

from __future__ import annotations

from starlette.types import Message

from sapwood.base.errors import SapwoodError


class Held:
    """An ASGI `send` that keeps what it gets.

    max_bytes  of the body
    too_long   what is raised when there is more
    """

    def __init__(self, max_bytes: int, too_long: SapwoodError) -> None:
        self.start: Message | None = None
        self.body = bytearray()
        self.is_whole = False
        self._max_bytes = max_bytes
        self._too_long = too_long

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.start = message
            return
        self.body += message.get("body", b"")
        if len(self.body) > self._max_bytes:
            raise self._too_long
        self.is_whole = not message.get("more_body", False)

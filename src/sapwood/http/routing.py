"""The routing key, which says which requests belong together."""

from __future__ import annotations

from starlette.requests import Request

ROUTING_KEY_HEADER = "x-smg-routing-key"


def routing_key(request: Request, given: str) -> str:
    """The key in the body's field, else in the header, which a gateway may set; "": no key."""
    return given or request.headers.get(ROUTING_KEY_HEADER, "")

"""Which requests belong together: the routing key."""

from __future__ import annotations

from starlette.requests import Request

ROUTING_KEY_HEADER = "x-smg-routing-key"


def routing_key(request: Request, given: str) -> str:
    """The body's own field, else the header, which a gateway sets; "": none."""
    return given or request.headers.get(ROUTING_KEY_HEADER, "")

"""The audit log: who has called the endpoints that steer the gateway, and what was answered."""

from __future__ import annotations

import logging

from starlette.types import Scope

from sapwood.http.auth import CALLER
from sapwood.http.callers import Caller

log = logging.getLogger(__name__)
MAX_CHARACTERS = 500


def audit(scope: Scope, status: int) -> None:
    """Log one call that was answered with this HTTP status."""
    caller: Caller | None = scope.get(CALLER)
    address = scope.get("client")
    log.info(
        "%s %s answered with %d; caller %s, role %s, from %s",
        scope["method"],
        _printable(scope["path"]),
        status,
        "unknown" if caller is None else _printable(caller.name),
        "none" if caller is None else caller.role,
        "unknown" if address is None else address[0],
    )


def _printable(text: str) -> str:
    """The text as part of one line, whatever a caller has put into it."""
    return ascii(text)[1:-1][:MAX_CHARACTERS]

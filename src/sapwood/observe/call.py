"""The HTTP call that the current task works for.

A request's path leads through dialects that have no reason to know about metrics or traces, so what
these need from the call's headers travels beside them: in a context variable, which asyncio hands
to every task that the call starts.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any


@dataclass(slots=True)
class Call:
    """One HTTP call.

    path    the path in the request line
    labels  values of the caller's own metric labels, in the order of the allowed names
    trace   the span of the call, an `opentelemetry.trace.Span`; None: the call is not traced
    """

    path: str
    labels: tuple[str, ...] = ()
    trace: Any = None


current_call: ContextVar[Call | None] = ContextVar("current_call", default=None)

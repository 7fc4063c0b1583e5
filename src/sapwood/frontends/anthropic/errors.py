"""The statuses of Anthropic's API that HTTP does not define."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sapwood.base.errors import SapwoodError
from sapwood.http.errors import ANTHROPIC_OVERLOADED


class AnthropicOverloaded(SapwoodError):
    """The server cannot take the request now; other dialects answer 503 then.

    The queue is full, the server drains, or the engine is starting or has died.

    Anthropic's clients try again after it, as they do after any 5xx.
    """

    status = ANTHROPIC_OVERLOADED
    type = "overloaded_error"


@contextmanager
def anthropic_statuses() -> Iterator[None]:
    """Turns errors of status 503 into AnthropicOverloaded."""
    try:
        yield
    except SapwoodError as error:
        if error.status != 503:
            raise
        raise AnthropicOverloaded(error.message, param=error.param) from error

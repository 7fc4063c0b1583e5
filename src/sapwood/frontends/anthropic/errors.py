"""Statuses that Anthropic's API has and HTTP has not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sapwood.base.errors import SapwoodError
from sapwood.frontends.common.errors import ANTHROPIC_OVERLOADED


class AnthropicOverloaded(SapwoodError):
    """What is a 503 elsewhere: a full queue, a drain, an engine that starts or has died.

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

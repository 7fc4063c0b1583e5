"""What a call asked for in vain, where the server answers all the same.

With `--unsupported-fields error` a field that asks for what the server does not do is an error.
With `warn` the call is answered as if the field had been left out; a header of the answer and a
line of the log name the field.

Fields are read in many places, down to the parts of a message, which know nothing of the answer's
headers. So the list of a call's fields lies in a context variable, which asyncio hands to every
task that the call starts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

from sapwood.base.errors import InvalidRequest

MAX_NAMED = 16
MAX_NAME_CHARS = 64
"""A client chooses the names, so their number and length in the header and the log are bounded."""

OnUnsupported = Literal["error", "warn"]

_NOT_PLAIN = re.compile(r"[^A-Za-z0-9_.\[\]/-]")


class Unsupported:
    """The fields of one call that had no effect, in the order in which they were found."""

    def __init__(self) -> None:
        self._names: dict[str, None] = {}
        self._num_others = 0
        self._other_words: Mapping[str, str] = {}

    def translate(self, words: Mapping[str, str]) -> None:
        """From now on, names that begin with a key begin with its value instead."""
        self._other_words = words

    def add(self, name: str) -> None:
        for word, other in self._other_words.items():
            if name.startswith(word):
                name = other + name.removeprefix(word)
        shown = plain(name)
        if shown in self._names:
            return
        if len(self._names) < MAX_NAMED:
            self._names[shown] = None
        else:
            self._num_others += 1

    def __bool__(self) -> bool:
        return bool(self._names)

    def __str__(self) -> str:
        named = ", ".join(self._names)
        return f"{named}, and {self._num_others} more" if self._num_others else named


_unsupported: ContextVar[Unsupported | None] = ContextVar("unsupported", default=None)
"""Those of the current call; None: the server refuses such calls."""


def refuse(error: InvalidRequest, *, name: str | None = None) -> None:
    """Raise that error; where the server only warns, note the field that the error is about.

    A caller goes on as if the client had left the field out.
    """
    noted = _unsupported.get()
    name = name or error.param
    if noted is None or name is None:
        raise error
    noted.add(name)


def translate(words: Mapping[str, str]) -> None:
    """For a dialect that asks another one to answer: the names of fields in its own words.

    words  beginning of a name in the other dialect -> the beginning in this one
    """
    noted = _unsupported.get()
    if noted is not None:
        noted.translate(words)


@contextmanager
def warning_only() -> Iterator[Unsupported]:
    """Inside, `refuse` raises nothing, but notes the fields in what this gives."""
    noted = Unsupported()
    token = _unsupported.set(noted)
    try:
        yield noted
    finally:
        _unsupported.reset(token)


def plain(name: str) -> str:
    """The name, short and without what could end a header's value or a line of the log."""
    return _NOT_PLAIN.sub("?", name[:MAX_NAME_CHARS])

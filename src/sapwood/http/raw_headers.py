"""Headers as they are in an ASGI scope: pairs of bytes, names in lower case.

Starlette's `Headers` decodes names and values for each question, which costs a gateway more than
the questions are worth.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import overload

RawHeaders = Sequence[tuple[bytes, bytes]]


@overload
def find(headers: RawHeaders, name: bytes) -> bytes | None: ...
@overload
def find(headers: RawHeaders, name: bytes, otherwise: bytes) -> bytes: ...
def find(headers: RawHeaders, name: bytes, otherwise: bytes | None = None) -> bytes | None:
    """The first value under that name."""
    for each, value in headers:
        if each == name:
            return value
    return otherwise


def has_any(headers: RawHeaders, names: Collection[bytes]) -> bool:
    return any(name in names for name, _ in headers)

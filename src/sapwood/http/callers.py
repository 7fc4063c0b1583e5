"""Who calls: names and roles of those who bring a key of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from hashlib import sha256
from typing import Protocol


class Role(StrEnum):
    """USER may use the server; ADMIN may steer it too."""

    USER = "user"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class Caller:
    """A caller with a name, for logs and limits."""

    name: str
    role: Role


class Callers(Protocol):
    """Knows some callers by what they send as a key."""

    async def find(self, credential: str) -> Caller | None:
        """The caller; None if the credential is none that is known here. Raises SapwoodError if the
        credential is one of this kind, but cannot be used, with the reason."""
        ...


class NamedKeys:
    """Callers with a key each, by the digest of their keys."""

    def __init__(self, callers: Mapping[bytes, Caller]) -> None:
        # A look-up by digest tells nothing by its duration: a guess's digest is random.
        self._callers = dict(callers)

    async def find(self, credential: str) -> Caller | None:
        return self._callers.get(digest_of(credential))


def digest_of(key: str) -> bytes:
    return sha256(key.encode("latin-1", "replace")).digest()

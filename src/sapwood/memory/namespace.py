"""Which requests may reuse each other's prefixes."""

from __future__ import annotations

from dataclasses import dataclass

from sapwood.memory.node import TOKEN_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """A namespace of its own that begins in the middle of prefixes of another.

    base         the namespace of the whole pages before `first_token`, which both share
    first_token  the first token that only the branch has
    name         of the branch
    """

    base: str
    first_token: int
    name: str

    @property
    def mark(self) -> bytes:
        """What tells the branch's first page from other pages with the same tokens: those of the
        base, and of branches that begin elsewhere in the page."""
        return f"{self.first_token}:{self.name}\0".encode()


Namespace = str | Branch
"""A name, which is that of a root of the prefix tree, or a branch below one."""


def base_of(namespace: Namespace) -> str:
    """The name of the root below which the namespace's prefixes are."""
    return namespace.base if isinstance(namespace, Branch) else namespace


def place_at(namespace: Namespace, key: bytes, offset: int, page_bytes: int) -> bytes:
    """`Node.place` of a node whose tokens begin at that byte of a key."""
    first = key[offset : offset + page_bytes]
    if isinstance(namespace, Branch) and offset == _begin(namespace, page_bytes):
        return namespace.mark + first
    return first


def end_from(namespace: Namespace, key: bytes, offset: int, page_bytes: int) -> int:
    """The byte of a key where a node ends at the latest that begins at `offset`: no node has pages
    of a branch and of its base."""
    if isinstance(namespace, Branch):
        begin = _begin(namespace, page_bytes)
        if offset < begin < len(key):
            return begin
    return len(key)


def _begin(branch: Branch, page_bytes: int) -> int:
    """The byte of a key where the branch's first page begins."""
    return branch.first_token * TOKEN_BYTES // page_bytes * page_bytes

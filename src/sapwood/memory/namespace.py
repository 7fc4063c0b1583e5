"""Which requests may reuse each other's prefixes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from sapwood.memory.node import TOKEN_BYTES
from sapwood.schema.kv_events import PageHash

MEDIUM = "medium "
"""Begins the name of a branch whose prefixes show a picture or video; its digest follows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """A namespace of its own that begins in the middle of prefixes of another.

    base         the namespace of the whole pages before `first_token`, which both share
    first_token  the first token that only the branch has
    name         of the branch
    """

    base: Namespace
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
    while isinstance(namespace, Branch):
        namespace = namespace.base
    return namespace


def place_at(namespace: Namespace, key: bytes, offset: int, page_bytes: int) -> bytes:
    """`Node.place` of a node whose tokens begin at that byte of a key."""
    place = key[offset : offset + page_bytes]
    for branch in _branches(namespace):
        if offset == _begin(branch, page_bytes):
            place = branch.mark + place
    return place


def end_from(namespace: Namespace, key: bytes, offset: int, page_bytes: int) -> int:
    """The byte of a key where a node ends at the latest that begins at `offset`: no node has pages
    of a branch and of its base."""
    end = len(key)
    for branch in _branches(namespace):
        begin = _begin(branch, page_bytes)
        if offset < begin < end:
            end = begin
    return end


def page_digests(namespace: Namespace, key: bytes, page_bytes: int) -> list[bytes]:
    """Of the whole pages of a key, as `Stretch.digests` has them of the tree's pages."""
    digest = PageHash.seed(base_of(namespace))
    digests = []
    for offset in range(0, len(key) - page_bytes + 1, page_bytes):
        place = place_at(namespace, key, offset, page_bytes)
        if len(place) > page_bytes:
            digest = PageHash.of(digest, place[:-page_bytes])
        digest = PageHash.of(digest, place[-page_bytes:])
        digests.append(digest)
    return digests


def branches_of(mark: str) -> list[str]:
    """The names of the branches whose marks these are, one after another."""
    return [one.partition(":")[2] for one in mark.split("\0") if one]


def branches_before(namespace: Namespace, end: int) -> list[Branch]:
    """The branches that begin before that byte of a key, the outermost first."""
    found = [one for one in _branches(namespace) if one.first_token * TOKEN_BYTES < end]
    return sorted(found, key=lambda one: one.first_token)


def renamed(mark: str, rename: Callable[[str], str]) -> str:
    """The marks with other names of their branches."""
    parts = [one.partition(":") for one in mark.split("\0") if one]
    return "".join(f"{first}:{rename(name)}\0" for first, _, name in parts)


def _branches(namespace: Namespace) -> Iterator[Branch]:
    """The namespace and those that it is a branch of, the outermost first."""
    while isinstance(namespace, Branch):
        yield namespace
        namespace = namespace.base


def _begin(branch: Branch, page_bytes: int) -> int:
    """The byte of a key where the branch's first page begins."""
    return branch.first_token * TOKEN_BYTES // page_bytes * page_bytes

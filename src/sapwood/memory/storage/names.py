"""Names of page copies in a storage: what two engines must have in common to share one."""

from __future__ import annotations

import re
import uuid
from collections.abc import Sequence
from typing import NamedTuple

from sapwood.schema.cache import CacheKind, CachePool

IDENTITY_DIGITS = 16
_UNFIT = re.compile(r"[^A-Za-z0-9.+@=-]")
MOST_NAME = 60
"""Characters of a model's name in the name of a copy."""
_NAME = re.compile(
    rf"[0-9a-f]{{64}}_([A-Za-z0-9.+@=-]*)-([0-9a-f]{{{IDENTITY_DIGITS}}})"
    r"(?:_[a-z]+(?:_[0-9]+)?)?_[0-9]{1,6}_[0-9]{1,6}"
)


class CopyOf(NamedTuple):
    """What the name of a copy tells: the model's name, and the identity of CopyNames."""

    model: str
    identity: str


def copy_of(name: str) -> CopyOf | None:
    """None if that is no name of a copy, but for instance SGLang's, which has no identity."""
    found = _NAME.fullmatch(name)
    return None if found is None else CopyOf(found[1], found[2])


class CopyNames:
    """`{page key}_{model}-{identity}_{pool}`, without the pool if it keeps every token; each rank
    adds which part of the page it has (`part_name`). The page key is SGLang's, if the namespace is
    empty."""

    def __init__(self, model: str, identity: str, pools: Sequence[CachePool]) -> None:
        """identity  a hexadecimal digest of all that the bytes of a page depend on besides its
        tokens: weights, numbers, sizes, layout"""
        self._model = _UNFIT.sub("-", model)[-MOST_NAME:]
        self._identity = identity[:IDENTITY_DIGITS]
        self._pools = ["" if pool.kind is CacheKind.FULL else f"_{pool.name}" for pool in pools]

    def of(self, pool: int, digest: bytes) -> str:
        return f"{digest.hex()}_{self._model}-{self._identity}{self._pools[pool]}"

    def renew(self) -> None:
        """The weights are others now, which nobody else has: no copy so far is theirs."""
        self._identity = uuid.uuid4().hex[:IDENTITY_DIGITS]


def part_name(name: str, rank: int, num_ranks: int) -> str:
    """Of the part of a page that a rank has."""
    return f"{name}_{rank}_{num_ranks}"

"""One flag of another server: what becomes of it here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum


class Fate(StrEnum):
    SAME = "same"
    HINT = "hint"
    REFUSED = "refused"


class Values(StrEnum):
    """How many values follow a flag; MAYBE: none or one."""

    NONE = "none"
    MAYBE = "maybe"
    ONE = "one"
    MANY = "many"


@dataclass(frozen=True, slots=True)
class PeerFlag:
    """One flag; `says` is the option that does the same, what happens instead (a hint), or the
    reason and the way out."""

    flag: str
    fate: Fate
    says: str
    values: Values = Values.ONE
    harmless: tuple[str, ...] = ()
    """Values of a refused flag that ask for what is so anyway."""


def dashed(name: str) -> str:
    """A flag's name with its dashes: llama.cpp has one before its short names ("c", "ngl")."""
    return f"{'-' if len(name) <= 3 else '--'}{name}"


def _rows(fate: Fate, values: Values, says: str, flags: str) -> list[PeerFlag]:
    return [PeerFlag(dashed(name), fate, says, values) for name in flags.split()]


def same(takes: Mapping[str, str], switches: Mapping[str, str]) -> list[PeerFlag]:
    """Flags that are options under another name. A name of one letter has one dash."""
    return [
        PeerFlag(dashed(name), Fate.SAME, f"--{own}", values)
        for values, names in ((Values.ONE, takes), (Values.NONE, switches))
        for name, own in names.items()
    ]


def hints(
    says: str, *, takes: str = "", switches: str = "", many: str = "", maybe: str = ""
) -> list[PeerFlag]:
    """Flags that ask how a thing is computed, where there is nothing to choose."""
    return [
        *_rows(Fate.HINT, Values.MAYBE, says, maybe),
        *_rows(Fate.HINT, Values.ONE, says, takes),
        *_rows(Fate.HINT, Values.NONE, says, switches),
        *_rows(Fate.HINT, Values.MANY, says, many),
    ]


def refused(
    says: str, *, takes: str = "", switches: str = "", many: str = "", harmless: str = ""
) -> list[PeerFlag]:
    """Flags that would change answers, memory or what is served; harmless: values that do not."""
    rows = [
        *_rows(Fate.REFUSED, Values.ONE, says, takes),
        *_rows(Fate.REFUSED, Values.NONE, says, switches),
        *_rows(Fate.REFUSED, Values.MANY, says, many),
    ]
    return [replace(row, harmless=tuple(harmless.split())) for row in rows]


GRAPHS = "graphs are captured by sapwood's own rules; --disable-graphs turns them off"

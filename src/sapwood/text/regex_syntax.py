"""Regular expressions as trees: the syntax of Python's `re`, read without it.

The tree of a hostile pattern stays small: parts that consume no character are not repeated, and
groups are nested at most MAX_NESTING deep. A repeat is one node, whatever its counts: who writes
its item out that often must bound the size.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from sapwood.schema.limits import REGEX_NESTING

MAX_NESTING = REGEX_NESTING.most
"""How deeply groups may be nested."""
MAX_REPEAT = 2**32 - 2
"""The largest count of a repeat, as in Python's `re`."""
MAX_SHARED = 1024
"""Classes of characters that are remembered, to be shared by all patterns that have them."""

Accepts = Callable[[str], bool]
Where = Literal["text begin", "text end", "line begin", "line end", "boundary", "no boundary"]


class RegexError(ValueError):
    """The pattern is not a regular expression; the message says why."""


class UnsupportedRegex(ValueError):
    """The pattern has a construct that this module knows no tree for; the message names it."""


@dataclass(frozen=True, slots=True, eq=False)
class Character:
    """One character: `literal`; or if `literal` is "", any character that `accepts` accepts."""

    accepts: Accepts
    literal: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Assertion:
    """A condition on the place between two characters; consumes none.

    ascii_only  for \\b and \\B only ASCII letters, digits and "_" make words
    """

    where: Where
    ascii_only: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Sequence:
    parts: tuple[Node, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    ways: tuple[Node, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Repeat:
    """`item`, which consumes a character, from `least` to `most` times; None: without a limit."""

    item: Node
    least: int
    most: int | None


Node = Character | Assertion | Sequence | Choice | Repeat

EMPTY = Sequence(())


def parse(pattern: str) -> Node:
    """The tree of a pattern. Raises RegexError, UnsupportedRegex."""
    return _Parser(pattern).whole()


def is_word(character: str) -> bool:
    return character.isalnum() or character == "_"


@dataclass(frozen=True, slots=True)
class _Flags:
    ascii_only: bool = False
    ignore_case: bool = False
    multiline: bool = False
    dot_all: bool = False
    verbose: bool = False


_FLAGS = {
    "a": "ascii_only",
    "i": "ignore_case",
    "m": "multiline",
    "s": "dot_all",
    "x": "verbose",
}
_CONTROLS = {"a": "\a", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v", "\\": "\\"}
_NUM_HEX = {"x": 2, "u": 4, "U": 8}
_OCTAL = "01234567"
_DIGITS = "0123456789"
_REPEATS: dict[str, tuple[int, int | None]] = {"*": (0, None), "+": (1, None), "?": (0, 1)}
_CATEGORIES: dict[str, Accepts] = {"d": str.isdecimal, "s": str.isspace, "w": is_word}
_ANCHORS: dict[str, Where] = {
    "A": "text begin",
    "Z": "text end",
    "b": "boundary",
    "B": "no boundary",
}
_LOOK_AROUND = ("=", "!", "<=", "<!")


class _Parser:
    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._at = 0
        self._depth = 0
        self._names: set[str] = set()

    def whole(self) -> Node:
        node = self._alternatives(self._global_flags())
        if self._at < len(self._pattern):
            raise RegexError(f"unbalanced parenthesis at position {self._at}")
        return node

    # ---- the text --------------------------------------------------------------------------------

    def _peek(self, length: int = 1) -> str:
        return self._pattern[self._at : self._at + length]

    def _take(self, text: str) -> bool:
        """Read `text` if it comes next. Returns whether it did."""
        found = self._pattern.startswith(text, self._at)
        self._at += len(text) if found else 0
        return found

    def _next(self) -> str:
        if self._at == len(self._pattern):
            raise RegexError("it ends too early")
        self._at += 1
        return self._pattern[self._at - 1]

    def _until(self, end: str, what: str) -> str:
        stop = self._pattern.find(end, self._at)
        if stop == -1:
            raise RegexError(f"{what} is not closed")
        text, self._at = self._pattern[self._at : stop], stop + len(end)
        return text

    def _while_in(self, characters: str, most: int) -> str:
        start = self._at
        while self._at - start < most and self._peek() and self._peek() in characters:
            self._at += 1
        return self._pattern[start : self._at]

    # ---- alternatives, sequences, repeats --------------------------------------------------------

    def _alternatives(self, flags: _Flags) -> Node:
        ways = [self._sequence(flags)]
        while self._take("|"):
            ways.append(self._sequence(flags))
        return _choice(ways)

    def _sequence(self, flags: _Flags) -> Node:
        parts: list[Node] = []
        may_repeat = False
        while self._peek() not in ("", "|", ")"):
            if flags.verbose and self._skip_blank():
                continue
            bounds = self._bounds()
            if bounds is not None:
                if not may_repeat:
                    raise RegexError(f"nothing to repeat, or twice, before position {self._at}")
                parts[-1] = self._repeated(parts[-1], *bounds)
                may_repeat = False
                continue
            is_group = self._peek() == "("
            part = self._item(flags)
            if part is not None:
                parts.append(part)
                may_repeat = is_group or not isinstance(part, Assertion)
        return _sequence(parts)

    def _skip_blank(self) -> bool:
        """Read white space, or a comment, of a verbose pattern. Returns whether there was any."""
        if self._take("#"):
            end = self._pattern.find("\n", self._at)
            self._at = len(self._pattern) if end == -1 else end + 1
            return True
        return bool(self._while_in(" \t\n\r\v\f", len(self._pattern)))

    def _bounds(self) -> tuple[int, int | None] | None:
        """Read a repeat and return its bounds; None, and nothing is read, if none comes next."""
        for mark, bounds in _REPEATS.items():
            if self._take(mark):
                return bounds
        start = self._at
        if not self._take("{"):
            return None
        least = self._while_in(_DIGITS, len(self._pattern))
        has_comma = self._take(",")
        most = self._while_in(_DIGITS, len(self._pattern)) if has_comma else least
        if not self._take("}") or not (least or has_comma):
            self._at = start  # Such a brace is an ordinary character.
            return None
        return int(least or 0), int(most) if most else None

    def _repeated(self, item: Node, least: int, most: int | None) -> Node:
        if self._take("+"):
            raise UnsupportedRegex("a possessive repeat")
        self._take("?")  # A lazy repeat prefers shorter matches, but the same texts match.
        if max(least, most or 0) > MAX_REPEAT:
            raise RegexError(f"a repeat of more than {MAX_REPEAT}")
        if most is not None and most < least:
            raise RegexError(f"a repeat's bounds {{{least},{most}}} are the wrong way round")
        return _repeat(item, least, most)

    def _item(self, flags: _Flags) -> Node | None:
        """Read a character, a class, an anchor or a group; None if it was a comment."""
        character = self._next()
        if character == "\\":
            return self._escape(flags)
        if character == "[":
            return self._class(flags)
        if character == "(":
            return self._group(flags)
        if character == ".":
            return Character(_any if flags.dot_all else _no_newline)
        if character == "^":
            return Assertion("line begin" if flags.multiline else "text begin")
        if character == "$":
            return Assertion("line end" if flags.multiline else "text end")
        return _literal(character, flags)

    # ---- groups ----------------------------------------------------------------------------------

    def _global_flags(self) -> _Flags:
        flags = _Flags()
        while True:
            start = self._at
            if self._take("(?#"):
                self._until(")", "a comment")
                continue
            if flags.verbose and self._skip_blank():
                continue
            if self._take("(?"):
                letters = self._while_in("aiLmsux", len(self._pattern))
                if letters and self._take(")"):
                    flags = self._with_flags(flags, letters)
                    continue
            self._at = start
            return flags

    def _with_flags(self, flags: _Flags, letters: str, *, value: bool = True) -> _Flags:
        if "L" in letters:
            raise RegexError("the flag L is for bytes")
        if not value and set(letters) & {"a", "u"}:
            raise RegexError("the flags a and u cannot be turned off")
        if {"a", "u"} <= set(letters):
            raise RegexError("the flags a and u exclude each other")
        changes = {_FLAGS[letter]: value for letter in letters if letter in _FLAGS}
        if "u" in letters:
            changes["ascii_only"] = False
        return replace(flags, **changes)

    def _group(self, flags: _Flags) -> Node | None:
        if self._take("?"):
            if self._take("#"):
                self._until(")", "a comment")
                return None
            flags = self._group_kind(flags)
        self._depth += 1
        if self._depth > MAX_NESTING:
            raise RegexError(f"it is nested too deeply: at most {MAX_NESTING} groups")
        node = self._alternatives(flags)
        self._depth -= 1
        if not self._take(")"):
            raise RegexError("a group is not closed")
        return node

    def _group_kind(self, flags: _Flags) -> _Flags:
        """Read what makes a group special, after its "(?". Returns the flags inside the group."""
        if self._take(":"):
            return flags
        if self._take("P<"):
            self._name(self._until(">", "a group's name"))
            return flags
        if self._take("P="):
            raise UnsupportedRegex("a back-reference")
        if any(self._take(mark) for mark in _LOOK_AROUND):
            raise UnsupportedRegex("look-around")
        if self._take("("):
            raise UnsupportedRegex("a conditional group")
        if self._take(">"):
            raise UnsupportedRegex("an atomic group")
        on = self._while_in("aiLmsux", len(self._pattern))
        flags = self._with_flags(flags, on)
        has_minus = self._take("-")
        off = self._while_in("aiLmsux", len(self._pattern)) if has_minus else ""
        flags = self._with_flags(flags, off, value=False)
        if self._take(")") and not has_minus and on:
            raise RegexError("flags of the whole pattern must come first")
        if not self._take(":") or not (on or off) or (has_minus and not off) or set(on) & set(off):
            raise RegexError(f"an unknown extension at position {self._at}")
        return flags

    def _name(self, name: str) -> None:
        if not name.isidentifier() or name in self._names:
            raise RegexError(f"the group's name {name!r} is no name, or used twice")
        self._names.add(name)

    # ---- characters ------------------------------------------------------------------------------

    def _escape(self, flags: _Flags) -> Node:
        character = self._peek()
        if character in _ANCHORS and character:
            self._at += 1
            return Assertion(_ANCHORS[character], flags.ascii_only)
        if character.lower() in _CATEGORIES and character:
            return Character(self._category(flags))
        if character in "123456789" and character:
            three = self._peek(3)
            if len(three) < 3 or any(digit not in _OCTAL for digit in three):
                raise UnsupportedRegex("a back-reference")
        return _literal(self._escaped(max_octal=3), flags)

    def _category(self, flags: _Flags) -> Accepts:
        return _category(self._next(), flags.ascii_only)

    def _escaped(self, *, max_octal: int) -> str:
        """The character that an escape stands for; its backslash has been read."""
        character = self._next()
        if character in _CONTROLS:
            return _CONTROLS[character]
        if character in _NUM_HEX:
            digits = self._while_in("0123456789abcdefABCDEF", _NUM_HEX[character])
            if len(digits) < _NUM_HEX[character]:
                raise RegexError(f"an incomplete escape \\{character}{digits}")
            return _chr(int(digits, 16), f"\\{character}{digits}")
        if character == "N" and self._take("{"):
            name = self._until("}", "a character's name")
            try:
                return unicodedata.lookup(name)
            except KeyError:
                raise RegexError(f"an unknown character \\N{{{name[:40]}}}") from None
        if character in _OCTAL:
            digits = character + self._while_in(_OCTAL, max_octal - 1)
            if int(digits, 8) > 0o377:
                raise RegexError(f"an octal escape \\{digits} beyond \\377")
            return chr(int(digits, 8))
        if character.isascii() and character.isalnum():
            raise RegexError(f"an unknown escape \\{character}")
        return character

    def _class(self, flags: _Flags) -> Node:
        is_negated = self._take("^")
        singles: set[str] = set()
        members: list[Accepts] = []
        is_first = True
        while is_first or not self._take("]"):
            is_first = False
            first = self._member(flags)
            if not self._range_follows():
                members += [] if isinstance(first, str) else [first]
                singles |= {first} if isinstance(first, str) else set()
                continue
            self._next()
            last = self._member(flags)
            if not isinstance(first, str) or not isinstance(last, str) or last < first:
                raise RegexError(f"a bad range in a class, before position {self._at}")
            members.append(_range(first, last))
        return Character(_class(frozenset(singles), tuple(members), is_negated, flags.ignore_case))

    def _range_follows(self) -> bool:
        return self._peek() == "-" and self._peek(2) not in ("-", "-]")

    def _member(self, flags: _Flags) -> str | Accepts:
        character = self._next()
        if character != "\\":
            return character
        if self._peek().lower() in _CATEGORIES and self._peek():
            return self._category(flags)
        if self._take("b"):
            return "\b"
        return self._escaped(max_octal=3)


# ---- trees that stay small -----------------------------------------------------------------------


def _sequence(parts: list[Node]) -> Node:
    kept = tuple(part for part in parts if part is not EMPTY)
    if not kept:
        return EMPTY
    return kept[0] if len(kept) == 1 else Sequence(kept)


def _choice(ways: list[Node]) -> Node:
    kept = [way for way in ways if way is not EMPTY]
    if not kept:
        return EMPTY
    if len(kept) < len(ways):
        kept.append(EMPTY)
    return kept[0] if len(kept) == 1 else Choice(tuple(kept))


def _repeat(item: Node, least: int, most: int | None) -> Node:
    if most == 0:
        return EMPTY
    if not _consumes(item):
        # A condition holds twice if it holds once; and one that may be left out demands nothing.
        return item if least else EMPTY
    return Repeat(item, least, most)


def _consumes(node: Node) -> bool:
    return any(isinstance(part, Character) for part in walked(node))


def walked(node: Node) -> Iterator[Node]:
    """The node and all nodes below it."""
    waiting: list[Node] = [node]
    while waiting:
        part = waiting.pop()
        yield part
        if isinstance(part, Sequence):
            waiting += part.parts
        elif isinstance(part, Choice):
            waiting += part.ways
        elif isinstance(part, Repeat):
            waiting.append(part.item)


# ---- characters ----------------------------------------------------------------------------------


def _any(character: str) -> bool:
    return True


def _no_newline(character: str) -> bool:
    return character != "\n"


def _literal(literal: str, flags: _Flags) -> Character:
    if not flags.ignore_case or (literal.lower() == literal == literal.upper()):
        return Character(lambda character: character == literal, literal)
    return Character(_in_any_case(literal))


# Equal classes are one object, so that a class is asked about a character once for all patterns.


@lru_cache(maxsize=MAX_SHARED)
def _in_any_case(literal: str) -> Accepts:
    return lambda character: literal in _forms(character)


@lru_cache(maxsize=MAX_SHARED)
def _category(letter: str, ascii_only: bool) -> Accepts:
    plain = _CATEGORIES[letter.lower()]
    wanted = letter.islower()
    if ascii_only:
        return lambda character: (character.isascii() and plain(character)) is wanted
    return plain if wanted else lambda character: not plain(character)


@lru_cache(maxsize=MAX_SHARED)
def _range(first: str, last: str) -> Accepts:
    return lambda character: first <= character <= last


@lru_cache(maxsize=MAX_SHARED)
def _class(
    singles: frozenset[str], members: tuple[Accepts, ...], is_negated: bool, ignore_case: bool
) -> Accepts:
    def listed(character: str) -> bool:
        return character in singles or any(member(character) for member in members)

    if not ignore_case:
        return lambda character: listed(character) is not is_negated
    return lambda character: any(listed(form) for form in _forms(character)) is not is_negated


def _forms(character: str) -> set[str]:
    return {character, character.lower(), character.upper()}


def _chr(code: int, escape: str) -> str:
    if code > 0x10FFFF:
        raise RegexError(f"{escape}, which is no character")
    return chr(code)

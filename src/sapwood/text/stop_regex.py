"""Regular expressions over a text that arrives in parts, in time that grows with the text only.

The syntax is that of Python's `re`. A pattern becomes a nondeterministic automaton whose states are
followed all at once, so that no pattern can make it try one way after the other (Thompson 1968,
doi:10.1145/363347.363387). What such an automaton cannot do is refused: look-around,
back-references, atomic groups; and what has no meaning here: the end of the text.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from re import _constants as op  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

from sapwood.base.errors import InvalidRequest

MAX_STATES = 1000
"""Of all regular expressions of one request together; `x{500}` takes 500."""
MAX_LENGTH = 2000

_REPEATS = (op.MAX_REPEAT, op.MIN_REPEAT)

Accepts = Callable[[str], bool]
Holds = Callable[[str, str], bool]


@dataclass(slots=True)
class _State:
    """One state. A character leads on if `accepts` it; without that, `then` is entered at once, if
    what lies between the character before and the one after ("": none) `holds`."""

    then: list[int]
    accepts: Accepts | None = None
    holds: Holds | None = None


class StopRegex:
    """A pattern as an automaton; not changed after it was made.

    Raises InvalidRequest that names stop_regex if the pattern cannot be used.
    """

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        if len(pattern) > MAX_LENGTH:
            raise _refusal(pattern, f"it has more than {MAX_LENGTH} characters")
        self.states: list[_State] = []
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of constructs that will change: not a client's
                parsed = parser.parse(pattern)
            self.end = self._state(_State([]))
            self.start = self._sequence(parsed, self.end, parsed.state.flags)
        except (re.error, OverflowError) as error:
            raise _refusal(pattern, f"it is not a regular expression: {error}") from None
        except RecursionError:
            raise _refusal(pattern, "it is nested too deeply") from None
        if self._matches_nothing():
            raise _refusal(pattern, "it matches the empty text, so that no token could be shown")

    def _state(self, state: _State) -> int:
        if len(self.states) == MAX_STATES:
            raise _refusal(self.pattern, f"it takes more than {MAX_STATES} states")
        self.states.append(state)
        return len(self.states) - 1

    def _sequence(self, items: Any, after: int, flags: int) -> int:
        """The state in which a sequence begins that goes on to `after`."""
        for kind, value in reversed(list(items)):
            after = self._item(kind, value, after, flags)
        return after

    def _item(self, kind: Any, value: Any, after: int, flags: int) -> int:
        if kind in (op.LITERAL, op.NOT_LITERAL, op.ANY, op.IN, op.RANGE, op.CATEGORY):
            return self._state(_State([after], accepts=_accepts(kind, value, flags)))
        if kind is op.BRANCH:
            return self._state(_State([self._sequence(way, after, flags) for way in value[1]]))
        if kind is op.SUBPATTERN:
            _, add, remove, items = value
            return self._sequence(items, after, (flags | add) & ~remove)
        if kind in _REPEATS:
            least, most, items = value
            return self._repeat(least, most, items, after, flags)
        if kind is op.AT:
            return self._state(_State([after], holds=self._holds(value, flags)))
        raise _refusal(self.pattern, f"{_NAMES.get(kind, str(kind).lower())} cannot be used here")

    def _repeat(self, least: int, most: Any, items: Any, after: int, flags: int) -> int:
        if most is op.MAXREPEAT:
            loop = self._state(_State([after]))
            self.states[loop].then.append(self._sequence(items, loop, flags))
            after = loop
        else:
            done = after
            for _ in range(most - least):
                after = self._state(_State([done, self._sequence(items, after, flags)]))
        for _ in range(least):
            after = self._sequence(items, after, flags)
        return after

    def _holds(self, where: Any, flags: int) -> Holds:
        multiline = bool(flags & re.MULTILINE)
        if where is op.AT_BEGINNING_STRING or (where is op.AT_BEGINNING and not multiline):
            return lambda before, after: not before
        if where is op.AT_BEGINNING:
            return lambda before, after: before in ("", "\n")
        if where is op.AT_END and multiline:
            return lambda before, after: after in ("", "\n")
        if where in (op.AT_BOUNDARY, op.AT_NON_BOUNDARY):
            is_word = _category(op.CATEGORY_WORD, flags)
            wanted = where is op.AT_BOUNDARY

            def holds(before: str, after: str) -> bool:
                return (_is(is_word, before) != _is(is_word, after)) is wanted

            return holds
        raise _refusal(
            self.pattern, "the end of the text is not known before it ends; (?m) makes $ a line's"
        )

    def _matches_nothing(self) -> bool:
        seen, todo = set[int](), [self.start]
        while todo:
            state = todo.pop()
            if state not in seen:
                seen.add(state)
                todo += self.states[state].then if self.states[state].accepts is None else []
        return self.end in seen


class RegexSearch:
    """Looks for the first match of one pattern to be complete, character by character."""

    def __init__(self, regex: StopRegex) -> None:
        self._regex = regex
        # State -> where the match that is in it began. Those that wait for the next character to
        # know whether they hold are among them.
        self._active: dict[int, int] = {}
        self._before = ""
        self._position = 0

    @property
    def pattern(self) -> str:
        return self._regex.pattern

    @property
    def earliest(self) -> int | None:
        """Where the longest of the matches begins that may yet become complete."""
        return min(self._active.values(), default=None)

    def push(self, character: str) -> tuple[int, int] | None:
        """(begin, end) of the match that this character completes, the longest of them; or of one
        that ended before it, which is known only now."""
        states, end = self._regex.states, self._regex.end
        entered = self._closure({**self._active, **self._fresh()}, character)
        if end in entered:
            return entered[end], self._position
        moved: dict[int, int] = {}
        for state, begin in entered.items():
            accepts = states[state].accepts
            if accepts is not None and accepts(character):
                for then in states[state].then:
                    moved[then] = min(begin, moved.get(then, begin))
        self._before = character
        self._position += 1
        self._active = self._closure(moved, None)
        return (self._active[end], self._position) if end in self._active else None

    def finish(self) -> tuple[int, int] | None:
        """The match that the end of the text completes."""
        entered = self._closure(self._active, "")
        end = self._regex.end
        return (entered[end], self._position) if end in entered else None

    def _fresh(self) -> dict[int, int]:
        """A match may begin here, unless one that began earlier is in the same state."""
        start = self._regex.start
        return {} if start in self._active else {start: self._position}

    def _closure(self, states: dict[int, int], after: str | None) -> dict[int, int]:
        """The states that are reached without a character, `after` being the next one; None: it is
        not known, and what depends on it is left as it is. Only states that wait are kept."""
        table, reached = self._regex.states, dict[int, int]()
        # Earliest first, so that a state is entered once, by the longest match.
        todo = sorted(states.items(), key=lambda item: -item[1])
        while todo:
            state, begin = todo.pop()
            if state in reached:
                continue
            reached[state] = begin
            one = table[state]
            if one.accepts is not None:
                continue
            if one.holds is not None and (after is None or not one.holds(self._before, after)):
                continue
            todo += [(then, begin) for then in one.then]
        return {
            state: begin
            for state, begin in reached.items()
            if state == self._regex.end
            or table[state].accepts
            or (after is None and table[state].holds)
        }


@lru_cache(maxsize=256)
def compiled(pattern: str) -> StopRegex:
    """Raises as StopRegex."""
    return StopRegex(pattern)


def check_patterns(patterns: Sequence[str]) -> None:
    """InvalidRequest if one of them, or all together, cannot be used."""
    num_states = sum(len(compiled(pattern).states) for pattern in patterns)
    if num_states > MAX_STATES:
        raise InvalidRequest(
            f"stop_regex takes {num_states} states but at most {MAX_STATES} are accepted; repeat "
            "less, or leave some out",
            param="stop_regex",
        )


_NAMES = {
    op.ASSERT: "look-around",
    op.ASSERT_NOT: "look-around",
    op.GROUPREF: "a back-reference",
    op.GROUPREF_EXISTS: "a conditional group",
    op.POSSESSIVE_REPEAT: "a possessive repeat",
    op.ATOMIC_GROUP: "an atomic group",
}


def _refusal(pattern: str, why: str) -> InvalidRequest:
    shown = pattern if len(pattern) <= 80 else f"{pattern[:80]}…"
    return InvalidRequest(f"stop_regex {shown!r} cannot be used: {why}", param="stop_regex")


def _is(accepts: Accepts, character: str) -> bool:
    return bool(character) and accepts(character)


def _accepts(kind: Any, value: Any, flags: int) -> Accepts:
    if kind is op.ANY:
        return (lambda one: True) if flags & re.DOTALL else (lambda one: one != "\n")
    if kind is op.CATEGORY:
        return _category(value, flags)
    exact = _exact(kind, value, flags)
    if not flags & re.IGNORECASE:
        return exact
    if kind is op.NOT_LITERAL or (kind is op.IN and value[0][0] is op.NEGATE):
        return lambda one: all(exact(form) for form in _forms(one))
    return lambda one: any(exact(form) for form in _forms(one))


def _exact(kind: Any, value: Any, flags: int) -> Accepts:
    if kind is op.LITERAL:
        literal = chr(value)
        return lambda one: one == literal
    if kind is op.NOT_LITERAL:
        literal = chr(value)
        return lambda one: one != literal
    if kind is op.RANGE:
        first, last = chr(value[0]), chr(value[1])
        return lambda one: first <= one <= last
    is_negated = value[0][0] is op.NEGATE
    members = [
        _category(what, flags) if part is op.CATEGORY else _exact(part, what, flags)
        for part, what in value[is_negated:]
    ]
    return lambda one: any(member(one) for member in members) is not is_negated


def _forms(character: str) -> set[str]:
    return {character, character.lower(), character.upper()}


def _category(kind: Any, flags: int) -> Accepts:
    positive = _POSITIVE.get(kind, kind)
    plain = _CATEGORIES[positive]
    ascii_only = bool(flags & re.ASCII)

    def accepts(one: str) -> bool:
        return plain(one) and not (ascii_only and not one.isascii())

    return accepts if positive is kind else lambda one: not accepts(one)


_POSITIVE = {
    op.CATEGORY_NOT_DIGIT: op.CATEGORY_DIGIT,
    op.CATEGORY_NOT_SPACE: op.CATEGORY_SPACE,
    op.CATEGORY_NOT_WORD: op.CATEGORY_WORD,
}

_CATEGORIES: dict[Any, Accepts] = {
    op.CATEGORY_DIGIT: str.isdecimal,
    op.CATEGORY_SPACE: str.isspace,
    op.CATEGORY_WORD: lambda one: one.isalnum() or one == "_",
}

"""Regular expressions over a text that arrives in parts, in time that grows with the text only.

The syntax is that of Python's `re`. A request's patterns become one nondeterministic automaton
(Thompson 1968, doi:10.1145/363347.363387) whose states are the bits of a number: all ways through
the patterns are followed at once, and the states after a set of states are looked up eight bits at
a time. Moves from one set to the next are kept, up to a bound, so that most characters cost one
look-up. A pattern is refused if it has a part that such an automaton cannot follow (look-around,
back-references, atomic groups), if it asks for the end of the text, which is not known while the
text grows, or if it matches the empty text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

from sapwood.base.errors import InvalidRequest
from sapwood.schema import limits
from sapwood.text import regex_syntax as syntax
from sapwood.text.regex_syntax import Accepts, Node, RegexError, UnsupportedRegex, is_word

MAX_STATES = limits.STOP_REGEX_STATES.most
"""States of all regular expressions of one request together; `x{500}` takes 500."""
MAX_LENGTH = limits.STOP_REGEX_LENGTH.most
"""Characters of one pattern."""
MAX_CLASSES = limits.STOP_REGEX_CLASSES.most
"""Different classes of characters, such as `[a-z]`, of all regular expressions of one request."""
MAX_KEPT = 1024
"""Entries of each table that is filled while text is searched; a full one begins anew."""
LOOK_BACK = range(8, 512)
"""Numbers of held characters with which it pays to find out how many of them are needed."""

Holds = Callable[[str, str], bool]
K = TypeVar("K")
V = TypeVar("V")

_START = 1
"""The set of the first state alone, in which a match may begin at every character."""


class StopRegex:
    """Patterns as one automaton. Safe to share: it changes only tables of computed results.

    Raises InvalidRequest that names stop_regex if a pattern cannot be used, or all together.
    """

    def __init__(self, patterns: Sequence[str]) -> None:
        self.patterns = tuple(patterns)
        self._then: list[list[int]] = [[]]
        self._accepts: dict[int, Accepts] = {}
        self._literals: dict[str, int] = {}
        self._classes: dict[Accepts, int] = {}
        self._holds: dict[int, Holds] = {}
        self._pattern = ""
        self.ends = [self._add(pattern) for pattern in self.patterns]
        self.end = sum(1 << end for end in self.ends)
        self.has_assertions = bool(self._holds)
        """Whether moves depend on the character before, too."""
        self._masks: dict[str, int] = {}
        self._places: dict[tuple[str, str], _Place] = {}
        self._unions: dict[tuple[int, int, int], int] = {}
        self.whatever_follows = self._place(lambda holds: False)
        self.moves: dict[tuple[int, str, str], tuple[int, bool]] = {}

    # ---- building --------------------------------------------------------------------------------

    def _add(self, pattern: str) -> int:
        """Add a pattern. Returns the state that is reached when the pattern has matched."""
        self._pattern = pattern
        if len(pattern) > MAX_LENGTH:
            raise _refusal(pattern, f"it has more than {MAX_LENGTH} characters")
        try:
            tree = syntax.parse(pattern)
        except RegexError as error:
            raise _refusal(pattern, f"it is not a regular expression: {error}") from None
        except UnsupportedRegex as error:
            raise _refusal(pattern, f"{error} cannot be used here") from None
        end = self._state([])
        start = self._before(tree, end)
        if self._matches_nothing(start, end):
            raise _refusal(pattern, "it matches the empty text, so that no token could be shown")
        self._then[0].append(start)
        return end

    def _state(self, then: list[int]) -> int:
        if len(self._then) > MAX_STATES:
            raise _refusal(
                self._pattern,
                f"with the patterns before it, it takes more states than the {MAX_STATES} that are "
                "accepted; repeat less, or leave some out",
            )
        self._then.append(then)
        return len(self._then) - 1

    def _before(self, node: Node, after: int) -> int:
        """Add states for the node, which lead on to the state `after`; returns the first."""
        if isinstance(node, syntax.Character):
            return self._character(node, after)
        if isinstance(node, syntax.Assertion):
            state = self._state([after])
            self._holds[state] = self._condition(node)
            return state
        if isinstance(node, syntax.Choice):
            return self._state([self._before(way, after) for way in node.ways])
        if isinstance(node, syntax.Repeat):
            return self._repeat(node, after)
        for part in reversed(node.parts):
            after = self._before(part, after)
        return after

    def _character(self, node: syntax.Character, after: int) -> int:
        state = self._state([after])
        self._accepts[state] = node.accepts
        if node.literal:
            self._literals[node.literal] = self._literals.get(node.literal, 0) | 1 << state
        else:
            self._classes[node.accepts] = self._classes.get(node.accepts, 0) | 1 << state
            if len(self._classes) > MAX_CLASSES:
                raise _refusal(
                    self._pattern,
                    "with the patterns before it, it has more different classes of characters "
                    f"than the {MAX_CLASSES} that are accepted; leave some out",
                )
        return state

    def _repeat(self, node: syntax.Repeat, after: int) -> int:
        if node.most is None:
            loop = self._state([after])
            self._then[loop].append(self._before(node.item, loop))
            after = loop
        else:
            done = after
            for _ in range(node.most - node.least):
                after = self._state([done, self._before(node.item, after)])
        for _ in range(node.least):
            after = self._before(node.item, after)
        return after

    def _condition(self, node: syntax.Assertion) -> Holds:
        where = node.where
        if where == "text end":
            raise _refusal(
                self._pattern,
                "the end of the text is not known before it ends; (?m) makes $ a line's",
            )
        if where == "text begin":
            return lambda before, after: not before
        if where == "line begin":
            return lambda before, after: before in ("", "\n")
        if where == "line end":
            return lambda before, after: after in ("", "\n")
        wanted, ascii_only = where == "boundary", node.ascii_only

        def counts(character: str) -> bool:
            return is_word(character) and (character.isascii() or not ascii_only)

        return lambda before, after: (counts(before) != counts(after)) is wanted

    def _matches_nothing(self, start: int, end: int) -> bool:
        seen, waiting = set[int](), [start]
        while waiting:
            state = waiting.pop()
            if state not in seen:
                seen.add(state)
                waiting += [] if state in self._accepts else self._then[state]
        return end in seen

    # ---- looking up ------------------------------------------------------------------------------

    def accepting(self, character: str) -> int:
        """The set of states that take the character."""
        known = self._masks.get(character)
        if known is None:
            known = self._literals.get(character, 0)
            for accepts, states in self._classes.items():
                if accepts(character):
                    known |= states
            _keep(self._masks, character, known)
        return known

    def place(self, before: str, after: str) -> _Place:
        """The place between two characters; "": the beginning or the end of the text."""
        if not self._holds:
            return self.whatever_follows
        kinds = _kind(before), _kind(after)
        found = self._places.get(kinds)
        if found is None:
            found = self._places[kinds] = self._place(lambda holds: holds(*kinds))
        return found

    def _place(self, passes: Callable[[Holds], bool]) -> _Place:
        ways: list[list[int]] = []
        for state, then in enumerate(self._then):
            holds = self._holds.get(state)
            stays = state == 0 or state in self._accepts or (holds and not passes(holds))
            ways.append([] if stays else then)
        sources = {state: self._then[state] for state in (0, *self._accepts)}
        return _Place(ways, sources, {*self._accepts, *self.ends}, self._unions)


class _Place:
    """A place between two characters: which states lead to which without a character.

    ways     per state: the states that it leads to at once
    sources  the first state, or a state that takes a character -> the states that it then leads to
    stops    states that take a character, and ends
    unions   see `_Union`
    """

    def __init__(
        self,
        ways: list[list[int]],
        sources: dict[int, list[int]],
        stops: set[int],
        unions: dict[tuple[int, int, int], int],
    ) -> None:
        reached = [1 << state if state in stops else 0 for state in range(len(ways))]
        _spread(reached, list(enumerate(ways)))
        following, origin = [0] * len(ways), [0] * len(ways)
        for source, targets in sources.items():
            for target in targets:
                following[source] |= reached[target]
                origin[target] |= 1 << source
        ways_back: list[list[int]] = [[] for _ in ways]
        for state, targets in enumerate(ways):
            for target in targets:
                ways_back[target].append(state)
        _spread(origin, list(reversed(list(enumerate(ways_back)))))
        self.origin = origin
        self.after = _Union(following, unions)
        """From a set of sources to the stops that they reach."""
        self.before = _Union(origin, unions)
        """From a set of stops to the sources that reach them."""


def _spread(values: list[int], edges: list[tuple[int, list[int]]]) -> None:
    """Add to each state's set the sets of the states that it leads to, until nothing changes."""
    has_changed = True
    while has_changed:
        has_changed = False
        for state, targets in edges:
            joined = values[state]
            for target in targets:
                joined |= values[target]
            if joined != values[state]:
                values[state] = joined
                has_changed = True


class _Union:
    """The union of rows[i] for all bits i of a set, looked up eight bits at a time.

    known  results that were computed; several unions share the table
    """

    def __init__(self, rows: list[int], known: dict[tuple[int, int, int], int]) -> None:
        self._rows = rows
        self._num_bytes = -(-len(rows) // 8)
        self._known = known

    def of(self, states: int) -> int:
        joined = 0
        for place, byte in enumerate(states.to_bytes(self._num_bytes, "little")):
            if byte:
                key = id(self), place, byte
                known = self._known.get(key)
                if known is None:
                    known = 0
                    for bit in range(8):
                        if byte >> bit & 1:
                            known |= self._rows[place * 8 + bit]
                    _keep(self._known, key, known)
                joined |= known
        return joined


@dataclass(frozen=True, slots=True)
class Found:
    """A match, text[begin:end], of the pattern with that index."""

    begin: int
    end: int
    index: int


class RegexSearch:
    """Looks for the first match of one of the patterns to be complete, character by character."""

    def __init__(self, regex: StopRegex) -> None:
        self._regex = regex
        self._active = _START
        """The states that a match so far may be in."""
        self._held: list[str] = []
        """The characters that a match so far may have; the newest is the last of them."""
        self._before_held = ""
        self._before = ""
        self._position = 0
        self._look_back_at = LOOK_BACK.start

    def earliest(self) -> int | None:
        """Where the longest match begins that may yet become complete, or a little before that;
        None if no match has begun."""
        if self._active == _START:
            return None
        if self._look_back_at <= len(self._held) < LOOK_BACK.stop:
            needed = self._longest(self._active & ~_START, len(self._held))
            if needed > 0:
                self._before_held = self._held[needed - 1]
                del self._held[:needed]
            # So rarely that each character of the text is looked at only a few times.
            self._look_back_at = max(LOOK_BACK.start, 2 * len(self._held))
        return self._position - len(self._held)

    def push(self, character: str) -> list[Found]:
        """The longest match of each pattern that this character completes, or that ended before
        this character, where only this character tells so."""
        kind = _kind(self._before) if self._regex.has_assertions else ""
        key = (self._active, kind, character)
        move = self._regex.moves.get(key)
        if move is None:
            move = self._move(character)
            _keep(self._regex.moves, key, move)
        following, is_notable = move
        found = self._ended(self._regex.place(self._before, character)) if is_notable else []
        self._held.append(character)
        self._before = character
        self._position += 1
        self._active = following
        if is_notable:
            found += self._ended(self._regex.whatever_follows)
        if following == _START:
            self._forget()
        return found

    def finish(self) -> list[Found]:
        """The matches that the end of the text completes."""
        return self._ended(self._regex.place(self._before, ""))

    def _move(self, character: str) -> tuple[int, bool]:
        """The next states, and whether a match ends before or after the character."""
        regex = self._regex
        reached = regex.place(self._before, character).after.of(self._active)
        following = reached & regex.accepting(character) | _START
        ends = reached | regex.whatever_follows.after.of(following & ~_START)
        return following, bool(ends & regex.end)

    def _ended(self, place: _Place) -> list[Found]:
        """The longest match of each pattern that is complete now, if this is such a place."""
        held_from = self._position - len(self._held)
        found: list[Found] = []
        for index, end in enumerate(self._regex.ends):
            states = place.origin[end] & self._active & ~_START
            if states:
                begin = held_from + self._longest(states, len(self._held))
                found.append(Found(begin, self._position, index))
        return found

    def _longest(self, states: int, end: int) -> int:
        """Where in `_held` the longest match begins that is in one of the states at `end`."""
        regex, held, begin = self._regex, self._held, end
        while states:
            end -= 1
            before = held[end - 1] if end else self._before_held
            sources = regex.place(before, held[end]).before.of(states)
            if sources & _START:
                begin = end
            if not end:
                break
            states = sources & regex.accepting(before)
        return begin

    def _forget(self) -> None:
        self._held.clear()
        self._before_held = self._before
        self._look_back_at = LOOK_BACK.start


@lru_cache(maxsize=32)
def compiled(patterns: tuple[str, ...]) -> StopRegex:
    """The automaton of the patterns, kept for requests with the same ones. Raises as StopRegex."""
    return StopRegex(patterns)


def check_patterns(patterns: Sequence[str]) -> None:
    """InvalidRequest if one of them, or all together, cannot be used."""
    compiled(tuple(patterns))


def _refusal(pattern: str, why: str) -> InvalidRequest:
    shown = pattern if len(pattern) <= 80 else f"{pattern[:80]}…"
    return InvalidRequest(f"stop_regex {shown!r} cannot be used: {why}", param="stop_regex")


def _kind(character: str) -> str:
    """A character that no assertion tells apart from this one."""
    if character in ("", "\n"):
        return character
    if is_word(character):
        return "a" if character.isascii() else "é"
    return " "


def _keep(table: dict[K, V], key: K, value: V) -> None:
    if len(table) >= MAX_KEPT:
        table.clear()
    table[key] = value

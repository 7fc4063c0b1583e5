"""Strings and regular expressions that end the output, found while the text grows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from sapwood.text.stop_regex import Found, RegexSearch, compiled


@dataclass(frozen=True, slots=True)
class StopResult:
    """The text that may be shown now.

    text     new text that cannot be part of a stop string any more
    matched  the stop string, or the pattern of the regular expression, that was matched; after a
             match nothing may follow. None: the text goes on
    """

    text: str
    matched: str | None = None


@dataclass(frozen=True, slots=True, order=True)
class _Match:
    """A match. Of matches that become known at the same character, the smallest wins: the longest.

    begin  index of the match's first character in the held text
    end    index after its last character
    name   the stop string or the pattern
    """

    begin: int
    end: int
    name: str


class StopMatcher:
    """Finds the first of some strings in a text that arrives in parts.

    The match that is complete first wins, so that no token is computed to find out whether a
    longer one follows; of several that are complete at the same character the longest wins. How the
    text is split makes no difference. Only the longest end of the text that could begin a stop
    string is held back, and with regular expressions sometimes a little more. A regular expression
    matches as soon as the text so far has a match of it; one that ends in \\b is known to match a
    character later. The work per character does not grow with the text or with the number of stops.

    stop     strings that end the text; none may be empty
    regexes  patterns of regular expressions that end the text; each must pass `check_patterns`
    no_trim  whether the match stays in the text
    """

    def __init__(
        self, stop: Sequence[str], *, regexes: Sequence[str] = (), no_trim: bool = False
    ) -> None:
        if any(not text for text in stop):
            raise ValueError("stop strings must not be empty")
        self._strings = _strings(tuple(stop))
        self._node = 0
        self._no_trim = no_trim
        self._patterns = tuple(regexes)
        self._search = RegexSearch(compiled(self._patterns)) if regexes else None
        self._num_shown = 0
        self._held = ""
        self._matched = False

    def push(self, text: str) -> StopResult:
        assert not self._matched, "the text has ended at a stop string"
        if not text:
            return StopResult("")
        new_from = len(self._held)
        self._held += text
        for position in range(new_from, len(self._held)):
            matches = self._completed(self._held[position], position)
            if matches:
                return self._ended(min(matches))
        keep_from = len(self._held) - self._strings.depths[self._node]
        if self._search is not None:
            earliest = self._search.earliest()
            if earliest is not None:
                keep_from = min(keep_from, earliest - self._num_shown)
        shown, self._held = self._held[:keep_from], self._held[keep_from:]
        self._num_shown += keep_from
        return StopResult(shown)

    def finish(self) -> StopResult:
        """The text that was held back, once it is known that no text follows.

        A regular expression that ends in \\b may match only now.
        """
        matches = [] if self._search is None else self._found(self._search.finish())
        if matches:
            return self._ended(min(matches))
        held, self._held = self._held, ""
        return StopResult(held)

    def _completed(self, character: str, position: int) -> list[_Match]:
        """The matches that the character at that position completes."""
        matches: list[_Match] = []
        self._node = self._strings.after(self._node, character)
        longest = self._strings.ends[self._node]
        if longest:
            end = position + 1
            matches.append(_Match(end - len(longest), end, longest))
        if self._search is not None:
            matches += self._found(self._search.push(character))
        return matches

    def _found(self, found: Sequence[Found]) -> list[_Match]:
        shown = self._num_shown
        return [
            _Match(match.begin - shown, match.end - shown, self._patterns[match.index])
            for match in found
        ]

    def _ended(self, match: _Match) -> StopResult:
        text, self._held, self._matched = self._held, "", True
        return StopResult(text[: match.end if self._no_trim else match.begin], match.name)


class _Strings:
    """Strings as one tree of their beginnings (Aho and Corasick 1975, doi:10.1145/360825.360855).
    A node stands for the longest end of the text that begins one of them.

    depths  per node: its characters
    ends    per node: the longest of the strings that the text ends with; "": none
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self.depths, self.ends = [0], [""]
        self._next: list[dict[str, int]] = [{}]
        self._shorter = [0]
        """Per node: the node of the next shorter end of the text that begins a string."""
        for string in strings:
            self._add(string)
        waiting = list(self._next[0].values())
        for node in waiting:
            for character, child in self._next[node].items():
                self._shorter[child] = self.after(self._shorter[node], character)
                self.ends[child] = self.ends[child] or self.ends[self._shorter[child]]
                waiting.append(child)

    def after(self, node: int, character: str) -> int:
        while True:
            following = self._next[node].get(character)
            if following is not None:
                return following
            if node == 0:
                return 0
            node = self._shorter[node]

    def _add(self, string: str) -> None:
        node = 0
        for character in string:
            following = self._next[node].get(character)
            if following is None:
                following = self._next[node][character] = len(self._next)
                self._next.append({})
                self._shorter.append(0)
                self.depths.append(self.depths[node] + 1)
                self.ends.append("")
            node = following
        self.ends[node] = string


@lru_cache(maxsize=64)
def _strings(strings: tuple[str, ...]) -> _Strings:
    return _Strings(strings)

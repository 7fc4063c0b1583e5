"""Strings and regular expressions that end the output, found while the text grows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sapwood.text.stop_regex import RegexSearch, compiled


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
    """In the order in which they win: first known, then longest.

    known_at  characters of the text after which it is known; begin, end: where it lies
    """

    known_at: int
    begin: int
    end: int
    name: str


class StopMatcher:
    """Finds the first of some strings in a text that arrives in parts.

    The match that is complete first wins, so that no token is computed to find out whether a
    longer one follows; of several that are complete at the same character the longest wins. How the
    text is split makes no difference. Only the longest end of the text that could begin a stop
    string is held back. A regular expression matches as soon as the text so far has a match of it;
    one that ends in \\b is known to match a character later.

    stop     strings that end the text; none may be empty
    regexes  patterns of regular expressions that do; each must pass `check_patterns`
    no_trim  leave what matched in the text
    """

    def __init__(
        self, stop: Sequence[str], *, regexes: Sequence[str] = (), no_trim: bool = False
    ) -> None:
        if any(not text for text in stop):
            raise ValueError("stop strings must not be empty")
        # Longest first: of matches with the same end, `min` then keeps the first it sees.
        self._stop = sorted(set(stop), key=len, reverse=True)
        self._first_characters = {text[0] for text in self._stop}
        self._longest_hold = max((len(text) for text in self._stop), default=1) - 1
        self._no_trim = no_trim
        self._searches = [RegexSearch(compiled(pattern)) for pattern in regexes]
        self._num_shown = 0
        self._held = ""
        self._matched = False

    def push(self, text: str) -> StopResult:
        assert not self._matched, "the text has ended at a stop string"
        if not text:
            return StopResult("")
        new_from = len(self._held)
        text = self._held + text
        found = [(text.find(stop), stop) for stop in self._stop]
        matches = [
            _Match(start + len(s), start, start + len(s), s) for start, s in found if start >= 0
        ]
        if self._searches:
            matches += self._search(text, new_from)
        if matches:
            return self._ended(text, min(matches))
        keep_from = self._hold_from(text)
        for search in self._searches:
            if search.earliest is not None:
                keep_from = min(keep_from, search.earliest - self._num_shown)
        self._held = text[keep_from:]
        self._num_shown += keep_from
        return StopResult(text[:keep_from])

    def finish(self) -> StopResult:
        """What was held back, when it turns out that no text follows; a regular expression that
        ends in \\b may match only now."""
        held, self._held = self._held, ""
        found = [(search.finish(), search.pattern) for search in self._searches]
        matches = [self._match(len(held), match, name) for match, name in found if match]
        return self._ended(held, min(matches)) if matches else StopResult(held)

    def _search(self, text: str, new_from: int) -> list[_Match]:
        """Matches that the first character to complete any of them completes."""
        for position in range(new_from, len(text)):
            found = [(search.push(text[position]), search.pattern) for search in self._searches]
            matches = [self._match(position + 1, match, name) for match, name in found if match]
            if matches:
                return matches
        return []

    def _match(self, known_at: int, match: tuple[int, int], name: str) -> _Match:
        begin, end = match
        return _Match(known_at, begin - self._num_shown, end - self._num_shown, name)

    def _ended(self, text: str, match: _Match) -> StopResult:
        self._matched, self._held = True, ""
        return StopResult(text[: match.end if self._no_trim else match.begin], match.name)

    def _hold_from(self, text: str) -> int:
        """Where the longest end of `text` begins that is the beginning of a stop string."""
        for start in range(max(0, len(text) - self._longest_hold), len(text)):
            if text[start] in self._first_characters:
                end_of_text = text[start:]
                if any(stop.startswith(end_of_text) for stop in self._stop):
                    return start
        return len(text)

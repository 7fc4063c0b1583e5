"""Strings that end the output, found while the text grows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StopResult:
    """What may be shown now.

    text     new text that no stop string can still claim
    matched  the stop string that was completed; nothing may follow
    """

    text: str
    matched: str | None = None


class StopMatcher:
    """Finds the first of some strings in a text that arrives in parts.

    The match that is complete first wins, so that no token is computed to find out whether a
    longer one follows; of several that are complete at the same character the longest wins. How the
    text is split makes no difference. Only the longest end of the text that could begin a stop
    string is held back.

    stop     strings that end the text; none may be empty
    no_trim  leave the matched string in the text
    """

    def __init__(self, stop: Sequence[str], *, no_trim: bool = False) -> None:
        if any(not text for text in stop):
            raise ValueError("stop strings must not be empty")
        # Longest first: of matches with the same end, `min` then keeps the first it sees.
        self._stop = sorted(set(stop), key=len, reverse=True)
        self._first_characters = {text[0] for text in self._stop}
        self._longest_hold = max((len(text) for text in self._stop), default=1) - 1
        self._no_trim = no_trim
        self._held = ""
        self._matched = False

    def push(self, text: str) -> StopResult:
        assert not self._matched, "the text has ended at a stop string"
        if not text:
            return StopResult("")
        text = self._held + text
        found = [(text.find(stop), stop) for stop in self._stop]
        matches = [(start + len(stop), stop) for start, stop in found if start >= 0]
        if matches:
            end, matched = min(matches, key=lambda match: match[0])
            self._matched, self._held = True, ""
            return StopResult(text[: end if self._no_trim else end - len(matched)], matched)
        keep_from = self._hold_from(text)
        self._held = text[keep_from:]
        return StopResult(text[:keep_from])

    def finish(self) -> str:
        """The text that was held back, when it turns out that none follows."""
        held, self._held = self._held, ""
        return held

    def _hold_from(self, text: str) -> int:
        """Where the longest end of `text` begins that is the beginning of a stop string."""
        for start in range(max(0, len(text) - self._longest_hold), len(text)):
            if text[start] in self._first_characters:
                end_of_text = text[start:]
                if any(stop.startswith(end_of_text) for stop in self._stop):
                    return start
        return len(text)

"""A text that arrives in parts, for parsers that are written as if all of it were there.

A parser is a generator. It yields whenever it needs text that has not arrived, and is resumed when
more text is there; so the places where the text is split cannot change the result.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Sequence
from functools import lru_cache
from typing import TypeVar

from sapwood.text.events import Event, Markup, merged

T = TypeVar("T")

Steps = Generator[None, None, T]
"""A computation that yields whenever it waits for more text."""

Emit = Callable[[str], None]

MAX_HELD = 4096
"""Characters that a name, key or tag may have; a longer text is taken for something else."""


class Malformed(Exception):
    """The text breaks the format's rules, or has ended too early."""


class Source:
    """The text so far, how far it has been read, and the events that were found in it.

    pos          index of the first unread character
    events       events that nobody has taken yet
    is_thinking  whether the text that is being read belongs to the thinking
    tag_start    index of the tag that `passing` found
    hit_end      whether the parser has asked for text behind the end; it stays True until reset
    is_cut       whether the text was cut off before its writer had ended it
    """

    def __init__(self) -> None:
        self.pos = 0
        self.events: list[Event] = []
        self.is_thinking = False
        self.tag_start = 0
        self.hit_end = False
        self.is_cut = False
        self._text = ""
        self._ended = False

    # ---- from outside ------------------------------------------------------------------------

    def add(self, text: str) -> None:
        self._text += text

    def end(self, *, is_cut: bool = False) -> None:
        self._ended = True
        self.is_cut = is_cut

    @property
    def num_characters(self) -> int:
        """How many characters have arrived and are not forgotten; the end of the text so far."""
        return len(self._text)

    # ---- single characters and tags ----------------------------------------------------------

    def peek(self, count: int = 1) -> Steps[str]:
        """The next `count` characters; fewer only at the end of the text. Reads nothing."""
        while len(self._text) - self.pos < count:
            if self._ended:
                self.hit_end = True
                break
            yield
        return self._text[self.pos : self.pos + count]

    def skips(self, tag: str) -> Steps[bool]:
        """Read `tag` if it comes next. Returns whether it did."""
        # The first character decides in nearly every case, so the rest is not waited for.
        for length in range(1, len(tag) + 1):
            if (yield from self.peek(length)) != tag[:length]:
                return False
        self.pos += len(tag)
        return True

    def match_here(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        """A match at `pos` in the text so far; it could be longer once more text has arrived."""
        return pattern.match(self._text, self.pos)

    def expect(self, tag: str) -> Steps[None]:
        if not (yield from self.skips(tag)):
            raise Malformed

    def space(self) -> Steps[str]:
        """Read white space. Returns the character after it, unread; "" at the end."""
        while True:
            next_one = yield from self.peek()
            if not next_one.isspace():
                return next_one
            self.pos += 1

    def skips_after_space(self, *tags: str) -> Steps[str | None]:
        """Read white space and one of the tags, if that is what follows; else read nothing.

        Returns the tag that was read, or None.
        """
        start = self.pos
        yield from self.space()
        for tag in tags:
            if (yield from self.skips(tag)):
                return tag
        self.pos = start
        return None

    # ---- runs of text ------------------------------------------------------------------------

    def while_matching(self, characters: re.Pattern[str], *, limit: int = MAX_HELD) -> Steps[str]:
        """Read as long as the pattern `characters` matches, which is one or more of a set."""
        start = self.pos
        while True:
            match = characters.match(self._text, self.pos)
            if match is not None:
                self.pos = match.end()
            if self.pos - start > limit:
                raise Malformed
            at_end = self.pos >= len(self._text)
            if not at_end or self._ended:
                self.hit_end = self.hit_end or at_end
                return self._text[start : self.pos]
            yield

    def until(self, tag: str, *, limit: int = MAX_HELD) -> Steps[str]:
        """Read up to and including `tag`. Returns the text before the tag.

        Raises Malformed if there are more than `limit` characters before the tag.
        """
        searched = self.pos
        while True:
            found = self._text.find(tag, searched)
            if found >= 0 and found - self.pos <= limit:
                text = self._text[self.pos : found]
                self.pos = found + len(tag)
                return text
            if self._ended or len(self._text) - self.pos >= limit + len(tag):
                self.hit_end = self.hit_end or self._ended
                raise Malformed
            searched = max(self.pos, len(self._text) - len(tag) + 1)
            yield

    def passing(self, kind: Callable[[str], Event], tags: Sequence[str]) -> Steps[str | None]:
        """Emit text as it comes, up to the first of `tags` and the white space before it.

        Returns the tag, with `pos` at that white space; None when the text has ended, all of it
        emitted. The tag itself is at `tag_start`.
        """
        while True:
            found = first_of(tags, self._text, self.pos)
            if found is not None:
                self.tag_start, tag = found
                self._emit_up_to(kind, self.before_space(self.tag_start))
                return tag
            if self._ended:
                self._emit_up_to(kind, len(self._text))
                return None
            self._emit_up_to(kind, self.before_space(held_from(tags, self._text, self.pos)))
            yield

    def streaming_until(self, tags: Sequence[str], out: Emit) -> Steps[str]:
        """Hand on text as it comes, up to the first of `tags`. Reads that tag and returns it."""
        while True:
            found = first_of(tags, self._text, self.pos)
            end = held_from(tags, self._text, self.pos) if found is None else found[0]
            if end > self.pos:
                out(self._text[self.pos : end])
                self.pos = end
            if found is not None:
                self.pos = end + len(found[1])
                return found[1]
            if self._ended:
                self.hit_end = True
                raise Malformed
            yield

    def before_space(self, end: int) -> int:
        """Where the white space before `end` begins."""
        while end > self.pos and self._text[end - 1].isspace():
            end -= 1
        return end

    # ---- what was found ----------------------------------------------------------------------

    def emit(self, event: Event) -> None:
        self.events.append(event)

    def slice(self, start: int, end: int) -> str:
        return self._text[start:end]

    def markup_since(self, start: int) -> None:
        """Emit the text from `start` to `pos` as markup."""
        if start < self.pos:
            self.emit(Markup(self._text[start : self.pos]))

    def _emit_up_to(self, kind: Callable[[str], Event], end: int) -> None:
        """Emit the text from `pos` to `end`, and forget it: no parser goes back behind `end`."""
        if end > self.pos:
            self.emit(kind(self._text[self.pos : end]))
        self.pos = end
        # Not at each tag: copying the rest every time costs the square of a long text.
        if 2 * end >= len(self._text):
            self.tag_start -= end
            self._text = self._text[end:]
            self.pos = 0


def first_of(tags: Sequence[str], text: str, start: int) -> tuple[int, str] | None:
    """(index, tag) of the first tag in the text at or after `start`; None if there is no tag."""
    if not tags:
        return None
    found = _any_of(tuple(tags)).search(text, start)
    return None if found is None else (found.start(), found[0])


@lru_cache(maxsize=256)
def _any_of(tags: tuple[str, ...]) -> re.Pattern[str]:
    """One search for all: a tag that is nowhere would be looked for through all of the text."""
    return re.compile("|".join(re.escape(tag) for tag in sorted(tags, key=len, reverse=True)))


def held_from(tags: Sequence[str], text: str, start: int) -> int:
    """Where the longest end of the text that may still become one of the tags begins."""
    longest = max((len(tag) for tag in tags), default=1)
    for at in range(max(start, len(text) - longest + 1), len(text)):
        if any(tag.startswith(text[at:]) for tag in tags):
            return at
    return len(text)


class Parser:
    """Takes one answer apart. `feed` it the text in any parts, then `finish`.

    source  receives the text and collects the events
    steps   the format's generator, which reads the source
    """

    def __init__(self, source: Source, steps: Steps[None]) -> None:
        self._source = source
        self._steps = steps

    @property
    def is_thinking(self) -> bool:
        return self._source.is_thinking

    def feed(self, text: str) -> list[Event]:
        self._source.add(text)
        return self._advance()

    def finish(self, *, is_cut: bool = False) -> list[Event]:
        """The text has ended; what was held comes now.

        is_cut  whether the text was cut off: a call in which it ends is told as far as it came, and
                is not taken for content
        """
        self._source.end(is_cut=is_cut)
        return self._advance()

    def _advance(self) -> list[Event]:
        run(self._source, self._steps)
        events, self._source.events = self._source.events, []
        return merged(events)


def run(source: Source, steps: Steps[None]) -> bool:
    """Resume a parser until it waits for text. Returns False if it has come to its end."""
    try:
        next(steps)
    except StopIteration:
        return False
    return True

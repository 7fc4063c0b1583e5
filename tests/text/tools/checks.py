"""What holds of every parser, whatever it is fed."""

from __future__ import annotations

from collections.abc import Iterable

import orjson

from sapwood.text.answer import AnswerShape
from sapwood.text.events import CallCut, CallEnd, CallFailed, CallStart, Event, merged


def read(shape: AnswerShape, parts: Iterable[str], *, is_cut: bool = False) -> list[Event]:
    """The events of a text that came in those parts, ids left out: they are random."""
    parser = shape.parser()
    events: list[Event] = []
    for part in parts:
        events += parser.feed(part)
    events += parser.finish(is_cut=is_cut)
    return merged(
        CallStart(event.index, event.name, "") if isinstance(event, CallStart) else event
        for event in events
    )


def check_nothing_lost(shape: AnswerShape, text: str, *, is_cut: bool = False) -> list[Event]:
    """All of the text is in the events; calls begin and end once, with an object each."""
    events = read(shape, [text], is_cut=is_cut)
    assert "".join(event.source for event in events) == text
    is_open = False
    for event in events:
        if isinstance(event, CallStart):
            assert not is_open
            is_open = True
        elif isinstance(event, CallEnd | CallFailed | CallCut):
            assert is_open
            is_open = False
    assert not is_open
    for call in shape.parsed(text).calls:
        assert isinstance(orjson.loads(call.arguments), dict)
    return events


def in_two(text: str) -> Iterable[tuple[str, str]]:
    return ((text[:at], text[at:]) for at in range(1, len(text)))

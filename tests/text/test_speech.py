"""Whisper's special tokens: prompts, languages, and segments of what was heard."""

from __future__ import annotations

import pytest

from sapwood.base.errors import InvalidRequest
from sapwood.text.languages import LANGUAGES
from sapwood.text.speech import Segment, SpeechVocabulary, segments_of

VOCABULARY = SpeechVocabulary(
    start=258,
    end=257,
    tasks={"transcribe": 262, "translate": 261},
    languages={"en": 259, "de": 260},
    no_times=266,
    previous=264,
    silence=265,
    suppressed=(1, 257),
    suppressed_first=(220, 257),
)
ENGLISH = SpeechVocabulary(
    start=258,
    end=257,
    tasks={},
    languages={},
    no_times=266,
    previous=None,
    silence=None,
    suppressed=(),
    suppressed_first=(),
)
FIRST = VOCABULARY.first_time


def test_prompts() -> None:
    assert VOCABULARY.prompt("de", "translate") == [258, 260, 261]
    assert VOCABULARY.prompt("en", "transcribe", [5, 6]) == [264, 5, 6, 258, 259, 262]
    assert ENGLISH.prompt("en", "transcribe") == [258]


def test_languages_have_codes_and_names() -> None:
    assert VOCABULARY.language("German") == VOCABULARY.language(" DE ") == "de"
    with pytest.raises(InvalidRequest, match="it knows en, de"):
        VOCABULARY.language("fr")
    assert ENGLISH.language("english") == "en"
    assert len(LANGUAGES) == 100
    assert LANGUAGES["ht"] == "haitian creole"
    assert all(code and name and name == name.lower() for code, name in LANGUAGES.items())


def test_the_end_is_never_suppressed() -> None:
    rules = VOCABULARY.rules
    assert rules.suppressed == (1, 258, 261, 262, 264, 265, 266)
    assert rules.first_time == 267


def ids(*parts: float | str) -> list[int]:
    """A number is a time in seconds, a letter a token of text."""
    return [FIRST + round(one / 0.02) if isinstance(one, float) else ord(one) for one in parts]


def test_segments() -> None:
    found, until = segments_of(ids(0.5, "a", "b", 2.0, 2.0, "c", 3.0), VOCABULARY, seconds=10.0)
    assert found == [
        Segment(start=0.5, end=2.0, token_ids=(97, 98)),
        Segment(start=2.0, end=3.0, token_ids=(99,)),
    ]
    assert until == 10.0
    # Two times at the end: the rest is left to the next transcription.
    found, until = segments_of(ids(0.0, "a", 4.0, 4.0), VOCABULARY, seconds=10.0)
    assert [one.end for one in found] == [4.0]
    assert until == 4.0
    # The output was cut off, and a time beyond the sound's end.
    found, until = segments_of(ids(0.0, "a", 29.0, 29.0, "b"), VOCABULARY, seconds=10.0)
    assert [(one.start, one.end) for one in found] == [(0.0, 10.0), (10.0, 10.0)]
    assert until == 10.0
    assert segments_of([257], VOCABULARY, seconds=3.0) == ([], 3.0)
    assert segments_of(ids(0.0, 0.0), VOCABULARY, seconds=3.0) == ([], 3.0)

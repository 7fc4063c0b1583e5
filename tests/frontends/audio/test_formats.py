"""The formats of transcriptions."""

from __future__ import annotations

from sapwood.frontends.audio import formats
from sapwood.frontends.audio.transcriber import SpokenSegment
from sapwood.multimodal.listener import Recording


def segment(number: int, start: float, end: float, text: str) -> SpokenSegment:
    return SpokenSegment(
        id=number,
        seek=0,
        start=start,
        end=end,
        text=text,
        tokens=(1, 2),
        temperature=0.0,
        avg_logprob=-0.5,
        compression_ratio=1.0,
        no_speech_prob=0.1,
    )


SEGMENTS = [segment(0, 0.0, 2.5, " Hello there."), segment(1, 3661.02, 3662.0, " a --> b\n")]
RECORDING = Recording(bytes(32_000 * 3), [(0, 48_000)])


def test_text() -> None:
    assert formats.text_of(SEGMENTS) == "Hello there. a --> b"
    assert formats.usage_of(RECORDING).seconds == 3


def test_subrip() -> None:
    assert formats.subrip(SEGMENTS) == (
        "1\n00:00:00,000 --> 00:00:02,500\nHello there.\n\n"
        "2\n01:01:01,020 --> 01:01:02,000\na -> b\n\n"
    )


def test_webvtt() -> None:
    assert formats.webvtt(SEGMENTS) == (
        "WEBVTT\n\n00:00:00.000 --> 00:00:02.500\nHello there.\n\n"
        "01:01:01.020 --> 01:01:02.000\na -> b\n\n"
    )


def test_verbose() -> None:
    found = formats.verbose(SEGMENTS, RECORDING, task="transcribe", language="de")
    assert found["language"] == "german"
    assert found["duration"] == 3.0
    segments = found["segments"]
    assert isinstance(segments, list)
    assert segments[1]["start"] == 3661.02
    assert segments[0]["tokens"] == (1, 2) or segments[0]["tokens"] == [1, 2]

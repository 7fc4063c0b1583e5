"""What is said in a sound, in OpenAI's formats; SubRip and WebVTT as their specifications say."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from sapwood.frontends.audio.protocol import SpeechUsage
from sapwood.frontends.audio.transcriber import SpokenSegment
from sapwood.multimodal.listener import Recording
from sapwood.text.languages import LANGUAGES


def text_of(segments: Sequence[SpokenSegment]) -> str:
    return "".join(segment.text for segment in segments).strip()


def usage_of(recording: Recording) -> SpeechUsage:
    return SpeechUsage(seconds=math.ceil(recording.seconds))


def verbose(
    segments: Sequence[SpokenSegment], recording: Recording, *, task: str, language: str
) -> dict[str, object]:
    return {
        "task": task,
        "language": LANGUAGES[language],
        "duration": recording.seconds,
        "text": text_of(segments),
        "segments": msgspec.to_builtins(segments),
        "usage": msgspec.to_builtins(usage_of(recording)),
    }


def subrip(segments: Sequence[SpokenSegment]) -> str:
    return "".join(
        f"{number}\n{_time(one.start, ',')} --> {_time(one.end, ',')}\n{_line(one)}\n\n"
        for number, one in enumerate(segments, start=1)
    )


def webvtt(segments: Sequence[SpokenSegment]) -> str:
    return "WEBVTT\n\n" + "".join(
        f"{_time(one.start, '.')} --> {_time(one.end, '.')}\n{_line(one)}\n\n" for one in segments
    )


def _line(segment: SpokenSegment) -> str:
    # The arrow ends a cue's times in both formats; no text may look like one.
    return segment.text.strip().replace("-->", "->")


def _time(seconds: float, point: str) -> str:
    milliseconds = round(seconds * 1000)
    minutes, rest = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{rest // 1000:02}{point}{rest % 1000:03}"

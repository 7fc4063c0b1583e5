"""The forms of /v1/audio/transcriptions and /translations. Source: OpenAI's API reference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from starlette.datastructures import FormData
from starlette.requests import Request

from sapwood.base.errors import InvalidRequest
from sapwood.http.form import opened_form
from sapwood.schema.fields import FieldTable, Int64, NotOffered, parse
from sapwood.schema.limits import SPEECH_PROMPT

ResponseFormat = Literal["json", "text", "srt", "verbose_json", "vtt"]
GRANULARITIES = "timestamp_granularities[]"
_MOST_FIELDS = 16
_FIELD_BYTES = 4 * SPEECH_PROMPT.most
"""UTF-8 has up to four bytes per character."""


class TranslationRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What both forms have.

    prompt       what was said before, or how the text shall be written
    temperature  0: what the likeliest tokens say; where that reads like noise, it is tried again
                 with higher temperatures
    priority     larger goes first
    """

    model: str = ""
    prompt: str = ""
    response_format: ResponseFormat = "json"
    temperature: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] = 0.0
    stream: bool = False
    priority: Int64 | None = None


class TranscriptionRequest(TranslationRequest, frozen=True, kw_only=True):
    """language: of the speech, by code or English name; "": the model finds out"""

    language: str = ""


_CHANGES_NOTHING = {"user": "nothing is kept by user"}
_NOT_OFFERED = {
    "include[]": NotOffered(why="log probabilities of speech are not told"),
    "chunking_strategy": NotOffered(
        why="long sounds are cut in quiet gaps of their own", idle=("auto",)
    ),
    "known_speaker_names[]": NotOffered(why="speakers are not told apart"),
    "known_speaker_references[]": NotOffered(why="speakers are not told apart"),
}

TRANSCRIPTION_FIELDS: FieldTable[TranscriptionRequest] = FieldTable(
    title="POST /v1/audio/transcriptions (multipart, besides file)",
    shape=TranscriptionRequest,
    changes_nothing={
        **_CHANGES_NOTHING,
        GRANULARITIES: "verbose_json has segments; words are refused before",
    },
    not_offered=_NOT_OFFERED,
)
TRANSLATION_FIELDS: FieldTable[TranslationRequest] = FieldTable(
    title="POST /v1/audio/translations (multipart, besides file)",
    shape=TranslationRequest,
    changes_nothing=_CHANGES_NOTHING,
    not_offered=_NOT_OFFERED
    | {"language": NotOffered(why="a translation is to English", idle=("en", "english"))},
)

FORM: dict[str, Any] = {
    "type": "object",
    "required": ["file"],
    "properties": {
        "file": {"type": "string", "format": "binary"},
        **{name: {"type": "string"} for name in TranscriptionRequest.__struct_fields__},
    },
}


class SpeechUsage(msgspec.Struct, frozen=True, kw_only=True):
    seconds: int
    type: Literal["duration"] = "duration"


class SpeechAnswer(msgspec.Struct, frozen=True, kw_only=True):
    text: str
    usage: SpeechUsage


async def read_form(request: Request, table: FieldTable[Any]) -> tuple[TranslationRequest, bytes]:
    """(the fields, the file's bytes); InvalidRequest names what is missing or wrong."""
    async with opened_form(
        request,
        parts="file and model",
        max_files=1,
        max_fields=_MOST_FIELDS,
        max_field_bytes=_FIELD_BYTES,
    ) as form:
        asked = parse(_fields(form), table)
        SPEECH_PROMPT.check(len(asked.prompt), "prompt")
        files = [(name, one) for name, one in form.multi_items() if not isinstance(one, str)]
        if [name for name, _ in files] != ["file"]:
            raise InvalidRequest(
                "the form has no file; send the sound as the file named file", param="file"
            )
        data = await files[0][1].read()
    if not data:
        raise InvalidRequest("file is empty; send a sound", param="file")
    return asked, data


def _fields(form: FormData) -> Mapping[str, str]:
    pairs = [(name, value) for name, value in form.multi_items() if isinstance(value, str)]
    fields = {
        "timestamp_granularities[]" if name == "timestamp_granularities" else name: value
        for name, value in pairs
    }
    for name, value in pairs:
        if name.startswith("timestamp_granularities") and value != "segment":
            why = "times of words are not made" if value == "word" else "it must be segment"
            raise InvalidRequest(
                f"{GRANULARITIES} has {value[:20]!r}: {why}; ask for segment", param=GRANULARITIES
            )
    return fields

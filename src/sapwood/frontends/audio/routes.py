"""The table of endpoints of models that hear."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from sapwood.base.errors import InvalidRequest
from sapwood.frontends.audio import formats
from sapwood.frontends.audio.protocol import (
    FORM,
    TRANSCRIPTION_FIELDS,
    TRANSLATION_FIELDS,
    SpeechAnswer,
    TranscriptionRequest,
    TranslationRequest,
    read_form,
)
from sapwood.frontends.audio.transcriber import Ask, SpokenSegment, Transcriber
from sapwood.frontends.serving.services import Services
from sapwood.http.endpoints import Dialect, Endpoint
from sapwood.http.errors import OPENAI_ERRORS, json_response, openai_body
from sapwood.http.openapi import SSE
from sapwood.http.sse import EventStream, event, until_disconnect
from sapwood.multimodal.listener import Recording
from sapwood.schema.fields import FieldTable
from sapwood.text.speech import Task

DEAF = "this model hears nothing; serve one that does: `sapwood serve --model whisper-base`"


def audio_dialect(services: Services) -> Dialect:
    dialect = Dialect("audio", errors={"/v1": OPENAI_ERRORS})

    def serve(path: str, table: FieldTable[Any], task: Task) -> None:
        @dialect.serves(
            Endpoint(
                paths=(path,),
                methods=("POST",),
                access="user",
                form=FORM,
                answers=(SpeechAnswer, SSE),
            )
        )
        async def post_speech(request: Request) -> Response:
            return await _answer(request, services, table, task)

    serve("/v1/audio/transcriptions", TRANSCRIPTION_FIELDS, "transcribe")
    serve("/v1/audio/translations", TRANSLATION_FIELDS, "translate")
    return dialect


async def _answer(
    request: Request, services: Services, table: FieldTable[Any], task: Task
) -> Response:
    transcriber = _transcriber(services)
    if task == "translate" and not transcriber.translates:
        raise InvalidRequest("this model knows English alone; send the sound to transcriptions")
    asked, data = await read_form(request, table)
    services.check_model(asked.model)
    ask = _ask(asked, task)
    if ask.language:
        transcriber.check_language(ask.language)
    if asked.stream:
        if asked.response_format != "json":
            raise InvalidRequest(
                f"response_format is {asked.response_format} but must be json with stream",
                param="response_format",
            )
        return EventStream(_events(transcriber, data, ask), openai_body)
    work = _whole(transcriber, data, ask)
    recording, language, segments = await until_disconnect(work, request.receive)
    match asked.response_format:
        case "text":
            return PlainTextResponse(formats.text_of(segments) + "\n")
        case "srt":
            return PlainTextResponse(formats.subrip(segments))
        case "vtt":
            return PlainTextResponse(formats.webvtt(segments), media_type="text/vtt")
        case "verbose_json":
            return json_response(formats.verbose(segments, recording, task=task, language=language))
        case "json":
            usage = formats.usage_of(recording)
            return json_response(
                msgspec.to_builtins(SpeechAnswer(text=formats.text_of(segments), usage=usage))
            )


def _transcriber(services: Services) -> Transcriber:
    if services.listener is None or services.speech is None:
        raise InvalidRequest(DEAF)
    return Transcriber(services, services.listener, services.speech)


def _ask(asked: TranslationRequest, task: Task) -> Ask:
    return Ask(
        task=task,
        language=asked.language if isinstance(asked, TranscriptionRequest) else "",
        prompt=asked.prompt,
        temperature=asked.temperature,
        priority=asked.priority,
    )


async def _whole(
    transcriber: Transcriber, data: bytes, ask: Ask
) -> tuple[Recording, str, list[SpokenSegment]]:
    found: list[SpokenSegment] = []
    async with transcriber.opened(data) as recording:
        language = await transcriber.language_of(recording, ask)
        async with aclosing(transcriber.segments(recording, ask, language)) as pieces:
            async for segments in pieces:
                found += segments
    return recording, language, found


async def _events(transcriber: Transcriber, data: bytes, ask: Ask) -> AsyncGenerator[bytes, None]:
    """A delta for each piece of the sound, then the whole text."""
    text = ""
    async with transcriber.opened(data) as recording:
        language = await transcriber.language_of(recording, ask)
        async with aclosing(transcriber.segments(recording, ask, language)) as pieces:
            async for segments in pieces:
                delta = "".join(segment.text for segment in segments)
                delta = delta if text else delta.lstrip()
                if delta:
                    text += delta
                    yield event({"type": "transcript.text.delta", "delta": delta})
    yield event(
        {
            "type": "transcript.text.done",
            "text": text.rstrip(),
            "usage": msgspec.to_builtins(formats.usage_of(recording)),
        }
    )

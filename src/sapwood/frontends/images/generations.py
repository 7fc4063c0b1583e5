"""POST /v1/images/generations and /v1/images/edits: from fields to pictures."""

from __future__ import annotations

import asyncio
import base64
import re
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass

import msgspec
import orjson
from starlette.requests import Request
from starlette.responses import Response

from sapwood.base.errors import InvalidRequest, SapwoodError
from sapwood.frontends.images.pictures import MEDIA_TYPES, encoded
from sapwood.frontends.images.protocol import (
    PictureAnswer,
    PictureFields,
    PicturesAnswer,
)
from sapwood.frontends.images.services import PaintingServices
from sapwood.frontends.images.traces import PictureTrace
from sapwood.http.errors import openai_body
from sapwood.http.sse import EVENT_STREAM, EventStream, Framing, until_disconnect
from sapwood.schema.limits import PICTURE_PROMPT
from sapwood.schema.painting import (
    InputPicture,
    Paint,
    PaintDone,
    PaintEvent,
    PaintFailed,
    PaintProgress,
    Picture,
    PictureOptions,
)

_SIZE = re.compile(r"(\d{1,6})[xX](\d{1,6})")
_HOST = re.compile(r"[A-Za-z0-9.-]{1,253}(:\d{1,5})?|\[[0-9A-Fa-f:.]{2,45}\](:\d{1,5})?")
_NAMES = {"generation": "image_generation", "edit": "image_edit"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Brought:
    """Pictures of a request for edits."""

    pictures: tuple[InputPicture, ...] = ()
    mask: bytes | None = None
    strength: float | None = None


class PaintingError(SapwoodError):
    """The engine did not draw the picture; it says why, and with which status."""

    def __init__(self, failure: PaintFailed) -> None:
        super().__init__(failure.message, param=failure.param)
        self.status = failure.status
        self.type = failure.error_type


async def answer_pictures(
    request: Request,
    services: PaintingServices,
    asked: PictureFields,
    brought: Brought,
    *,
    kind: str,
) -> Response:
    """kind: "generation" or "edit", for the names of events"""
    paints = paints_of(asked, services, brought)
    if asked.stream:
        events = _events(services, request.headers, asked, paints[0], _NAMES[kind])
        return EventStream(events, openai_body, _FRAMING)
    work = _drawn(request, services, asked, paints)
    return await until_disconnect(work, request.receive)


def paints_of(asked: PictureFields, services: PaintingServices, brought: Brought) -> list[Paint]:
    """One message per picture. InvalidRequest names the field and the limit."""
    config = services.config
    services.check_model(asked.model)
    PICTURE_PROMPT.check(len(asked.prompt), "prompt")
    PICTURE_PROMPT.check(len(asked.negative_prompt or ""), "negative_prompt")
    check_most("n", asked.n, config.max_pictures_per_request, "--max-pictures-per-request")
    if asked.num_inference_steps is not None:
        check_most(
            "num_inference_steps",
            asked.num_inference_steps,
            config.max_inference_steps,
            "--max-inference-steps",
        )
    if asked.stream and asked.n > 1:
        raise InvalidRequest(f"n is {asked.n} but must be 1 with stream", param="n")
    if asked.partial_images and not asked.stream:
        raise InvalidRequest("partial_images is for stream: true", param="partial_images")
    size = picture_size(asked.size, config.max_picture_pixels)
    seed = secrets.randbelow(2**31) if asked.seed is None else asked.seed
    # A pipeline of videos draws pictures too: videos of one frame.
    num_frames = None if services.engine.info.traits.video is None else 1
    options = PictureOptions(
        num_frames=num_frames,
        width=size[0] if size else None,
        height=size[1] if size else None,
        num_inference_steps=asked.num_inference_steps,
        guidance_scale=asked.guidance_scale,
        true_cfg_scale=asked.true_cfg_scale,
        negative_prompt=asked.negative_prompt,
        max_sequence_length=asked.max_sequence_length,
        pictures=brought.pictures,
        mask=brought.mask,
        strength=brought.strength,
    )
    limits = [limit for limit in (asked.timeout, config.picture_timeout or None) if limit]
    return [
        Paint(
            request_id=f"paint-{uuid.uuid4().hex}",
            prompt=asked.prompt,
            seed=min(seed + place, 2**63 - 1),
            options=options,
            priority=asked.priority,
            timeout_s=min(limits) if limits else None,
            num_partial=asked.partial_images,
        )
        for place in range(asked.n)
    ]


def picture_size(text: str, max_pixels: int) -> tuple[int, int] | None:
    """(width, height); None: the pipeline's own."""
    if text == "auto":
        return None
    found = _SIZE.fullmatch(text)
    if found is None:
        raise InvalidRequest(
            f'size is {text[:40]!r} but must be "auto", or width and height such as "512x768"',
            param="size",
        )
    width, height = int(found[1]), int(found[2])
    if min(width, height) < 1 or width * height > max_pixels:
        raise InvalidRequest(
            f"size is {width}x{height}, but a picture must have 1 to {max_pixels} pixels; ask for "
            "a smaller one, or start the server with a larger --max-picture-pixels",
            param="size",
        )
    return width, height


async def draw(services: PaintingServices, paint: Paint, headers: Mapping[str, str]) -> PaintDone:
    """Raises PaintingError if there is no picture. headers: of the call, for its trace"""
    async with aclosing(draw_events(services, paint, headers)) as events:
        async for event in events:
            if isinstance(event, PaintDone):
                return event
            if isinstance(event, PaintFailed):
                raise PaintingError(event)
    raise AssertionError("the last event is a picture or a failure")


async def draw_events(
    services: PaintingServices, paint: Paint, headers: Mapping[str, str]
) -> AsyncGenerator[PaintEvent, None]:
    """What becomes of it, as a generator that can be closed. headers: of the call, for its trace"""
    if services.tracing is None:
        async for event in services.engine.paint(paint):
            yield event
        return
    trace = PictureTrace(services.tracing, headers, paint)
    try:
        async for event in services.engine.paint(paint):
            trace.note(event)
            yield event
    finally:
        trace.end()


async def _drawn(
    request: Request, services: PaintingServices, asked: PictureFields, paints: Sequence[Paint]
) -> Response:
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(draw(services, paint, request.headers)) for paint in paints]
    except* SapwoodError as errors:
        raise _first(errors) from None
    done = [task.result() for task in tasks]
    data: list[PictureAnswer] = []
    first_id = f"img_{uuid.uuid4().hex}"
    for paint, event in zip(paints, done, strict=True):
        content = await asyncio.to_thread(
            encoded, event.picture, asked.output_format, asked.output_compression
        )
        if asked.response_format == "b64_json":
            data.append(PictureAnswer(seed=paint.seed, b64_json=base64.b64encode(content).decode()))
            continue
        picture_id = await asyncio.to_thread(
            services.store.put, content, asked.output_format, MEDIA_TYPES[asked.output_format]
        )
        if not data:
            first_id = picture_id
        path = services.store.get(picture_id).path
        data.append(
            PictureAnswer(
                seed=paint.seed,
                url=f"{base_of(request)}v1/images/{picture_id}/content",
                file_path=str(path) if services.shows_paths else None,
            )
        )
    answer = PicturesAnswer(
        id=first_id,
        created=int(time.time()),
        data=data,
        output_format=asked.output_format,
        size=_size_of(done[0].picture),
        peak_memory_mb=max(event.peak_bytes for event in done) / 1e6,
        inference_time_s=max(event.paint_s for event in done),
    )
    return Response(msgspec.json.encode(answer), media_type="application/json")


def base_of(request: Request) -> str:
    """The address of this server as the client has it, with a slash at the end: a gateway says by
    which one it was asked."""
    host = request.headers.get("x-forwarded-host", "")
    proto = request.headers.get("x-forwarded-proto", request.url.scheme)
    if _HOST.fullmatch(host) and proto in ("http", "https"):
        return f"{proto}://{host}/"
    return str(request.base_url)


def _first(errors: BaseExceptionGroup[SapwoodError]) -> SapwoodError:
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, SapwoodError)
    return error


async def _events(
    services: PaintingServices,
    headers: Mapping[str, str],
    asked: PictureFields,
    paint: Paint,
    name: str,
) -> AsyncGenerator[bytes, None]:
    """OpenAI's events of one picture: partial ones, then the completed one."""
    num_partial = 0
    async with aclosing(draw_events(services, paint, headers)) as events:
        async for event in events:
            if isinstance(event, PaintFailed):
                raise PaintingError(event)
            if isinstance(event, PaintProgress):
                # A comment, which clients pass over; our page shows it.
                yield b": step %d of %d\n\n" % (event.step, event.num_steps)
                if event.partial is not None:
                    told = await _told(event.partial, asked)
                    kind = f"{name}.partial_image"
                    yield _event(kind, {**told, "partial_image_index": num_partial})
                    num_partial += 1
                continue
            told = await _told(event.picture, asked)
            usage = {
                "input_tokens": 0,
                "output_tokens": 0,
                "total_tokens": 0,
                "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
            }
            yield _event(f"{name}.completed", {**told, "usage": usage, "seed": paint.seed})


async def _told(picture: Picture, asked: PictureFields) -> dict[str, object]:
    content = await asyncio.to_thread(
        encoded, picture, asked.output_format, asked.output_compression
    )
    return {
        "b64_json": base64.b64encode(content).decode(),
        "created_at": int(time.time()),
        "size": _size_of(picture),
        "quality": "auto",
        "background": "auto",
        "output_format": asked.output_format,
    }


def _event(kind: str, content: dict[str, object]) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (
        kind.encode(),
        orjson.dumps({"type": kind, **content}),
    )


def _failure(error: SapwoodError) -> bytes:
    return _event("error", {"error": openai_body(error)})


_FRAMING = Framing(content_type=EVENT_STREAM, end=b"", failure=_failure)


def _size_of(picture: Picture) -> str:
    return f"{picture.width}x{picture.height}"


def check_most(name: str, value: int, most: int, flag: str) -> None:
    """InvalidRequest, with the flag that raises the limit, for more than `most`."""
    if value > most:
        raise InvalidRequest(
            f"{name} is {value} but at most {most} are accepted; ask for fewer, or start the "
            f"server with a larger {flag}",
            param=name,
        )

"""POST /api/chat and /api/generate."""

from __future__ import annotations

import uuid
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from sapwood.base.errors import InvalidRequest, UnsupportedFeature
from sapwood.frontends.common.body import read_json
from sapwood.frontends.common.chat import chat_prompt
from sapwood.frontends.common.errors import json_response, ollama_body
from sapwood.frontends.common.fields import parse
from sapwood.frontends.common.services import Services
from sapwood.frontends.common.sse import EventStream, until_disconnect
from sapwood.frontends.ollama.models import check_model
from sapwood.frontends.ollama.protocol import (
    CHAT_RULES,
    GENERATE_RULES,
    MESSAGE_RULES,
    Message,
    OllamaChatRequest,
    OllamaGenerateRequest,
    OllamaRequest,
)
from sapwood.frontends.ollama.sampling import sampling_params
from sapwood.frontends.ollama.stream import (
    FRAMING,
    Answer,
    TextFields,
    chat_fields,
    check_loaded,
    generate_fields,
    lines,
    whole,
)
from sapwood.text.generation import TextRequest

_AT_ONCE = (0, "0", "0s", "0m", "0h")
_INSTEAD = "use /api/generate with raw=true"


async def chat(request: Request, services: Services) -> Response:
    started_s = services.clock.now_s()
    asked = parse(await read_json(request), OllamaChatRequest, CHAT_RULES)
    check_model(services, asked.model)
    text_request = None
    if asked.messages:
        messages = [_message(given, i) for i, given in enumerate(asked.messages)]
        text_request = _templated(asked, messages, services)
    return await _answer(request, services, asked, text_request, chat_fields, started_s)


async def generate_text(request: Request, services: Services) -> Response:
    started_s = services.clock.now_s()
    asked = parse(await read_json(request), OllamaGenerateRequest, GENERATE_RULES)
    check_model(services, asked.model)
    text_request = _of_prompt(asked, services) if asked.prompt else None
    return await _answer(request, services, asked, text_request, generate_fields, started_s)


async def _answer(
    request: Request,
    services: Services,
    asked: OllamaRequest,
    text_request: TextRequest | None,
    fields: TextFields,
    started_s: float,
) -> Response:
    answer = Answer(services, fields, model=asked.model, started_s=started_s)
    if text_request is None:
        sampling_params(asked.options, services)
        if asked.keep_alive in _AT_ONCE:
            raise UnsupportedFeature(
                "keep_alive=0 without a prompt asks to unload the model, but it stays loaded as "
                "long as this server runs; stop the server instead",
                param="keep_alive",
            )
        check_loaded(services)
        return json_response(answer.loaded())
    if asked.stream:
        return EventStream(lines(services, text_request, answer), ollama_body, FRAMING)
    return json_response(
        await until_disconnect(whole(services, text_request, answer), request.receive)
    )


def _of_prompt(asked: OllamaGenerateRequest, services: Services) -> TextRequest:
    if asked.raw:
        if asked.system:
            raise InvalidRequest(
                "raw takes the prompt as it is, so system has no place; leave one of them out",
                param="system",
            )
        return TextRequest(
            request_id=_request_id(),
            prompt=asked.prompt,
            sampling=sampling_params(asked.options, services),
        )
    messages = [{"role": "user", "content": asked.prompt}]
    if asked.system:
        messages.insert(0, {"role": "system", "content": asked.system})
    return _templated(asked, messages, services)


def _templated(
    asked: OllamaRequest, messages: list[dict[str, str]], services: Services
) -> TextRequest:
    return TextRequest(
        request_id=_request_id(),
        prompt=chat_prompt(services, messages, instead=_INSTEAD),
        # The template writes the special tokens, beginning of sequence included.
        add_special_tokens=False,
        sampling=sampling_params(asked.options, services),
    )


def _message(given: dict[str, Any], position: int) -> dict[str, str]:
    message = parse(given, Message, MESSAGE_RULES, where=f"messages[{position}]")
    return {"role": message.role, "content": message.content}


def _request_id() -> str:
    return f"ollama-{uuid.uuid4().hex}"

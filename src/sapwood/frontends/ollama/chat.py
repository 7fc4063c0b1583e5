"""POST /api/chat and /api/generate."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from sapwood.base.errors import InvalidRequest, UnsupportedFeature
from sapwood.frontends.ollama.models import check_model
from sapwood.frontends.ollama.protocol import (
    CHAT_FIELDS,
    GENERATE_FIELDS,
    MESSAGE_FIELDS,
    OllamaGenerateRequest,
    OllamaRequest,
)
from sapwood.frontends.ollama.sampling import sampling_params
from sapwood.frontends.ollama.stream import (
    FRAMING,
    Answer,
    PartFields,
    chat_fields,
    check_loaded,
    generate_fields,
    lines,
    whole,
)
from sapwood.frontends.serving.chat import Conversation, Turn, plan_turn
from sapwood.frontends.serving.media import MediaParts, Part, Piece, content_of
from sapwood.frontends.serving.sampling import renamed
from sapwood.frontends.serving.services import Services
from sapwood.frontends.serving.tools import ToolUse, openai_tools
from sapwood.http.body import read_json
from sapwood.http.errors import json_response, ollama_body
from sapwood.http.sse import EventStream, until_disconnect
from sapwood.schema.fields import parse
from sapwood.schema.logprobs import LogprobOptions
from sapwood.schema.request import RequestOptions
from sapwood.schema.unsupported import refuse
from sapwood.text.answer import AnswerShape
from sapwood.text.generation import TextRequest

_AT_ONCE = (0, "0", "0s", "0m", "0h")
_INSTEAD = "use /api/generate with raw=true"


async def chat(request: Request, services: Services) -> Response:
    started_s = services.clock.now_s()
    asked = parse(await read_json(request), CHAT_FIELDS)
    adapter = check_model(services, asked.model)
    turn = None
    if asked.messages:
        media = MediaParts(services.media_markers)
        messages = [_message(given, i, media) for i, given in enumerate(asked.messages)]
        tools = ToolUse(tools=openai_tools(asked.tools))
        turn = _templated(asked, messages, services, tools, media)
    return await _answer(request, services, asked, turn, adapter, chat_fields, started_s)


async def generate_text(request: Request, services: Services) -> Response:
    started_s = services.clock.now_s()
    asked = parse(await read_json(request), GENERATE_FIELDS)
    adapter = check_model(services, asked.model)
    turn = _of_prompt(asked, services) if asked.prompt or asked.images else None
    return await _answer(request, services, asked, turn, adapter, generate_fields, started_s)


async def _answer(
    request: Request,
    services: Services,
    asked: OllamaRequest,
    turn: Turn | None,
    adapter: str,
    fields: PartFields,
    started_s: float,
) -> Response:
    answer = Answer(services, fields, model=asked.model, started_s=started_s)
    if turn is None:
        sampling_params(asked.options, services, asked.format)
        if asked.keep_alive in _AT_ONCE:
            refuse(
                UnsupportedFeature(
                    "keep_alive=0 without a prompt asks to unload the model, but it stays loaded "
                    "as long as this server runs; stop the server instead",
                    param="keep_alive",
                )
            )
        check_loaded(services)
        return json_response(answer.loaded())
    is_raw = isinstance(asked, OllamaGenerateRequest) and asked.raw
    text_request = TextRequest(
        request_id=_request_id(),
        prompt=turn.prompt,
        media=turn.media,
        # The template writes the special tokens, beginning of sequence included.
        add_special_tokens=is_raw,
        options=RequestOptions(sampling=turn.sampling, logprobs=_logprobs(asked), adapter=adapter),
    )
    if asked.stream:
        return EventStream(lines(services, text_request, turn, answer), ollama_body, FRAMING)
    return json_response(
        await until_disconnect(whole(services, text_request, turn, answer), request.receive)
    )


def _logprobs(asked: OllamaRequest) -> LogprobOptions | None:
    """Without logprobs, Ollama takes no notice of top_logprobs."""
    if not asked.logprobs:
        return None
    try:
        return LogprobOptions(num_top=asked.top_logprobs)
    except InvalidRequest as error:
        raise renamed(error, {"num_top": "top_logprobs"}) from None


def _of_prompt(asked: OllamaGenerateRequest, services: Services) -> Turn:
    media = MediaParts(services.media_markers)
    if asked.raw:
        for name in ("system", "think"):
            if getattr(asked, name):
                raise InvalidRequest(
                    f"raw takes the prompt as it is, so {name} has no place; leave one of them out",
                    param=name,
                )
        sampling = sampling_params(asked.options, services, asked.format)
        # The client writes the markers itself.
        _shown("", asked.images, "images", media)
        return Turn(
            prompt=asked.prompt,
            sampling=sampling,
            shape=AnswerShape(),
            media=tuple(media.sources),
        )
    content = _shown(asked.prompt, asked.images, "images", media)
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if asked.system:
        messages.insert(0, {"role": "system", "content": asked.system})
    return _templated(asked, messages, services, ToolUse(), media)


def _templated(
    asked: OllamaRequest,
    messages: list[dict[str, Any]],
    services: Services,
    tools: ToolUse,
    media: MediaParts,
) -> Turn:
    goes_on = bool(messages) and messages[-1]["role"] == "assistant"
    is_word = isinstance(asked.think, str)
    conversation = Conversation(
        messages=messages,
        media=media.sources,
        tools=tools,
        goes_on=goes_on,
        goes_on_unasked=goes_on,
        thinks=None if asked.think is None else bool(asked.think),
        effort=str(asked.think) if is_word else None,
        thinking_field="think",
    )
    sampling = sampling_params(asked.options, services, asked.format)
    return plan_turn(services, conversation, sampling, instead=_INSTEAD)


def _message(given: dict[str, Any], position: int, media: MediaParts) -> dict[str, Any]:
    where = f"messages[{position}]"
    message = parse(given, MESSAGE_FIELDS, where=where)
    content = _shown(message.content, message.images, f"{where}.images", media)
    checked: dict[str, Any] = {"role": message.role, "content": content}
    if message.thinking is not None:
        checked["reasoning_content"] = message.thinking
    if message.tool_calls:
        checked["tool_calls"] = [
            _call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(message.tool_calls)
        ]
    if message.tool_name is not None:
        checked["name"] = message.tool_name
    if message.tool_call_id is not None:
        checked["tool_call_id"] = message.tool_call_id
    return checked


def _shown(text: str, images: Sequence[str], where: str, media: MediaParts) -> str | list[Part]:
    """The text after the pictures of its message, as Ollama puts them."""
    pieces: list[Piece] = [
        media.add("image", f"{where}[{i}]", url=_data_url(data)) for i, data in enumerate(images)
    ]
    return content_of([*pieces, text], joined_by="")


def _data_url(data: str) -> str:
    """Ollama takes base64 alone; a data URL is taken too. Nothing is fetched."""
    return data if not data or data.startswith("data:") else f"data:image/*;base64,{data}"


def _call(given: dict[str, Any], where: str) -> dict[str, Any]:
    """The call with its arguments as JSON text, the form in which all dialects pass them on."""
    function = given.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    arguments = function.get("arguments", {}) if isinstance(function, dict) else None
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise InvalidRequest(
            f"{where}.function must be an object with a name and an object of arguments",
            param=f"{where}.function",
        )
    text = json.dumps(arguments, ensure_ascii=False)
    call = {"type": "function", "function": {"name": name, "arguments": text}}
    return call | ({"id": given["id"]} if isinstance(given.get("id"), str) else {})


def _request_id() -> str:
    return f"ollama-{uuid.uuid4().hex}"

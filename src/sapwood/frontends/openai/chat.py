"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from sapwood.base.errors import InvalidRequest, UnsupportedFeature
from sapwood.frontends.common.body import read_json
from sapwood.frontends.common.errors import json_response, openai_body
from sapwood.frontends.common.fields import parse
from sapwood.frontends.common.generate import collect
from sapwood.frontends.common.services import WEIGHT_VERSION, Services
from sapwood.frontends.common.sse import EventStream, until_disconnect
from sapwood.frontends.openai.protocol import (
    CHAT_RULES,
    MESSAGE_RULES,
    PART_RULES,
    ChatRequest,
    Message,
    TextPart,
)
from sapwood.frontends.openai.sampling import (
    check_stream_options,
    namespace,
    request_ids,
    sampling_params,
)
from sapwood.frontends.openai.stream import EventEncoder, encoded_events, finish_fields, usage
from sapwood.text.generation import TextRequest


async def chat_completions(request: Request, services: Services) -> Response:
    asked = parse(await read_json(request), ChatRequest, CHAT_RULES)
    services.check_model(asked.model)
    check_stream_options(asked)
    text_request = to_text_request(asked, services)
    created = int(time.time())
    if asked.stream:
        encoder = EventEncoder(
            kind="chat",
            answer_id=text_request.request_id,
            created=created,
            model=services.model_name,
            options=asked.stream_options,
        )
        return EventStream(
            encoded_events(services, [text_request], encoder, opening=None), openai_body
        )
    [choices] = await until_disconnect(collect(services, [text_request]), request.receive)
    return json_response(
        {
            "id": text_request.request_id,
            "object": "chat.completion",
            "created": created,
            "model": services.model_name,
            "choices": [
                {"index": index, "message": {"role": "assistant", "content": choice.text}}
                | finish_fields(choice.finish)
                for index, choice in enumerate(choices)
            ],
            "usage": usage(choices, choices[:1]),
            "metadata": {"weight_version": WEIGHT_VERSION},
        }
    )


def to_text_request(asked: ChatRequest, services: Services) -> TextRequest:
    max_tokens, limit_name = _max_tokens(asked)
    if isinstance(asked.rid, list):
        raise InvalidRequest("rid must be one string, since a chat is one prompt", param="rid")
    request_id, _ = request_ids(asked, 1, "chatcmpl")
    return TextRequest(
        request_id=request_id,
        prompt=_prompt(asked, services),
        # The template writes the special tokens, beginning of sequence included.
        add_special_tokens=False,
        sampling=sampling_params(asked, services, max_tokens=max_tokens, limit_name=limit_name),
        n=asked.n,
        extra_key=namespace(asked),
        priority=asked.priority,
    )


def _max_tokens(asked: ChatRequest) -> tuple[int | None, str]:
    old, new = asked.max_tokens, asked.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise InvalidRequest(
            f"max_tokens is {old} but max_completion_tokens is {new}; send only the latter",
            param="max_tokens",
        )
    return (old, "max_tokens") if new is None else (new, "max_completion_tokens")


def _prompt(asked: ChatRequest, services: Services) -> str:
    if services.template is None:
        raise UnsupportedFeature(
            "this model has no chat template; use /v1/completions, or start the server with "
            "--chat-template"
        )
    messages = [_message(given, i) for i, given in enumerate(asked.messages)]
    if asked.continue_final_message and messages and messages[-1]["role"] != "assistant":
        raise InvalidRequest(
            "continue_final_message needs the last of messages to be the assistant's, but it is "
            f"of role {messages[-1]['role']!r}",
            param="messages",
        )
    add_generation_prompt = asked.add_generation_prompt
    if add_generation_prompt is None:
        add_generation_prompt = not asked.continue_final_message
    return services.template.render(
        messages,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=asked.continue_final_message,
        **asked.chat_template_kwargs,
    )


def _message(given: dict[str, Any], position: int) -> dict[str, Any]:
    """One message with its fields checked, as the template takes it."""
    where = f"messages[{position}]"
    message = parse(given, Message, MESSAGE_RULES, where=where)
    if message.content is None and not message.tool_calls:
        raise InvalidRequest(f"{where}.content is required", param=f"{where}.content")
    # "developer" is OpenAI's newer word for the system role; templates know the older one.
    checked: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role}
    if isinstance(message.content, list):
        checked["content"] = [
            _text_part(part, f"{where}.content[{i}]") for i, part in enumerate(message.content)
        ]
    elif message.content is not None:
        checked["content"] = message.content
    for name in ("name", "tool_call_id", "reasoning_content"):
        value = getattr(message, name)
        if value is not None:
            checked[name] = value
    if message.tool_calls:
        checked["tool_calls"] = message.tool_calls
    return checked


def _text_part(given: dict[str, Any], where: str) -> dict[str, str]:
    kind = given.get("type")
    if isinstance(kind, str) and kind != "text":
        raise UnsupportedFeature(
            f"{where} is of type {kind!r}, but this server takes only parts of type 'text'",
            param=where,
        )
    return {"type": "text", "text": parse(given, TextPart, PART_RULES, where=where).text}

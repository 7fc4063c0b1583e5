"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from sapwood.base.errors import InvalidRequest
from sapwood.frontends.openai.logprobs import chat_options, choice_logprobs
from sapwood.frontends.openai.parts import chat_part
from sapwood.frontends.openai.protocol import (
    CHAT_FIELDS,
    MESSAGE_FIELDS,
    ChatRequest,
)
from sapwood.frontends.openai.sampling import (
    check_stream_options,
    handovers,
    request_ids,
    request_options,
    sampling_params,
)
from sapwood.frontends.openai.stream import (
    EventEncoder,
    answer_field,
    encoded_turn,
    finish_fields,
    hidden_field,
    routed_field,
    usage,
)
from sapwood.frontends.serving.chat import Conversation, Turn, collect_turn, plan_turn
from sapwood.frontends.serving.media import MediaParts
from sapwood.frontends.serving.services import Services
from sapwood.frontends.serving.tools import openai_tool_use
from sapwood.http.body import read_json
from sapwood.http.errors import json_response, openai_body
from sapwood.http.routing import routing_key
from sapwood.http.sse import EventStream, until_disconnect
from sapwood.schema.fields import parse
from sapwood.text.events import Answer
from sapwood.text.generation import TextRequest


async def chat_completions(request: Request, services: Services) -> Response:
    return await answer_chat(parse(await read_json(request), CHAT_FIELDS), request, services)


async def answer_chat(asked: ChatRequest, request: Request, services: Services) -> Response:
    """request: the HTTP request, whose body has been read"""
    services.adapter_of(asked.model)
    check_stream_options(asked)
    turn = to_turn(asked, services)
    text_request = to_text_request(asked, turn, services, routing_key(request, asked.routing_key))
    created = int(time.time())
    if asked.stream:
        encoder = EventEncoder(
            kind="chat",
            answer_id=text_request.request_id,
            created=created,
            model=services.model_name,
            options=asked.stream_options,
            tells_cache=asked.return_cached_tokens_details,
        )
        return EventStream(encoded_turn(services, text_request, turn, encoder), openai_body)
    samples = await until_disconnect(collect_turn(services, text_request, turn), request.receive)
    choices = [choice for choice, _ in samples]
    logprobs = [
        await choice_logprobs("chat", text_request, services.tokenizer, choice)
        for choice in choices
    ]
    routed = [await routed_field(asked.return_routed_experts, choice) for choice in choices]
    return json_response(
        {
            "id": text_request.request_id,
            "object": "chat.completion",
            "created": created,
            "model": services.model_name,
            "choices": [
                {"index": index, "message": _answer(sample.answer, turn)}
                | finish_fields(
                    choice.last.finish,
                    logprobs[index],
                    sample.finish_reason(choice.last.finish),
                )
                | hidden_field(asked.return_hidden_states, choice)
                | (routed[index] if index else {})
                for index, (choice, sample) in enumerate(samples)
            ],
            "usage": usage(choices, choices[:1]),
            "metadata": {"weight_version": services.served.version},
        }
        | answer_field(routed[0], asked.return_cached_tokens_details, choices[:1])
    )


def _answer(answer: Answer, turn: Turn) -> dict[str, Any]:
    """The assistant's message. Its content is null if there are only calls."""
    content = answer.content if answer.content or not answer.calls else None
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if turn.shape.reasoning is not None:
        message["reasoning_content"] = answer.reasoning or None
    if answer.calls:
        message["tool_calls"] = [
            {
                "id": call.call_id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in answer.calls
        ]
    return message


def to_turn(asked: ChatRequest, services: Services) -> Turn:
    """The request as a turn, ready for the engine.

    Raises InvalidRequest or UnsupportedFeature, which name the field.
    """
    max_tokens, limit_name = _max_tokens(asked)
    sampling = sampling_params(asked, services, max_tokens=max_tokens, limit_name=limit_name)
    media = MediaParts(services.media_markers)
    messages = [chat_message(given, i, media) for i, given in enumerate(asked.messages)]
    if asked.continue_final_message and messages and messages[-1]["role"] != "assistant":
        raise InvalidRequest(
            "continue_final_message needs the last of messages to be the assistant's, but it is "
            f"of role {messages[-1]['role']!r}",
            param="messages",
        )
    add_generation_prompt = asked.add_generation_prompt
    if add_generation_prompt is None:
        add_generation_prompt = not asked.continue_final_message
    conversation = Conversation(
        messages=messages,
        media=media.sources,
        tools=openai_tool_use(asked.tools, asked.tool_choice, asked.parallel_tool_calls),
        documents=asked.documents,
        options=asked.chat_template_kwargs,
        add_generation_prompt=add_generation_prompt,
        goes_on=asked.continue_final_message,
        takes_apart=asked.separate_reasoning,
        streams_reasoning=asked.stream_reasoning,
        effort=asked.reasoning_effort,
        thinking_budget=asked.thinking_budget,
    )
    turn = plan_turn(services, conversation, sampling, instead="use /v1/completions")
    return replace(turn, tells_cut_calls=True)


def to_text_request(
    asked: ChatRequest, turn: Turn, services: Services, key: str = ""
) -> TextRequest:
    """key: the routing key"""
    if isinstance(asked.rid, list):
        raise InvalidRequest("rid must be one string, since a chat is one prompt", param="rid")
    request_id, _ = request_ids(asked, 1, "chatcmpl")
    return TextRequest(
        request_id=request_id,
        prompt=turn.prompt,
        media=turn.media,
        # The template writes the special tokens, beginning of sequence included.
        add_special_tokens=asked.add_special_tokens is True,
        options=request_options(asked, turn.sampling, chat_options(asked), key, services)[0],
        n=asked.n,
        handovers=handovers(asked, 1)[0],
    )


def _max_tokens(asked: ChatRequest) -> tuple[int | None, str]:
    old, new = asked.max_tokens, asked.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise InvalidRequest(
            f"max_tokens is {old} but max_completion_tokens is {new}; send only the latter",
            param="max_tokens",
        )
    return (old, "max_tokens") if new is None else (new, "max_completion_tokens")


def chat_message(given: dict[str, Any], position: int, media: MediaParts) -> dict[str, Any]:
    """One message in the template's form, its fields checked.

    media  takes its pictures and videos
    """
    where = f"messages[{position}]"
    message = parse(given, MESSAGE_FIELDS, where=where)
    if message.content is None and not message.tool_calls:
        raise InvalidRequest(f"{where}.content is required", param=f"{where}.content")
    checked: dict[str, Any] = {"role": message.role}
    if isinstance(message.content, list):
        checked["content"] = [
            chat_part(part, f"{where}.content[{i}]", media)
            for i, part in enumerate(message.content)
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

"""POST /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

import uuid

from starlette.requests import Request
from starlette.responses import Response

from sapwood.base.errors import InvalidRequest
from sapwood.frontends.anthropic.errors import anthropic_statuses
from sapwood.frontends.anthropic.prompt import to_turn
from sapwood.frontends.anthropic.protocol import (
    COUNT_FIELDS,
    MESSAGES_FIELDS,
    MessagesRequest,
)
from sapwood.frontends.anthropic.stream import FRAMING, blocks, encoded_events, message
from sapwood.frontends.serving.chat import Turn, collect_turn
from sapwood.frontends.serving.sampling import over_defaults, renamed
from sapwood.frontends.serving.services import Services
from sapwood.http.body import read_json
from sapwood.http.errors import anthropic_body, json_response
from sapwood.http.sse import EventStream, until_disconnect
from sapwood.schema.fields import parse
from sapwood.schema.request import RequestOptions
from sapwood.schema.sampling import SamplingParams
from sapwood.text.generation import TextRequest

MAX_TEMPERATURE = 1.0


async def create_message(request: Request, services: Services) -> Response:
    asked = parse(await read_json(request), MESSAGES_FIELDS)
    adapter = services.adapter_of(asked.model)
    turn = to_turn(asked, services, _sampling_params(asked, services))
    text_request = to_text_request(turn, adapter)
    if asked.stream:
        return EventStream(encoded_events(services, text_request, turn), anthropic_body, FRAMING)
    with anthropic_statuses():
        [(choice, sample)] = await until_disconnect(
            collect_turn(services, text_request, turn), request.receive
        )
    content = blocks(sample.answer)
    answer = message(text_request.request_id, services.model_name, choice, content, sample)
    return json_response(answer)


async def count_tokens(request: Request, services: Services) -> Response:
    """The number of prompt tokens, also of a prompt that would be refused as too long."""
    asked = parse(await read_json(request), COUNT_FIELDS)
    services.adapter_of(asked.model)
    turn = to_turn(asked, services, SamplingParams())
    count = await services.generator.count_prompt(to_text_request(turn, adapter=""))
    return json_response({"input_tokens": count})


def to_text_request(turn: Turn, adapter: str) -> TextRequest:
    return TextRequest(
        request_id=f"msg_{uuid.uuid4().hex}",
        prompt=turn.prompt,
        media=turn.media,
        # The template writes the special tokens, beginning of sequence included.
        add_special_tokens=False,
        options=RequestOptions(sampling=turn.sampling, adapter=adapter),
    )


def _sampling_params(asked: MessagesRequest, services: Services) -> SamplingParams:
    """The request's sampling parameters, else the model's defaults, else no restriction."""
    temperature = asked.temperature
    if temperature is not None and temperature > MAX_TEMPERATURE:
        raise InvalidRequest(
            f"temperature is {temperature} but must be in [0.0, {MAX_TEMPERATURE}]",
            param="temperature",
        )
    chosen = over_defaults(
        services.default_sampling,
        temperature=temperature,
        top_p=asked.top_p,
        top_k=-1 if asked.top_k == 0 else asked.top_k,
    )
    try:
        return SamplingParams(
            max_new_tokens=asked.max_tokens,
            stop=tuple(asked.stop_sequences),
            **chosen,  # type: ignore[arg-type]
        )
    except InvalidRequest as error:
        raise renamed(error, {"stop": "stop_sequences"}) from None

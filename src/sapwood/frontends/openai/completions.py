"""POST /v1/completions."""

from __future__ import annotations

import time

from starlette.requests import Request
from starlette.responses import Response

from sapwood.base.errors import InvalidRequest, UnsupportedFeature
from sapwood.frontends.openai.logprobs import choice_logprobs, completion_options
from sapwood.frontends.openai.protocol import COMPLETION_FIELDS, CompletionRequest
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
    encoded_events,
    finish_fields,
    hidden_field,
    routed_field,
    usage,
)
from sapwood.frontends.serving.generate import collect
from sapwood.frontends.serving.services import Services
from sapwood.http.body import read_json
from sapwood.http.errors import json_response, openai_body
from sapwood.http.routing import routing_key
from sapwood.http.sse import EventStream, until_disconnect
from sapwood.schema.fields import parse
from sapwood.schema.unsupported import refuse
from sapwood.text.absent import AbsentTokenizer, refuse_text
from sapwood.text.generation import TextRequest

DEFAULT_MAX_TOKENS = 16

Prompt = str | list[int]


async def completions(request: Request, services: Services) -> Response:
    asked = parse(await read_json(request), COMPLETION_FIELDS)
    services.adapter_of(asked.model)
    if isinstance(services.tokenizer, AbsentTokenizer):
        refuse_text("a completion", param="prompt")
    check_stream_options(asked)
    key = routing_key(request, asked.routing_key)
    answer_id, requests = to_text_requests(asked, services, key)
    opening = [_echo(request.prompt, services) if asked.echo else "" for request in requests]
    created = int(time.time())
    if asked.stream:
        encoder = EventEncoder(
            kind="text",
            answer_id=answer_id,
            created=created,
            model=services.model_name,
            options=asked.stream_options,
            tells_cache=asked.return_cached_tokens_details,
        )
        return EventStream(
            encoded_events(services, requests, encoder, opening=opening), openai_body
        )
    by_prompt = await until_disconnect(collect(services, requests), request.receive)
    samples = [choice for choices in by_prompt for choice in choices]
    logprobs = [
        await choice_logprobs("text", one, services.tokenizer, choice, text)
        for one, text, choices in zip(requests, opening, by_prompt, strict=True)
        for choice in choices
    ]
    routed = [await routed_field(asked.return_routed_experts, choice) for choice in samples]
    return json_response(
        {
            "id": answer_id,
            "object": "text_completion",
            "created": created,
            "model": services.model_name,
            "choices": [
                {"index": index, "text": opening[index // asked.n] + choice.whole.text}
                | finish_fields(choice.last.finish, logprobs[index])
                | hidden_field(asked.return_hidden_states, choice)
                | (routed[index] if index else {})
                for index, choice in enumerate(samples)
            ],
            "usage": usage(samples, samples[:: asked.n]),
            "metadata": {"weight_version": services.served.version},
        }
        | answer_field(routed[0], asked.return_cached_tokens_details, samples[:: asked.n])
    )


def to_text_requests(
    asked: CompletionRequest, services: Services, key: str
) -> tuple[str, list[TextRequest]]:
    """(the answer's id, one text request per prompt)

    key  the routing key of all these requests
    """
    if asked.best_of is not None and asked.best_of != asked.n:
        refuse(
            UnsupportedFeature(
                f"best_of is {asked.best_of} but must equal n, which is {asked.n}; leave it out",
                param="best_of",
            )
        )
    prompts = _prompts(asked.prompt)
    answer_id, ids = request_ids(asked, len(prompts), "cmpl")
    max_tokens = DEFAULT_MAX_TOKENS if asked.max_tokens is None else asked.max_tokens
    sampling = sampling_params(asked, services, max_tokens=max_tokens, limit_name="max_tokens")
    options = request_options(
        asked, sampling, completion_options(asked), key, services, len(prompts)
    )
    return answer_id, [
        TextRequest(
            request_id=request_id,
            prompt=prompt,
            add_special_tokens=asked.add_special_tokens is not False,
            options=of_prompt,
            n=asked.n,
            handovers=places,
        )
        for request_id, prompt, of_prompt, places in zip(
            ids, prompts, options, handovers(asked, len(prompts)), strict=True
        )
    ]


def _prompts(prompt: str | list[str | int | list[int]]) -> list[Prompt]:
    """A text, one prompt's token ids, or a list of texts and lists of token ids."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise InvalidRequest("prompt is an empty list; send at least one prompt", param="prompt")
    token_ids = [item for item in prompt if isinstance(item, int)]
    if len(token_ids) == len(prompt):
        return [token_ids]
    if token_ids:
        raise InvalidRequest(
            "prompt mixes token ids with prompts; send one list of token ids, or a list of prompts",
            param="prompt",
        )
    for position, item in enumerate(prompt):
        if not item and isinstance(item, list):
            raise InvalidRequest(f"prompt[{position}] has no token ids", param="prompt")
    return [item for item in prompt if not isinstance(item, int)]


def _echo(prompt: Prompt, services: Services) -> str:
    return prompt if isinstance(prompt, str) else services.tokenizer.decode(prompt)

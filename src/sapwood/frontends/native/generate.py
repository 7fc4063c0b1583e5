"""POST and PUT /generate: SGLang's own way to ask for text."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from sapwood.base.errors import InvalidRequest
from sapwood.frontends.common.body import read_json
from sapwood.frontends.common.errors import json_response, native_body
from sapwood.frontends.common.fields import parse
from sapwood.frontends.common.generate import Choice, collect, generate
from sapwood.frontends.common.sampling import renamed, stop_strings
from sapwood.frontends.common.services import WEIGHT_VERSION, Services
from sapwood.frontends.common.sse import EventStream, event, until_disconnect
from sapwood.frontends.native.protocol import (
    GENERATE_RULES,
    SAMPLING_RULES,
    GenerateRequest,
    SamplingFields,
)
from sapwood.schema.output import Finish
from sapwood.schema.sampling import SamplingParams
from sapwood.text.generation import TextRequest

Prompt = str | list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What one call asked for.

    is_list  the answer is a list, since the prompts were one or n is more than 1
    """

    requests: list[TextRequest]
    is_list: bool

    @property
    def num_samples(self) -> int:
        """Samples per prompt; the same for all of them."""
        return self.requests[0].n


async def generate_text(request: Request, services: Services) -> Response:
    started_s = services.clock.now_s()
    asked = parse(await read_json(request), GenerateRequest, GENERATE_RULES)
    batch = to_batch(asked)
    if asked.stream:
        return EventStream(_events(services, batch, started_s), native_body)
    by_prompt = await until_disconnect(collect(services, batch.requests), request.receive)
    latency_s = services.clock.now_s() - started_s
    answers = [
        _answer(choice, choice.text, _sample_id(one, k), latency_s)
        for one, choices in zip(batch.requests, by_prompt, strict=True)
        for k, choice in enumerate(choices)
    ]
    return json_response(answers if batch.is_list else answers[0])


def to_batch(asked: GenerateRequest) -> Batch:
    prompts, is_list = _prompts(asked)
    sampling = [
        _sampling(given, where)
        for given, where in _per_prompt(asked.sampling_params, len(prompts), "sampling_params")
    ]
    if len({n for _, n in sampling}) > 1:
        raise InvalidRequest(
            "sampling_params have different n within one batch; send one batch per n",
            param="sampling_params.n",
        )
    extra_keys = _per_prompt(asked.extra_key, len(prompts), "extra_key")
    ids = _request_ids(asked.rid, len(prompts))
    requests = [
        TextRequest(
            request_id=ids[i],
            prompt=prompt,
            sampling=sampling[i][0],
            n=sampling[i][1],
            extra_key=extra_keys[i][0],
            priority=asked.priority,
        )
        for i, prompt in enumerate(prompts)
    ]
    return Batch(requests=requests, is_list=is_list or requests[0].n > 1)


def _prompts(asked: GenerateRequest) -> tuple[Sequence[Prompt], bool]:
    """The prompts, and whether they came as a list."""
    if (asked.text is None) == (asked.input_ids is None):
        raise InvalidRequest("exactly one of text and input_ids is required", param="text")
    if isinstance(asked.text, str):
        return [asked.text], False
    name, given = ("text", asked.text) if asked.text is not None else ("input_ids", asked.input_ids)
    if not given:
        raise InvalidRequest(f"{name} is an empty list; send at least one prompt", param=name)
    token_ids = [item for item in given if isinstance(item, int)]
    if len(token_ids) == len(given):
        return [token_ids], False
    if token_ids:
        raise InvalidRequest(
            "input_ids mixes token ids with lists of them; send one list, or a list of lists",
            param=name,
        )
    for position, item in enumerate(given):
        if isinstance(item, list) and not item:
            raise InvalidRequest(f"{name}[{position}] has no token ids", param=name)
    return [item for item in given if not isinstance(item, int)], True


def _per_prompt(given: Any, num_prompts: int, name: str) -> list[tuple[Any, str]]:
    """One value per prompt, each with its path; a single value is for all of them."""
    if not isinstance(given, list):
        return [(given, name)] * num_prompts
    if len(given) != num_prompts:
        raise InvalidRequest(
            f"{name} has {len(given)} entries but there are {num_prompts} prompts", param=name
        )
    return [(value, f"{name}[{i}]") for i, value in enumerate(given)]


def _request_ids(rid: str | list[str] | None, num_prompts: int) -> list[str]:
    if rid is None:
        return [uuid.uuid4().hex for _ in range(num_prompts)]
    ids = [rid] if isinstance(rid, str) else rid
    if not all(ids):
        raise InvalidRequest("rid has an empty string; leave rid out", param="rid")
    if isinstance(rid, str) and num_prompts > 1:
        return [f"{rid}-{i}" for i in range(num_prompts)]
    if len(ids) != num_prompts:
        raise InvalidRequest(
            f"rid has {len(ids)} entries but there are {num_prompts} prompts", param="rid"
        )
    return ids


def _sampling(given: dict[str, Any], where: str) -> tuple[SamplingParams, int]:
    """The sampling parameters and n."""
    fields = parse(given, SamplingFields, SAMPLING_RULES, where=where)
    try:
        params = SamplingParams(
            max_new_tokens=fields.max_new_tokens,
            min_new_tokens=fields.min_new_tokens,
            temperature=fields.temperature,
            top_k=fields.top_k,
            top_p=fields.top_p,
            min_p=fields.min_p,
            frequency_penalty=fields.frequency_penalty,
            presence_penalty=fields.presence_penalty,
            repetition_penalty=fields.repetition_penalty,
            logit_bias=fields.logit_bias,
            seed=fields.sampling_seed,
            stop=stop_strings(fields.stop),
            stop_token_ids=tuple(fields.stop_token_ids),
            ignore_eos=fields.ignore_eos,
            no_stop_trim=fields.no_stop_trim,
            skip_special_tokens=fields.skip_special_tokens,
            spaces_between_special_tokens=fields.spaces_between_special_tokens,
        )
    except InvalidRequest as error:
        raise renamed(error, {"seed": "sampling_seed"}, where=where) from None
    return params, fields.n


async def _events(
    services: Services, batch: Batch, started_s: float
) -> AsyncGenerator[bytes, None]:
    """An event per chunk; text and output_ids are all of the output so far, as SGLang sends it."""
    choices = [Choice() for _ in range(len(batch.requests) * batch.num_samples)]
    texts = [""] * len(choices)
    async with aclosing(generate(services, batch.requests)) as chunks:
        async for position, chunk in chunks:
            index = position * batch.num_samples + chunk.index
            so_far = choices[index]
            so_far.count(chunk)
            so_far.token_ids.extend(chunk.token_ids)
            texts[index] += chunk.text
            answer = _answer(
                so_far,
                texts[index],
                _sample_id(batch.requests[position], chunk.index),
                services.clock.now_s() - started_s,
            )
            if batch.is_list:
                answer["index"] = index
            yield event(answer)


def _sample_id(request: TextRequest, sample: int) -> str:
    return request.request_id if request.n == 1 else f"{request.request_id}-{sample}"


def _answer(choice: Choice, text: str, sample_id: str, latency_s: float) -> dict[str, Any]:
    return {
        "text": text,
        "output_ids": choice.token_ids,
        "meta_info": {
            "id": sample_id,
            "finish_reason": _finish_reason(choice.finish, choice.num_output_tokens),
            "prompt_tokens": choice.num_prompt_tokens,
            "completion_tokens": choice.num_output_tokens,
            "cached_tokens": choice.num_cached_tokens,
            "weight_version": WEIGHT_VERSION,
            "e2e_latency": latency_s,
            "queue_time": choice.queue_time_s,
        },
    }


def _finish_reason(finish: Finish | None, num_output_tokens: int) -> dict[str, object] | None:
    if finish is None:
        return None
    if finish.kind == "length":
        return {"type": "length", "length": num_output_tokens}
    if finish.kind == "stop":
        return {"type": "stop", "matched": finish.matched}
    return {"type": "abort", "message": finish.message or "aborted"}

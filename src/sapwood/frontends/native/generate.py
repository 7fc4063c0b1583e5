"""POST and PUT /generate: SGLang's own way to ask for text."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from sapwood.base.errors import InvalidRequest
from sapwood.frontends.native.input_embeds import prompts_of_vectors
from sapwood.frontends.native.logprobs import LogprobLists, logprob_options
from sapwood.frontends.native.media import media_by_prompt
from sapwood.frontends.native.protocol import (
    GENERATE_FIELDS,
    SAMPLING_FIELDS,
    GenerateRequest,
    NativeSampling,
)
from sapwood.frontends.native.sessions import in_sessions
from sapwood.frontends.serving.generate import (
    Choice,
    cached_by_tier,
    collect,
    generate,
    media_tokens,
)
from sapwood.frontends.serving.grammar import chosen_grammar
from sapwood.frontends.serving.hidden_states import encoded_hidden_states
from sapwood.frontends.serving.routed_experts import encoded_routed_experts
from sapwood.frontends.serving.sampling import params_of, renamed
from sapwood.frontends.serving.services import Services
from sapwood.http.body import read_json
from sapwood.http.errors import json_response, native_body
from sapwood.http.routing import routing_key
from sapwood.http.sse import EventStream, event, until_disconnect
from sapwood.schema.fields import parse
from sapwood.schema.handover import handovers_of
from sapwood.schema.logprobs import LogprobOptions
from sapwood.schema.namespace import cache_namespace
from sapwood.schema.output import Finish
from sapwood.schema.request import RequestOptions
from sapwood.schema.sampling import SamplingParams
from sapwood.text.absent import AbsentTokenizer
from sapwood.text.generation import TextChunk, TextRequest
from sapwood.text.token_names import TokenNames


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt: a text, token ids, or embeddings."""

    text: str | list[int] = ""
    vectors: Sequence[bytes] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The requests of one call.

    is_list    whether the answer is a list: the prompts came as a list, or n is more than 1
    has_texts  whether log probabilities come with the texts of their tokens
    """

    requests: list[TextRequest]
    is_list: bool
    has_texts: bool = False

    @property
    def num_samples(self) -> int:
        """Number of samples per prompt, which is the same for all prompts."""
        return self.requests[0].n


async def generate_text(request: Request, services: Services) -> Response:
    started_s = services.clock.now_s()
    asked = parse(await read_json(request), GENERATE_FIELDS)
    batch = await in_session(asked, services, routing_key(request, asked.routing_key))
    if asked.stream:
        return EventStream(_events(services, batch, started_s), native_body)
    answers = await until_disconnect(whole_answers(services, batch, started_s), request.receive)
    return json_response(answers if batch.is_list else answers[0])


async def whole_answers(services: Services, batch: Batch, started_s: float) -> list[dict[str, Any]]:
    """One answer per sample; the samples of the first prompt come first."""
    with _own_names():
        by_prompt = await collect(services, batch.requests)
    latency_s = services.clock.now_s() - started_s
    answers: list[dict[str, Any]] = []
    for request, choices in zip(batch.requests, by_prompt, strict=True):
        for k, choice in enumerate(choices):
            lists = _lists(request, batch, services)
            if lists is not None:
                await _add(lists, choice.whole)
            answer = _answer(services, choice, _sample_id(request, k), latency_s, lists)
            await _tell_of_tokens(answer, request, choice)
            answers.append(answer)
    return answers


async def in_session(asked: GenerateRequest, services: Services, key: str = "") -> Batch:
    """`to_batch`; requests of sessions get their whole prompts, and are turns from now on."""
    batch = to_batch(asked, services, key)
    if not asked.session_params:
        return batch
    fields = _per_prompt(asked.session_params, len(batch.requests), "session_params")
    return replace(batch, requests=await in_sessions(batch.requests, fields, services))


def to_batch(asked: GenerateRequest, services: Services, key: str = "") -> Batch:
    """The requests that a call's body asks for.

    key  the routing key of all these requests
    """
    prompts, is_list = _prompts(asked)
    processors = _per_prompt(asked.custom_logit_processor, len(prompts), "custom_logit_processor")
    sampling = [
        _sampling({**services.preferred_sampling, **given}, where, processors[i][0])
        for i, (given, where) in enumerate(
            _per_prompt(asked.sampling_params, len(prompts), "sampling_params")
        )
    ]
    if len({fields.n for _, fields in sampling}) > 1:
        raise InvalidRequest(
            "sampling_params have different n within one batch; send one batch per n",
            param="sampling_params.n",
        )
    logprobs = _logprobs(asked, len(prompts))
    adapters = [
        services.adapter_of(asked.model, name)
        for name, _ in _per_prompt(asked.lora_path, len(prompts), "lora_path")
    ]
    namespaces = [
        cache_namespace(key) for key, _ in _per_prompt(asked.extra_key, len(prompts), "extra_key")
    ]
    wants_hidden = _per_prompt(asked.return_hidden_states, len(prompts), "return_hidden_states")
    wants_routed = _per_prompt(asked.return_routed_experts, len(prompts), "return_routed_experts")
    ids = _request_ids(asked.rid, len(prompts))
    media = media_by_prompt(
        asked.image_data, asked.video_data, len(prompts), services, is_list=is_list
    )
    places = handovers_of(
        asked.bootstrap_host,
        asked.bootstrap_port,
        asked.bootstrap_room,
        num_prompts=len(prompts),
        num_samples=sampling[0][1].n,
    )
    with _own_names():
        requests = [
            TextRequest(
                request_id=ids[i],
                prompt=prompt.text,
                input_embeds=prompt.vectors,
                media=media[i],
                options=RequestOptions(
                    return_hidden_states=wants_hidden[i][0],
                    return_routed_experts=wants_routed[i][0],
                    sampling=sampling[i][0],
                    logprobs=logprobs[i],
                    namespace=namespaces[i],
                    adapter=adapters[i],
                    priority=asked.priority,
                    routing_key=key,
                    data_parallel_rank=services.replica_of(asked.data_parallel_rank),
                ),
                n=sampling[i][1].n,
                stream_interval=sampling[i][1].stream_interval,
                handovers=places[i],
            )
            for i, prompt in enumerate(prompts)
        ]
    return Batch(
        requests=requests,
        is_list=is_list or requests[0].n > 1,
        has_texts=asked.return_text_in_logprobs,
    )


def _logprobs(asked: GenerateRequest, num_prompts: int) -> list[LogprobOptions | None]:
    """The log probabilities that each prompt's fields ask for."""
    token_ids: Any = asked.token_ids_logprob
    is_for_all = all(isinstance(token_id, int) for token_id in token_ids)
    each = [token_ids] * num_prompts
    if not is_for_all:
        each = [given for given, _ in _per_prompt(token_ids, num_prompts, "token_ids_logprob")]
        if any(isinstance(given, int) for given in each):
            raise InvalidRequest(
                "token_ids_logprob mixes token ids with lists of them; send one list, or a list "
                "per prompt",
                param="token_ids_logprob",
            )
    wanted = _per_prompt(asked.return_logprob, num_prompts, "return_logprob")
    starts = _per_prompt(asked.logprob_start_len, num_prompts, "logprob_start_len")
    num_tops = _per_prompt(asked.top_logprobs_num, num_prompts, "top_logprobs_num")
    return [
        logprob_options(wanted[i][0], starts[i][0], num_tops[i][0], each[i])
        for i in range(num_prompts)
    ]


def _prompts(asked: GenerateRequest) -> tuple[Sequence[Prompt], bool]:
    """(the prompts, whether they came as a list)"""
    if sum(prompt is not None for prompt in (asked.text, asked.input_ids, asked.input_embeds)) != 1:
        raise InvalidRequest(
            "exactly one of text, input_ids and input_embeds is required", param="text"
        )
    if asked.input_embeds is not None:
        prompts, is_list = prompts_of_vectors(asked.input_embeds)
        return [Prompt(vectors=vectors) for vectors in prompts], is_list
    if isinstance(asked.text, str):
        return [Prompt(asked.text)], False
    name, given = ("text", asked.text) if asked.text is not None else ("input_ids", asked.input_ids)
    if not given:
        raise InvalidRequest(f"{name} is an empty list; send at least one prompt", param=name)
    token_ids = [item for item in given if isinstance(item, int)]
    if len(token_ids) == len(given):
        return [Prompt(token_ids)], False
    if token_ids:
        raise InvalidRequest(
            "input_ids mixes token ids with lists of them; send one list, or a list of lists",
            param=name,
        )
    for position, item in enumerate(given):
        if isinstance(item, list) and not item:
            raise InvalidRequest(f"{name}[{position}] has no token ids", param=name)
    return [Prompt(item) for item in given if not isinstance(item, int)], True


def _per_prompt(given: Any, num_prompts: int, name: str) -> list[tuple[Any, str]]:
    """One (value, path in the body) per prompt; a single value holds for all prompts."""
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


def _sampling(
    given: dict[str, Any], where: str, processor: str | None
) -> tuple[SamplingParams, NativeSampling]:
    """(the sampling parameters, the fields that they came from)"""
    fields = parse(given, SAMPLING_FIELDS, where=where)
    grammar = chosen_grammar(
        json_schema=fields.json_schema,
        regex=fields.regex,
        ebnf=fields.ebnf,
        structural_tag=fields.structural_tag,
        where=where,
    )
    custom = params_of(processor, fields.custom_params, f"{where}.custom_params")
    try:
        params = SamplingParams(
            max_new_tokens=fields.max_new_tokens,
            min_new_tokens=fields.min_new_tokens,
            seed=fields.sampling_seed,
            custom_logit_processor=processor,
            custom_params=custom,
            grammar=grammar,
            **fields.given(),
        )
    except InvalidRequest as error:
        raise renamed(error, {"seed": "sampling_seed"}, where=where) from None
    return params, fields


async def _events(
    services: Services, batch: Batch, started_s: float
) -> AsyncGenerator[bytes, None]:
    async with aclosing(answers_so_far(services, batch, started_s)) as answers:
        async for answer in answers:
            yield event(answer)


async def answers_so_far(
    services: Services, batch: Batch, started_s: float
) -> AsyncGenerator[dict[str, Any], None]:
    """An answer per chunk, each with all of text and output_ids so far, as in SGLang; its
    --stream-output leaves only the new output_ids.

    What is told of tokens comes with the last one only: in every one it would be gigabytes."""
    choices = [Choice() for _ in range(len(batch.requests) * batch.num_samples)]
    lists = [
        _lists(request, batch, services) for request in batch.requests for _ in range(request.n)
    ]
    with _own_names():
        async with aclosing(generate(services, batch.requests, keeps_logprobs=True)) as chunks:
            async for position, chunk in chunks:
                index = position * batch.num_samples + chunk.index
                so_far = choices[index]
                so_far.add(chunk)
                so_far_lists = lists[index]
                if so_far_lists is not None:
                    await _add(so_far_lists, chunk)
                answer = _answer(
                    services,
                    so_far,
                    _sample_id(batch.requests[position], chunk.index),
                    services.clock.now_s() - started_s,
                    so_far_lists,
                )
                if chunk.finish is not None:
                    await _tell_of_tokens(answer, batch.requests[position], so_far)
                if services.options.get("stream_output"):
                    answer["output_ids"] = chunk.token_ids
                if batch.is_list:
                    answer["index"] = index
                yield answer


async def _tell_of_tokens(answer: dict[str, Any], request: TextRequest, choice: Choice) -> None:
    """Add what the request asks for of every token to the answer of a finished sample."""
    if request.options.return_hidden_states:
        answer["meta_info"]["hidden_states"] = await encoded_hidden_states(choice)
    if request.options.return_routed_experts:
        answer["meta_info"]["routed_experts"] = await encoded_routed_experts(choice)


def _sample_id(request: TextRequest, sample: int) -> str:
    return request.request_id if request.n == 1 else f"{request.request_id}-{sample}"


def _lists(request: TextRequest, batch: Batch, services: Services) -> LogprobLists | None:
    if request.options.logprobs is None:
        return None
    names = TokenNames(services.tokenizer.texts) if batch.has_texts else None
    return LogprobLists(request.options.logprobs, names)


async def _add(lists: LogprobLists, chunk: TextChunk) -> None:
    if chunk.prompt is not None:
        await lists.add_prompt(chunk.prompt)
    if chunk.logprobs is not None:
        await lists.add_output(chunk.token_ids, chunk.logprobs)


@contextmanager
def _own_names() -> Iterator[None]:
    """Errors about a sampling parameter, also late ones, name the field's path in this dialect."""
    try:
        yield
    except InvalidRequest as error:
        if error.param not in NativeSampling.__struct_fields__:
            raise
        path = f"sampling_params.{error.param}"
        raise InvalidRequest(error.message.replace(error.param, path, 1), param=path) from None


def _answer(
    services: Services,
    choice: Choice,
    sample_id: str,
    latency_s: float,
    lists: LogprobLists | None,
) -> dict[str, Any]:
    whole = choice.whole
    text = {} if isinstance(services.tokenizer, AbsentTokenizer) else {"text": whole.text}
    return {
        **text,
        "output_ids": whole.token_ids,
        "meta_info": {
            "id": sample_id,
            "finish_reason": _finish_reason(whole.finish, whole.num_output_tokens),
            "prompt_tokens": whole.num_prompt_tokens,
            "completion_tokens": whole.num_output_tokens,
            "cached_tokens": whole.num_cached_tokens,
            "weight_version": services.served.version,
            "e2e_latency": latency_s,
            "decode_throughput": choice.decode_throughput,
            "queue_time": whole.queue_time_s,
            **media_tokens([choice]),
            **_by_tier(whole, services),
            **_speculated(whole),
            **(lists.fields() if lists is not None else {}),
        },
    }


def _by_tier(whole: TextChunk, services: Services) -> dict[str, Any]:
    """Where the cached tokens came from, of a server with several tiers."""
    if not services.options.get("enable_hierarchical_cache"):
        return {}
    return {"cached_tokens_details": cached_by_tier([whole])}


def _speculated(whole: TextChunk) -> dict[str, Any]:
    """How guesses fared: `spec_accept_length` times `spec_verify_ct` are the output tokens."""
    found = whole.speculated
    if found is None or not found.num_steps:
        return {}
    return {
        "spec_verify_ct": found.num_steps,
        "spec_accept_length": whole.num_output_tokens / found.num_steps,
        "spec_accept_rate": found.accept_rate,
        "spec_accept_token_num": found.num_accepted,
        "spec_draft_token_num": found.num_drafted,
    }


def _finish_reason(finish: Finish | None, num_output_tokens: int) -> dict[str, object] | None:
    if finish is None:
        return None
    if finish.kind == "length":
        return {"type": "length", "length": num_output_tokens}
    if finish.kind == "stop":
        return {"type": "stop", "matched": finish.matched}
    return {"type": "abort", "message": finish.message or "aborted"}

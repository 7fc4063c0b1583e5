"""OpenAI's sampling fields -> SamplingParams, and other common parts of both generating routes."""

from __future__ import annotations

import uuid
from typing import Any, TypeVar

import msgspec

from sapwood.base.errors import InvalidRequest
from sapwood.frontends.openai.protocol import GenerationRequest
from sapwood.frontends.serving.grammar import chosen_grammar
from sapwood.frontends.serving.sampling import params_of, renamed
from sapwood.frontends.serving.services import Services
from sapwood.schema.handover import Handover, handovers_of
from sapwood.schema.logprobs import LogprobOptions
from sapwood.schema.namespace import cache_namespace
from sapwood.schema.request import RequestOptions
from sapwood.schema.sampling import SamplingParams

G = TypeVar("G", str, str | None)


def sampling_params(
    asked: GenerationRequest, services: Services, *, max_tokens: int | None, limit_name: str
) -> SamplingParams:
    """The request's sampling parameters, else the model's defaults, else OpenAI's.

    max_tokens  output tokens at most; None: as many as the context leaves
    limit_name  name of the request's field for max_tokens, for errors
    """
    chosen = {**services.default_sampling, **asked.given()}
    if asked.top_k == 0:
        # vLLM's and llama.cpp's word for all tokens.
        chosen["top_k"] = -1
    grammar = chosen_grammar(
        asked.response_format,
        json_schema=asked.json_schema,
        regex=asked.regex,
        ebnf=asked.ebnf,
        structural_tag=asked.structural_tag,
        guided_json=asked.guided_json,
        guided_regex=asked.guided_regex,
        guided_grammar=asked.guided_grammar,
        guided_choice=asked.guided_choice,
        **_structured(asked),
    )
    try:
        return SamplingParams(
            max_new_tokens=max_tokens,
            min_new_tokens=asked.min_tokens,
            penalty_window=asked.repeat_last_n,
            seed=asked.seed,
            custom_logit_processor=asked.custom_logit_processor,
            custom_params=params_of(asked.custom_logit_processor, asked.custom_params),
            grammar=grammar,
            **chosen,
        )
    except InvalidRequest as error:
        names = {"max_new_tokens": limit_name, "min_new_tokens": "min_tokens"}
        raise renamed(error, names) from None


def _structured(asked: GenerationRequest) -> dict[str, Any]:
    """vLLM's structured_outputs, by the names that `chosen_grammar` knows."""
    if asked.structured_outputs is None:
        return {}
    given = msgspec.structs.asdict(asked.structured_outputs)
    # False asks for nothing, and None is for fields that are absent.
    given["json_object"] = given["json_object"] or None
    return {f"structured_outputs.{name}": value for name, value in given.items()}


def namespaces(asked: GenerationRequest, num_prompts: int) -> list[str]:
    """One name per prompt, which share prefixes if their names are equal."""
    salts = _per_prompt(asked.cache_salt, num_prompts, "cache_salt")
    keys = _per_prompt(asked.extra_key, num_prompts, "extra_key")
    return [cache_namespace(key, salt) for key, salt in zip(keys, salts, strict=True)]


def _per_prompt(given: G | list[G], num_prompts: int, name: str) -> list[G]:
    if not isinstance(given, list):
        return [given] * num_prompts
    if len(given) != num_prompts:
        raise InvalidRequest(
            f"{name} has {len(given)} entries but there are {num_prompts} prompts; send one for "
            "each prompt, or one text for all",
            param=name,
        )
    return given


def request_options(
    asked: GenerationRequest,
    sampling: SamplingParams,
    logprobs: LogprobOptions | None,
    key: str,
    services: Services,
    num_prompts: int = 1,
) -> list[RequestOptions]:
    """The options of each prompt's request; key: the routing key"""
    paths = _per_prompt(asked.lora_path, num_prompts, "lora_path")
    return [
        RequestOptions(
            sampling=sampling,
            logprobs=logprobs,
            return_hidden_states=asked.return_hidden_states,
            return_routed_experts=asked.return_routed_experts,
            namespace=namespace,
            adapter=services.adapter_of(asked.model, path),
            priority=asked.priority,
            routing_key=key,
            data_parallel_rank=services.replica_of(asked.data_parallel_rank),
        )
        for namespace, path in zip(namespaces(asked, num_prompts), paths, strict=True)
    ]


def handovers(asked: GenerationRequest, num_prompts: int) -> list[tuple[Handover, ...]]:
    """Per prompt where its samples' pages are handed over."""
    return handovers_of(
        asked.bootstrap_host,
        asked.bootstrap_port,
        asked.bootstrap_room,
        num_prompts=num_prompts,
        num_samples=asked.n,
    )


def request_ids(asked: GenerationRequest, num_prompts: int, prefix: str) -> tuple[str, list[str]]:
    """(the answer's id, one request id per prompt)"""
    if isinstance(asked.rid, list):
        if len(asked.rid) != num_prompts:
            raise InvalidRequest(
                f"rid has {len(asked.rid)} ids but there are {num_prompts} prompts", param="rid"
            )
        if not all(asked.rid):
            raise InvalidRequest("rid has an empty string; leave rid out", param="rid")
        return asked.rid[0], asked.rid
    answer_id = asked.rid or f"{prefix}-{uuid.uuid4().hex}"
    if num_prompts == 1:
        return answer_id, [answer_id]
    return answer_id, [f"{answer_id}-{i}" for i in range(num_prompts)]


def check_stream_options(asked: GenerationRequest) -> None:
    if asked.stream_options is not None and not asked.stream:
        raise InvalidRequest(
            "stream_options is only for stream=true; leave it out or stream",
            param="stream_options",
        )

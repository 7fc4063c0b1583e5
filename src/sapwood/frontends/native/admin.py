"""The native routes that describe or control the server."""

from __future__ import annotations

import asyncio
import uuid

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from sapwood.base.errors import EngineUnavailable, InvalidRequest
from sapwood.frontends.native.protocol import ABORT_FIELDS
from sapwood.frontends.serving.embed import embed_all
from sapwood.frontends.serving.generate import collect
from sapwood.frontends.serving.services import Services
from sapwood.http.body import read_json
from sapwood.http.errors import json_response
from sapwood.http.sse import until_disconnect
from sapwood.observe.engine_facts import EngineState
from sapwood.schema.client import EngineClient
from sapwood.schema.fields import parse
from sapwood.schema.request import RequestOptions
from sapwood.schema.sampling import SamplingParams
from sapwood.text.absent import AbsentTokenizer
from sapwood.text.embedding import EmbedRequest
from sapwood.text.generation import TextRequest


def health(services: Services) -> Response:
    """200 while the engine serves; else EngineUnavailable (503) with its reason."""
    reason = services.engine.unavailable_reason
    if reason is not None:
        raise EngineUnavailable(f"not healthy: {reason}")
    ranks = [
        {"rank": facts.rank, "stage": facts.stage, "device": facts.device}
        for facts in services.engine.info.ranks
    ]
    return json_response({"status": "ok", "ranks": ranks} if ranks else {"status": "ok"})


async def health_generate(request: Request, services: Services) -> Response:
    """200 when the engine has generated a token, or made the embedding or scores of a word."""
    word: str | list[int] = "health"
    if isinstance(services.tokenizer, AbsentTokenizer):
        word = [0]
    if services.pooling is not None:
        asked = EmbedRequest(request_id=f"health-{uuid.uuid4().hex}", text=word)
        await until_disconnect(embed_all(services, [asked]), request.receive)
        return json_response({"status": "ok"})
    probe = TextRequest(
        request_id=f"health-{uuid.uuid4().hex}",
        prompt=word,
        options=RequestOptions(sampling=SamplingParams(max_new_tokens=1, temperature=0.0)),
    )
    await until_disconnect(collect(services, [probe]), request.receive)
    return json_response({"status": "ok"})


def model_info(services: Services) -> dict[str, object]:
    return {
        "model_path": services.served.path or services.model_path,
        "tokenizer_path": services.tokenizer_path or services.model_path,
        "is_generation": services.pooling is None,
        "preferred_sampling_params": dict(services.default_sampling) or None,
        "weight_version": services.served.version,
        "has_image_understanding": "image" in services.media_markers,
        "has_audio_understanding": False,
        "model_type": services.model_type,
        "architectures": list(services.architectures),
    }


async def server_info(services: Services) -> dict[str, object]:
    """The resolved configuration, the reasons of its choices, and the engine's counters.

    The names that SGLang's own tools read are those of SGLang 0.5.8.
    """
    info = services.engine.info
    return {
        **services.options,
        **info.options,
        **{decision.option: decision.value for decision in services.formats.decisions},
        **services.served.settings,
        "version": services.version,
        "model_path": services.model_path,
        "tokenizer_path": services.tokenizer_path or services.model_path,
        "served_model_name": services.model_name,
        "status": services.engine.unavailable_reason or "ready",
        "max_total_num_tokens": info.max_total_tokens,
        "max_req_input_len": info.context_length,
        "internal_states": await _internal_states(services),
        "notes": [*info.notes, *map(str, services.formats.decisions)],
        "ranks": msgspec.to_builtins(info.ranks),
    }


async def _internal_states(services: Services) -> list[dict[str, object]]:
    """One per replica; of one that does not serve, why."""
    if not services.replicas:
        return [await _internal_state(services.engine, services.observer.metrics.engine)]

    async def state_of(engine: EngineClient, state: EngineState) -> dict[str, object]:
        try:
            return await _internal_state(engine, state)
        except EngineUnavailable as error:
            return {"unavailable": error.message}

    states = zip(services.replicas, services.observer.metrics.engines, strict=True)
    return await asyncio.gather(*(state_of(engine, state) for engine, state in states))


async def _internal_state(engine: EngineClient, state: EngineState) -> dict[str, object]:
    """The state of a replica: the engine's counters, and what tools divide them by.

    memory_usage  in GB, but token_capacity in tokens, and pools also in pages, or in states; a
                  captured step's memory is not told apart
    """
    info, status = engine.info, await engine.status()
    counters = msgspec.to_builtins(status)
    return {name: value for name, value in counters.items() if name not in ("type", "call_id")} | {
        "effective_max_running_requests_per_dp": info.max_running_requests,
        "last_gen_throughput": state.rates.last_output_tokens_per_s,
        "memory_usage": {
            "weight": round(info.weight_bytes / 1e9, 2),
            "kvcache": round(sum(pool.size * pool.unit_bytes for pool in info.pools) / 1e9, 2),
            "graph": 0.0,
            "token_capacity": info.max_total_tokens,
            "pools": {
                pool.name: {
                    "size": pool.size,
                    "num_free": use.num_free,
                    "num_leased": use.num_leased,
                    "gb": round(pool.size * pool.unit_bytes / 1e9, 3),
                }
                for pool, use in zip(info.pools, status.pools, strict=True)
            },
        },
    }


async def flush_cache(services: Services) -> Response:
    flushed = await services.engine.flush_cache()
    if not flushed.done:
        raise InvalidRequest(flushed.message)
    return json_response({"success": True, "message": flushed.message})


async def abort_request(request: Request, services: Services) -> Response:
    """End the open requests with that prefix; each is answered with the finish reason abort."""
    asked = parse(await read_json(request), ABORT_FIELDS)
    if not asked.rid and not asked.abort_all:
        raise InvalidRequest("rid is empty; name a request, or set abort_all", param="rid")
    matching = services.generator.open_ids("" if asked.abort_all else asked.rid)
    for request_id in matching:
        await services.generator.abort(request_id)
    return json_response({"success": True, "aborted": matching})

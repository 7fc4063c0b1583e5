"""Embeddings or scores of all texts of one HTTP request, computed together."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, ExitStack, nullcontext
from typing import Any

from sapwood.base.errors import EngineUnavailable, InvalidRequest
from sapwood.frontends.serving.generate import EngineFailed
from sapwood.frontends.serving.services import Services
from sapwood.observe.requests import Asked, ObservedRequest
from sapwood.text.embedding import EmbedRequest, PoolingOutput, TextEmbedder

OPEN_AT_A_TIME = 256
"""Texts of one HTTP request that the engine has at a time: more would fill everybody's queue."""

Text = str | list[int]


async def embed_all(
    services: Services,
    requests: Sequence[EmbedRequest],
    *,
    room: AbstractAsyncContextManager[Any] | None = None,
) -> list[PoolingOutput]:
    """The embedding or scores of each text, in the order of the texts.

    An error of one text, or a cancellation of this call, aborts the others.

    room    entered for each text, by callers that wait instead of being refused by a full queue
    Raises  EngineUnavailable, EngineFailed, or InvalidRequest, also if a text was aborted
    """
    with services.observer.observing([_facts(request) for request in requests]) as observed:
        return await _embed_all(services, requests, observed, room or nullcontext())


async def _embed_all(
    services: Services,
    requests: Sequence[EmbedRequest],
    observed: Sequence[ObservedRequest],
    room: AbstractAsyncContextManager[Any],
) -> list[PoolingOutput]:
    reason = services.engine.unavailable_reason
    if reason is not None:
        raise EngineUnavailable(f"the engine does not serve: {reason}; try again later")
    embedder = TextEmbedder(services.engine, services.generator, services.tokenizer)
    found: dict[int, PoolingOutput] = {}

    async def work() -> None:
        for index, (request, opened) in numbered:
            async with room:
                output = await embedder.embed(request, opened)
                observed[index].answered(output)
                found[index] = _whole(output)

    with ExitStack() as held:
        opened = [
            held.enter_context(services.generator.opened(request.request_id))
            for request in requests
        ]
        numbered = iter(enumerate(zip(requests, opened, strict=True)))
        workers = [asyncio.create_task(work()) for _ in range(min(len(requests), OPEN_AT_A_TIME))]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
    return [found[index] for index in range(len(requests))]


def _facts(request: EmbedRequest) -> Asked:
    text = request.text
    prompt = "\n".join(text) if isinstance(text, tuple) else text
    return Asked(request_id=request.request_id, prompt=prompt, options=request.options)


def _whole(output: PoolingOutput) -> PoolingOutput:
    finish = output.finish
    if finish.kind == "error":
        raise EngineFailed(finish)
    if finish.kind == "abort":
        if finish.message is not None:
            raise EngineUnavailable(f"the request was ended: {finish.message}")
        raise InvalidRequest("the request was aborted before it was answered")
    return output


def texts_of(given: object, param: str) -> tuple[list[Text], bool]:
    """(the texts, whether they came as a list) of a field that has one text or several.

    given   a text, one text's token ids, or a list of either
    Raises  InvalidRequest if there is no text, or an empty one
    """
    if isinstance(given, str):
        return [_not_empty(given, param)], False
    items: list[Any] = given if isinstance(given, list) else []
    if not items:
        raise InvalidRequest(f"{param} is an empty list; send at least one text", param=param)
    token_ids = [item for item in items if isinstance(item, int)]
    if len(token_ids) == len(items):
        return [token_ids], False
    if token_ids:
        raise InvalidRequest(
            f"{param} mixes token ids with texts; send one list of token ids, or a list of texts",
            param=param,
        )
    return [_not_empty(item, f"{param}[{i}]", param) for i, item in enumerate(items)], True


def _not_empty(text: Text, where: str, param: str | None = None) -> Text:
    if not text:
        raise InvalidRequest(f"{where} is empty; send at least one token", param=param or where)
    return text


def request_ids(rid: str | list[str] | None, count: int, prefix: str) -> list[str]:
    """An id for each text of a call: the client's ids, or new ones."""
    if rid is None:
        return [f"{prefix}-{uuid.uuid4().hex}" for _ in range(count)]
    if not rid or not all(rid):
        raise InvalidRequest("rid has an empty string; leave rid out", param="rid")
    if isinstance(rid, str):
        return [rid] if count == 1 else [f"{rid}-{i}" for i in range(count)]
    if len(rid) != count:
        raise InvalidRequest(f"rid has {len(rid)} ids but there are {count} texts", param="rid")
    return rid


def check_dimensions(services: Services, dimensions: int | None) -> None:
    """InvalidRequest unless vectors may be cut to that many numbers."""
    if dimensions is None:
        return
    services.check_task("embed")
    size = services.pooling.size if services.pooling is not None else 0
    if not 1 <= dimensions <= size:
        raise InvalidRequest(
            f"dimensions is {dimensions} but must be in [1, {size}], the size of this model's "
            "vectors",
            param="dimensions",
        )


def usage(answers: Sequence[PoolingOutput]) -> dict[str, int]:
    num_tokens = sum(answer.num_prompt_tokens for answer in answers)
    return {"prompt_tokens": num_tokens, "total_tokens": num_tokens, "completion_tokens": 0}


def meta_info(services: Services, output: PoolingOutput, latency_s: float) -> dict[str, Any]:
    """The field meta_info of the native routes, as in the answers of /generate."""
    return {
        "id": output.request_id,
        "finish_reason": {"type": "length", "length": 0},
        "prompt_tokens": output.num_prompt_tokens,
        "completion_tokens": 0,
        "cached_tokens": output.num_cached_tokens,
        "weight_version": services.served.version,
        "e2e_latency": latency_s,
        "queue_time": output.queue_time_s,
    }

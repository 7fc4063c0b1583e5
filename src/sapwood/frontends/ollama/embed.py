"""POST /api/embed and the older /api/embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import Response

from sapwood.frontends.ollama.models import check_model
from sapwood.frontends.ollama.protocol import EMBED_FIELDS, EMBEDDINGS_FIELDS, OPTION_FIELDS
from sapwood.frontends.ollama.stream import nanoseconds
from sapwood.frontends.serving.embed import (
    Text,
    check_dimensions,
    embed_all,
    request_ids,
    texts_of,
)
from sapwood.frontends.serving.services import Services
from sapwood.http.body import read_json
from sapwood.http.errors import json_response
from sapwood.http.sse import until_disconnect
from sapwood.schema.fields import parse
from sapwood.text.embedding import EmbedRequest, PoolingOutput, shortened


async def embed(request: Request, services: Services) -> Response:
    """All texts of `input`, or no embeddings for an empty list, by which clients load a model."""
    started_s = services.clock.now_s()
    asked = parse(await read_json(request), EMBED_FIELDS)
    _check(services, asked.model, asked.options)
    check_dimensions(services, asked.dimensions)
    answers: Sequence[PoolingOutput] = ()
    if asked.input:
        texts, _ = texts_of(asked.input, "input")
        answers = await _embeddings(request, services, texts, "input")
    size = asked.dimensions
    return json_response(
        {
            "model": asked.model or services.model_name,
            "embeddings": [_of_length_one(answer.values, size) for answer in answers],
            "total_duration": nanoseconds(services.clock.now_s() - started_s),
            # The model was loaded before the server took requests.
            "load_duration": 0,
            "prompt_eval_count": sum(answer.num_prompt_tokens for answer in answers),
        }
    )


async def embeddings(request: Request, services: Services) -> Response:
    """The embedding of one text, as the model makes it: of length 1 or not."""
    asked = parse(await read_json(request), EMBEDDINGS_FIELDS)
    _check(services, asked.model, asked.options)
    if not asked.prompt:
        return json_response({"embedding": []})
    [answer] = await _embeddings(request, services, [asked.prompt], "prompt")
    return json_response({"embedding": answer.values.tolist()})


def _check(services: Services, model: str, options: dict[str, Any]) -> None:
    check_model(services, model)
    services.check_task("embed")
    # Nothing is sampled, but an unknown option is a mistake here as well.
    parse(options, OPTION_FIELDS, where="options")


async def _embeddings(
    request: Request, services: Services, texts: Sequence[Text], param: str
) -> list[PoolingOutput]:
    ids = request_ids(None, len(texts), "ollama")
    requests = [
        EmbedRequest(request_id=request_id, text=text, param=param)
        for request_id, text in zip(ids, texts, strict=True)
    ]
    return await until_disconnect(embed_all(services, requests), request.receive)


def _of_length_one(values: NDArray[np.float32], size: int | None) -> list[float]:
    numbers: list[float] = shortened(values, size or len(values), normalize=True).tolist()
    return numbers

"""What the gateway makes of token ids for workers by gRPC, besides chats. Needs numpy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from starlette.requests import Request
from starlette.responses import Response

from sapwood.app.gateway.making import Make, with_body
from sapwood.base.errors import UnsupportedFeature
from sapwood.frontends.native.generate import generate_text
from sapwood.frontends.openai.completions import completions
from sapwood.frontends.openai.embeddings import embeddings
from sapwood.frontends.serving.services import Services
from sapwood.http.body import body_limits, parse_object, read_bytes
from sapwood.schema.pooling import Pooling


async def _embeddings(request: Request, services: Services) -> Response:
    """The workers do not say how their model pools; only that it does, by answering."""
    raw = await read_bytes(request)
    asked = parse_object(raw, max_depth=body_limits(request).max_depth)
    if asked.get("dimensions") is not None:
        raise UnsupportedFeature(
            "dimensions is not possible where the workers are reached by gRPC, which does not tell "
            "whether a model's vectors may be cut; leave it out",
            param="dimensions",
        )
    pooling = Pooling(task="embed", method="last", why="the workers make embeddings", size=0)
    made = replace(services, pooling=pooling)
    return await embeddings(with_body(request.scope, raw, request.receive), made)


MAKERS: Mapping[str, Make] = {
    "/v1/completions": completions,
    "/generate": generate_text,
    "/v1/embeddings": _embeddings,
}

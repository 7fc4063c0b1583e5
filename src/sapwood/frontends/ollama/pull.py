"""POST /api/pull, for clients that pull a model before they use it: the served one is there."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from sapwood.base.errors import NotFound, UnsupportedFeature
from sapwood.frontends.ollama.models import ONE_MODEL, check_model, digest
from sapwood.frontends.ollama.protocol import PULL_FIELDS
from sapwood.frontends.ollama.stream import NDJSON, line
from sapwood.frontends.serving.services import Services
from sapwood.http.body import read_json
from sapwood.http.errors import json_response
from sapwood.schema.fields import parse


async def pull(request: Request, services: Services) -> Response:
    """The statuses of a pull that finds everything; UnsupportedFeature for another model."""
    asked = parse(await read_json(request), PULL_FIELDS)
    try:
        check_model(services, asked.model or asked.name)
    except NotFound as error:
        raise UnsupportedFeature(
            f"{error.message}, and nothing else is pulled: {ONE_MODEL}"
        ) from None
    success = {"status": "success"}
    if not asked.stream:
        return json_response(success)
    size, full_digest = services.weights.num_bytes, f"sha256:{digest(services)}"
    layer = {"digest": full_digest, "total": size, "completed": size}
    statuses: list[dict[str, Any]] = [
        {"status": "pulling manifest"},
        {"status": f"pulling {full_digest[7:19]}"} | layer,
        {"status": "verifying sha256 digest"},
        {"status": "writing manifest"},
        success,
    ]
    return Response(b"".join(line(status) for status in statuses), media_type=NDJSON)

"""Ollama's routes about models, which know one model: the served one."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from sapwood.frontends.common.body import read_json
from sapwood.frontends.common.errors import json_response
from sapwood.frontends.common.fields import parse
from sapwood.frontends.common.services import WEIGHT_VERSION, Services
from sapwood.frontends.ollama.protocol import SHOW_FIELDS
from sapwood.frontends.ollama.stream import rfc3339

_LATEST = ":latest"
_NEVER = "9999-12-31T23:59:59Z"


def check_model(services: Services, asked: str) -> None:
    """Raises NotFound unless `name` is the served model's, with or without ":latest"."""
    services.check_model(asked if asked == services.model_name else asked.removesuffix(_LATEST))


def tags(services: Services) -> dict[str, Any]:
    return {"models": [_card(services) | {"modified_at": _since(services)}]}


def running(services: Services) -> dict[str, Any]:
    """The list of loaded models: the served one, while the engine runs; it never expires."""
    if services.engine.unavailable_reason is not None:
        return {"models": []}
    context_length = services.engine.info.context_length
    return {"models": [_card(services) | {"expires_at": _NEVER, "context_length": context_length}]}


async def show(request: Request, services: Services) -> Response:
    asked = parse(await read_json(request), SHOW_FIELDS)
    check_model(services, asked.model or asked.name)
    kind = services.model_type or "unknown"
    return json_response(
        {
            "modified_at": _since(services),
            "details": _details(services),
            "parameters": "\n".join(
                f"{_OPTION_NAMES.get(name, name):<30} {value}"
                for name, value in services.default_sampling.items()
            ),
            "model_info": {
                "general.architecture": kind,
                "general.basename": services.model_name,
                f"{kind}.context_length": services.engine.info.context_length,
                f"{kind}.vocab_size": services.generator.vocab_size,
            },
            "capabilities": _capabilities(services),
        }
    )


_OPTION_NAMES = {"repetition_penalty": "repeat_penalty"}


def _capabilities(services: Services) -> list[str]:
    template, formats = services.template, services.formats
    capabilities = ["completion"]
    has_place = template is not None and template.places.tools
    if formats.calls is not None and (formats.tells_tools_in_text or has_place):
        capabilities.append("tools")
    if formats.reasoning is not None:
        capabilities.append("thinking")
    return capabilities


def _card(services: Services) -> dict[str, Any]:
    """The model's entry in lists, without size and quantisation, which only the engine knows."""
    name = services.model_name
    if ":" not in name.rpartition("/")[2]:
        name += _LATEST
    # In Ollama this is a manifest's digest; here it only has to differ between models.
    identity = f"{services.model_path}\n{WEIGHT_VERSION}".encode()
    return {
        "name": name,
        "model": name,
        "digest": hashlib.sha256(identity).hexdigest(),
        "details": _details(services),
    }


def _details(services: Services) -> dict[str, Any]:
    kind = services.model_type
    return {"parent_model": ""} | ({"family": kind, "families": [kind]} if kind else {})


def _since(services: Services) -> str:
    return rfc3339(datetime.fromtimestamp(services.created, UTC))

"""Ollama's routes about models, which know one model: the served one."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from sapwood.frontends.ollama.protocol import SHOW_FIELDS
from sapwood.frontends.ollama.stream import rfc3339
from sapwood.frontends.serving.services import Services
from sapwood.http.body import read_json
from sapwood.http.errors import json_response
from sapwood.schema.fields import parse

ONE_MODEL = (
    "this server serves the one model that it was started with and keeps it as it is; for another "
    "one, start a server with --model"
)
_LATEST = ":latest"
_NEVER = "9999-12-31T23:59:59Z"


def check_model(services: Services, asked: str) -> str:
    """The LoRA adapter that `asked` names; "": the base model.

    Raises NotFound unless `asked` is either's name, with or without ":latest"."""
    is_name = asked == services.model_name
    return services.adapter_of(asked if is_name else asked.removesuffix(_LATEST))


def tags(services: Services) -> dict[str, Any]:
    card = _card(services)
    return {"models": [card | {"modified_at": _since(services), "size": _file_size(services)}]}


def digest(services: Services) -> str:
    """64 hexadecimal digits; in Ollama a manifest's hash, here one that differs between models."""
    path, version = services.served.path or services.model_path, services.served.version
    identity = f"{path}\n{version}\n{services.weights}".encode()
    return hashlib.sha256(identity).hexdigest()


def running(services: Services) -> dict[str, Any]:
    """The list of loaded models: the served one, while the engine runs; it never expires.

    `size` is the memory of the weights, and `size_vram` the part of it that a GPU has.
    """
    if services.engine.unavailable_reason is not None:
        return {"models": []}
    info = services.engine.info
    size = info.weight_bytes or _file_size(services)
    loaded = {
        "size": size,
        "size_vram": 0 if info.options.get("device") == "cpu" else size,
        "expires_at": _NEVER,
        "context_length": info.context_length,
    }
    return {"models": [_card(services) | loaded]}


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
            }
            | _counted(services),
            "capabilities": _capabilities(services),
        }
    )


_OPTION_NAMES = {"repetition_penalty": "repeat_penalty"}


def _capabilities(services: Services) -> list[str]:
    template, formats = services.template, services.formats
    if services.pooling is not None:
        return ["embedding"] if services.pooling.task == "embed" else []
    capabilities = ["completion"]
    has_place = template is not None and template.places.tools
    if formats.calls is not None and (formats.tells_tools_in_text or has_place):
        capabilities.append("tools")
    if formats.reasoning is not None:
        capabilities.append("thinking")
    if services.media_markers:
        capabilities.append("vision")
    return capabilities


def _card(services: Services) -> dict[str, Any]:
    """What the model's entries in both lists have."""
    name = services.model_name
    if ":" not in name.rpartition("/")[2]:
        name += _LATEST
    return {
        "name": name,
        "model": name,
        "digest": digest(services),
        "details": _details(services),
    }


def _details(services: Services) -> dict[str, Any]:
    kind, weights = services.model_type, services.weights
    details: dict[str, Any] = {"parent_model": "", "format": weights.weight_format}
    if kind:
        details |= {"family": kind, "families": [kind]}
    if weights.num_parameters is not None:
        details["parameter_size"] = _shortened(weights.num_parameters)
    return details | {"quantization_level": weights.type_name or "unknown"}


def _file_size(services: Services) -> int:
    return services.weights.num_bytes


def _counted(services: Services) -> dict[str, int]:
    num_parameters = services.weights.num_parameters
    return {} if num_parameters is None else {"general.parameter_count": num_parameters}


def _shortened(count: int) -> str:
    """For instance 134.52M or 8.0B."""
    if count >= 1_000_000_000:
        return f"{count / 1e9:.1f}B"
    return f"{count / 1e6:.2f}M" if count >= 1_000_000 else f"{count / 1e3:.2f}K"


def _since(services: Services) -> str:
    return rfc3339(datetime.fromtimestamp(services.created, UTC))

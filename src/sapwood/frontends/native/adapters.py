"""LoRA adapters that are loaded and unloaded while the server serves, as SGLang and vLLM do."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Awaitable

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from sapwood.base.errors import InvalidRequest, NotFound
from sapwood.frontends.native.protocol import (
    LOAD_ADAPTER_FIELDS,
    LOAD_SENT_ADAPTER_FIELDS,
    UNLOAD_ADAPTER_FIELDS,
)
from sapwood.frontends.serving.adapters import NOT_ENABLED, SENT, AdapterRegistry
from sapwood.frontends.serving.services import Services
from sapwood.http.body import read_json
from sapwood.http.errors import json_response
from sapwood.schema.fields import parse
from sapwood.schema.request import SentAdapter


async def load(request: Request, services: Services) -> Response:
    asked = parse(await read_json(request), LOAD_ADAPTER_FIELDS)
    registry = _registry(services)
    return await _answer(
        registry, registry.load(asked.lora_name, asked.lora_path, pinned=asked.pinned)
    )


async def load_sent(request: Request, services: Services) -> Response:
    asked = parse(await read_json(request), LOAD_SENT_ADAPTER_FIELDS)
    registry = _registry(services)
    sent = SentAdapter(
        config=msgspec.json.encode(asked.config_dict),
        tensors=await asyncio.to_thread(_decoded, asked.serialized_tensors),
        is_pickled=asked.load_format is None,
    )
    return await _answer(
        registry, registry.load(asked.lora_name, SENT, pinned=asked.pinned, sent=sent)
    )


def _decoded(text: str) -> bytes:
    """The bytes of base64, whose length the limit on bodies bounds."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidRequest(
            f"serialized_tensors is no base64: {error}", param="serialized_tensors"
        ) from None


async def unload(request: Request, services: Services) -> Response:
    asked = parse(await read_json(request), UNLOAD_ADAPTER_FIELDS)
    registry = _registry(services)
    return await _answer(registry, registry.unload(asked.lora_name))


async def _answer(registry: AdapterRegistry, change: Awaitable[None]) -> Response:
    """SGLang's answer: 400 if nothing was changed."""
    why_not = ""
    try:
        await change
    except (InvalidRequest, NotFound) as error:
        why_not = error.message
    answer = {
        "success": not why_not,
        "error_message": why_not,
        "loaded_adapters": {name: registry.paths[name] for name in registry.loaded},
    }
    return json_response(answer, status=400 if why_not else 200)


def _registry(services: Services) -> AdapterRegistry:
    if services.adapters is None or not services.adapters.is_on:
        raise InvalidRequest(NOT_ENABLED)
    return services.adapters

"""The table of endpoints of a server that draws."""

from __future__ import annotations

import time
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import FileResponse, Response

from sapwood.base.errors import EngineUnavailable, NotFound
from sapwood.frontends.images.edits import read_edit
from sapwood.frontends.images.generations import Brought, answer_pictures
from sapwood.frontends.images.metrics import metrics_text
from sapwood.frontends.images.protocol import (
    EDIT_FORM,
    GENERATION_FIELDS,
    GenerationRequest,
    PicturesAnswer,
    StoredPictureAnswer,
)
from sapwood.frontends.images.services import PaintingServices
from sapwood.frontends.openai.answer_shapes import ModelList
from sapwood.http.body import read_json
from sapwood.http.endpoints import Dialect, Endpoint
from sapwood.http.errors import OPENAI_ERRORS, json_response
from sapwood.http.openapi import BINARY, SSE
from sapwood.schema.fields import parse

EXAMPLE = {"prompt": "An oak in fog", "size": "512x512", "seed": 7, "response_format": "b64_json"}


def images_dialect(services: PaintingServices) -> Dialect:
    dialect = Dialect("images", errors={"/v1": OPENAI_ERRORS})

    @dialect.serves(
        Endpoint(
            paths=("/v1/images/generations",),
            methods=("POST",),
            access="user",
            body=GenerationRequest,
            example=EXAMPLE,
            answers=(PicturesAnswer, SSE),
        )
    )
    async def post_image_generations(request: Request) -> Response:
        asked = parse(await read_json(request), GENERATION_FIELDS)
        return await answer_pictures(request, services, asked, Brought(), kind="generation")

    @dialect.serves(
        Endpoint(
            paths=("/v1/images/edits",),
            methods=("POST",),
            access="user",
            form=EDIT_FORM,
            answers=(PicturesAnswer, SSE),
        )
    )
    async def post_image_edits(request: Request) -> Response:
        asked, brought = await read_edit(request, max_pixels=services.config.max_picture_pixels)
        return await answer_pictures(request, services, asked, brought, kind="edit")

    @dialect.serves(
        Endpoint(
            paths=("/v1/images/{picture_id}/content",),
            methods=("GET",),
            access="user",
            answers=(BINARY,),
        )
    )
    async def get_image_content(request: Request) -> Response:
        found = services.store.get(request.path_params["picture_id"])
        return FileResponse(
            found.path,
            media_type=found.media_type,
            headers={"X-Content-Type-Options": "nosniff"},
        )

    @dialect.serves(
        Endpoint(
            paths=("/v1/images/{picture_id}",),
            methods=("GET",),
            access="user",
            answers=(StoredPictureAnswer,),
        )
    )
    async def get_image(request: Request) -> Response:
        picture_id = request.path_params["picture_id"]
        found = services.store.get(picture_id)
        return json_response({"id": picture_id, "media_type": found.media_type})

    return dialect


def painting_server_dialect(services: PaintingServices) -> Dialect:
    """What every server says of itself."""
    dialect = Dialect("server")

    @dialect.serves(
        Endpoint(paths=("/v1/models",), methods=("GET",), access="user", answers=(ModelList,))
    )
    async def get_models(request: Request) -> Response:
        return json_response({"object": "list", "data": [_card(services)]})

    @dialect.serves(
        Endpoint(
            paths=("/v1/models/{model:path}",),
            methods=("GET",),
            access="user",
            is_documented=False,
        )
    )
    async def get_model(request: Request) -> Response:
        services.check_model(request.path_params["model"])
        return json_response(_card(services))

    @dialect.serves(
        Endpoint(
            paths=("/model_info", "/get_model_info"),
            methods=("GET",),
            access="user",
            is_documented=False,
        )
    )
    async def get_model_info(request: Request) -> Response:
        return json_response(model_info(services))

    @dialect.serves(
        Endpoint(paths=("/health",), methods=("GET",), access="open", is_documented=False)
    )
    async def get_health(request: Request) -> Response:
        reason = services.engine.unavailable_reason
        if reason is not None:
            raise EngineUnavailable(f"not healthy: {reason}")
        return json_response({"status": "ok"})

    @dialect.serves(
        Endpoint(paths=("/metrics",), methods=("GET",), access="open", is_documented=False)
    )
    async def get_metrics(request: Request) -> Response:
        if not services.serves_metrics:
            raise NotFound("metrics are off; start the server with --enable-metrics")
        text = metrics_text(await services.engine.status(), services.model_name)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    @dialect.serves(
        Endpoint(
            paths=("/dashboard/figures",), methods=("GET",), access="user", is_documented=False
        )
    )
    async def get_figures(request: Request) -> Response:
        return json_response(await figures(services))

    return dialect


async def figures(services: PaintingServices) -> dict[str, Any]:
    """What the live page shows."""
    reason = services.engine.unavailable_reason
    now_s = time.time()
    found: dict[str, Any] = {
        "model": services.model_name,
        "version": services.version,
        "state": "ready" if reason is None else reason,
        "at_s": now_s,
        "uptime_s": now_s - services.created,
    }
    if reason is None:
        found["status"] = msgspec.to_builtins(await services.engine.status())
    return found


def model_info(services: PaintingServices) -> dict[str, Any]:
    info = services.engine.info
    return {
        "model_path": services.model_path,
        "served_model_name": services.model_name,
        "is_generation": False,
        "pipeline": info.pipeline,
        "backend": info.backend,
        "traits": msgspec.to_builtins(info.traits),
        "components": [
            {
                "name": each.name,
                "class": each.class_name,
                "precision": each.precision,
                "bytes": each.num_bytes,
            }
            for each in info.components
        ],
        "notes": list(info.notes),
        "version": services.version,
    }


def _card(services: PaintingServices) -> dict[str, Any]:
    info = services.engine.info
    return {
        "id": services.model_name,
        "object": "model",
        "created": services.created,
        "owned_by": "sapwood",
        "root": services.model_path,
        "parent": None,
        "task": "text-to-image",
        "is_generation": False,
        "defaults": msgspec.to_builtins(info.traits.defaults),
        "max_input_pictures": info.traits.max_input_pictures,
        "needs_picture": info.traits.needs_picture,
        "pipeline": info.pipeline,
        "backend": info.backend,
    }

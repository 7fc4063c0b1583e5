"""The endpoints of the storage tier, with SGLang's paths and codes."""

from __future__ import annotations

import msgspec
from fastapi import Request, Response
from starlette.responses import PlainTextResponse

from sapwood.frontends.serving.services import Services
from sapwood.http.body import read_json
from sapwood.http.endpoints import Dialect, Endpoint
from sapwood.http.errors import json_response
from sapwood.schema.fields import FieldTable, parse
from sapwood.schema.output import CallDone
from sapwood.schema.request import SteerTiers

NEEDS_ADMIN_KEY = (
    "the storage tier is only steered on servers with an admin key; start this one with "
    "--admin-api-key"
)


class AttachStorageRequest(msgspec.Struct, frozen=True, kw_only=True):
    """PUT /hicache/storage-backend: keeps pages of KV in a storage from now on.

    hicache_storage_backend                    file or redis
    hicache_storage_backend_extra_config_json  as --hicache-storage-backend-extra-config
    hicache_storage_prefetch_policy            as the option; null: as it is
    hicache_write_policy                       likewise
    """

    hicache_storage_backend: str
    hicache_storage_backend_extra_config_json: str | None = None
    hicache_storage_prefetch_policy: str | None = None
    hicache_write_policy: str | None = None


class StorageStatus(msgspec.Struct, frozen=True, kw_only=True):
    """GET /hicache/storage-backend."""

    hicache_storage_backend: str | None
    hicache_storage_backend_extra_config: str | None
    hicache_storage_prefetch_policy: str
    hicache_write_policy: str


ATTACH_FIELDS = FieldTable(title="PUT /hicache/storage-backend", shape=AttachStorageRequest)


def tier_dialect(services: Services) -> Dialect:
    dialect = Dialect("tiers")
    needs_key = PlainTextResponse(NEEDS_ADMIN_KEY, status_code=400)

    async def steer(message: SteerTiers) -> Response:
        return _told(await services.engine.steer_tiers(message))

    @dialect.serves(
        Endpoint(
            paths=("/hicache/storage-backend",),
            methods=("PUT",),
            access="admin",
            body=AttachStorageRequest,
            example={"hicache_storage_backend": "file"},
            answers=("text/plain",),
            refusal="text/plain",
        )
    )
    async def attach_storage(request: Request) -> Response:
        if not _has_admin_key(request):
            return needs_key
        asked = parse(await read_json(request), ATTACH_FIELDS)
        return await steer(
            SteerTiers(
                "",
                "attach",
                backend=asked.hicache_storage_backend,
                extra=asked.hicache_storage_backend_extra_config_json,
                prefetch_policy=asked.hicache_storage_prefetch_policy,
                write_policy=asked.hicache_write_policy,
            )
        )

    @dialect.serves(
        Endpoint(
            paths=("/hicache/storage-backend",),
            methods=("DELETE",),
            access="admin",
            answers=("text/plain",),
            refusal="text/plain",
        )
    )
    async def detach_storage(request: Request) -> Response:
        return await steer(SteerTiers("", "detach")) if _has_admin_key(request) else needs_key

    @dialect.serves(
        Endpoint(
            paths=("/hicache/storage-backend",),
            methods=("GET",),
            access="admin",
            answers=(StorageStatus,),
            refusal="text/plain",
        )
    )
    async def storage_status(request: Request) -> Response:
        if not _has_admin_key(request):
            return needs_key
        done = await services.engine.steer_tiers(SteerTiers("", "status"))
        return json_response(msgspec.json.decode(done.message)) if done.done else _told(done)

    @dialect.serves(
        Endpoint(
            paths=("/hicache/storage-backend/clear", "/clear_hicache_storage_backend"),
            methods=("POST",),
            access="admin",
            answers=("text/plain",),
            refusal="text/plain",
        )
    )
    async def clear_storage(request: Request) -> Response:
        return await steer(SteerTiers("", "clear"))

    return dialect


def _has_admin_key(request: Request) -> bool:
    return bool(request.app.state.has_admin_key)


def _told(done: CallDone) -> Response:
    return PlainTextResponse(done.message + "\n", status_code=200 if done.done else 400)

"""Files and batches as a table of endpoints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastapi import Request, Response

from sapwood.base.errors import UnsupportedFeature
from sapwood.frontends.batches import files, jobs
from sapwood.frontends.batches.protocol import CreateBatchRequest
from sapwood.frontends.batches.store import (
    Batch,
    BatchList,
    BatchStore,
    File,
    FileDeleted,
    FileList,
)
from sapwood.frontends.serving.services import Services
from sapwood.http.endpoints import Dialect, Endpoint, EndpointRows, query_parameter
from sapwood.http.errors import json_response
from sapwood.http.openapi import BINARY

_AFTER = query_parameter("after", type="string")


def _limit(high: int, default: int) -> dict[str, Any]:
    return query_parameter("limit", type="integer", minimum=1, maximum=high, default=default)


_FILE_QUERY = (
    _AFTER,
    _limit(files.MAX_LISTED, files.MAX_LISTED),
    query_parameter("order", type="string", enum=["desc", "asc"], default="desc"),
    query_parameter("purpose", type="string"),
)


@dataclass(frozen=True, slots=True)
class Batches:
    """Where files and batches are kept, if this server keeps some, and who answers their lines."""

    services: Services
    store: BatchStore | None

    @property
    def kept(self) -> BatchStore:
        if self.store is None:
            raise UnsupportedFeature(
                "this server keeps no files and runs no batches; start `sapwood serve` with "
                "--batch-concurrency above 0"
            )
        return self.store


ROWS: EndpointRows[Batches] = EndpointRows()


def batches_dialect(services: Services, store: BatchStore | None) -> Dialect:
    """The endpoints of files and batches.

    store  where they are kept; None: this server keeps none, and every endpoint says so
    """
    return ROWS.dialect("batches", Batches(services, store))


@ROWS.serves(
    Endpoint(
        paths=("/v1/files",),
        methods=("POST",),
        access="user",
        form=files.FORM_SCHEMA,
        answers=(File,),
    )
)
async def post_file(request: Request, batches: Batches) -> Response:
    return await files.upload(request, batches.kept)


@ROWS.serves(
    Endpoint(
        paths=("/v1/files",),
        methods=("GET",),
        access="user",
        answers=(FileList,),
        parameters=_FILE_QUERY,
    )
)
async def get_files(request: Request, batches: Batches) -> Response:
    return await files.list_files(request, batches.kept)


@ROWS.serves(
    Endpoint(paths=("/v1/files/{file_id}",), methods=("GET",), access="user", answers=(File,))
)
async def get_file(request: Request, batches: Batches) -> Response:
    return await files.shown(request.path_params["file_id"], batches.kept)


@ROWS.serves(
    Endpoint(
        paths=("/v1/files/{file_id}/content",),
        methods=("GET",),
        access="user",
        answers=(BINARY,),
    )
)
async def get_content(request: Request, batches: Batches) -> Response:
    return await files.content(request.path_params["file_id"], batches.kept)


@ROWS.serves(
    Endpoint(
        paths=("/v1/files/{file_id}",),
        methods=("DELETE",),
        access="user",
        answers=(FileDeleted,),
    )
)
async def delete_file(request: Request, batches: Batches) -> Response:
    return await files.delete(request.path_params["file_id"], batches.kept)


@ROWS.serves(
    Endpoint(
        paths=("/v1/batches",),
        methods=("POST",),
        access="user",
        body=CreateBatchRequest,
        example={
            "input_file_id": "file-1",
            "endpoint": "/v1/chat/completions",
            "completion_window": "24h",
        },
        answers=(Batch,),
    )
)
async def post_batch(request: Request, batches: Batches) -> Response:
    return await jobs.create(request, batches.services, batches.kept)


@ROWS.serves(
    Endpoint(
        paths=("/v1/batches",),
        methods=("GET",),
        access="user",
        answers=(BatchList,),
        parameters=(_AFTER, _limit(100, 20)),
    )
)
async def get_batches(request: Request, batches: Batches) -> Response:
    return await jobs.list_batches(request, batches.kept)


@ROWS.serves(
    Endpoint(paths=("/v1/batches/{batch_id}",), methods=("GET",), access="user", answers=(Batch,))
)
async def get_batch(request: Request, batches: Batches) -> Response:
    record = await batches.kept.batch(request.path_params["batch_id"])
    return json_response(record.shown())


@ROWS.serves(
    Endpoint(
        paths=("/v1/batches/{batch_id}/cancel",),
        methods=("POST",),
        access="user",
        answers=(Batch,),
    )
)
async def post_cancel(request: Request, batches: Batches) -> Response:
    return await jobs.cancel(request.path_params["batch_id"], batches.kept)

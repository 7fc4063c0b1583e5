"""Where files and batches are mounted."""

from __future__ import annotations

from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response

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
from sapwood.frontends.common.errors import json_response
from sapwood.frontends.common.openapi import described, path_parameter, query_parameter
from sapwood.frontends.common.services import Services

BATCH_BODIES = (CreateBatchRequest, File, FileList, FileDeleted, Batch, BatchList)

_FILE_ID, _BATCH_ID = path_parameter("file_id"), path_parameter("batch_id")
_AFTER = query_parameter("after", type="string")


def _limit(high: int, default: int) -> dict[str, Any]:
    return query_parameter("limit", type="integer", minimum=1, maximum=high, default=default)


_FILE_QUERY = (
    _AFTER,
    _limit(files.MAX_LISTED, files.MAX_LISTED),
    query_parameter("order", type="string", enum=["desc", "asc"], default="desc"),
    query_parameter("purpose", type="string"),
)
_UPLOAD = described(File, errors=(400, 413)) | {
    "requestBody": {
        "required": True,
        "content": {"multipart/form-data": {"schema": files.FORM_SCHEMA}},
    }
}


def batches_router(services: Services, store: BatchStore | None) -> APIRouter:
    """store: None where this server keeps no files; then every route says so."""
    router = APIRouter(prefix="/v1", tags=["batches"])

    def kept() -> BatchStore:
        if store is None:
            raise UnsupportedFeature(
                "this server keeps no files and runs no batches; start `sapwood serve` with "
                "--batch-concurrency above 0"
            )
        return store

    @router.post("/files", openapi_extra=_UPLOAD)
    async def post_file(request: Request) -> Response:
        return await files.upload(request, kept())

    @router.get("/files", openapi_extra=described(FileList, parameters=_FILE_QUERY))
    async def get_files(request: Request) -> Response:
        return await files.list_files(request, kept())

    one_file = partial(described, parameters=(_FILE_ID,), errors=(400, 404))

    @router.get("/files/{file_id}", openapi_extra=one_file(File))
    async def get_file(request: Request) -> Response:
        return await files.shown(request.path_params["file_id"], kept())

    @router.get(
        "/files/{file_id}/content",
        openapi_extra=one_file(None, also={"application/octet-stream": "binary"}),
        response_class=Response,
    )
    async def get_content(request: Request) -> Response:
        return await files.content(request.path_params["file_id"], kept())

    @router.delete("/files/{file_id}", openapi_extra=one_file(FileDeleted))
    async def delete_file(request: Request) -> Response:
        return await files.delete(request.path_params["file_id"], kept())

    @router.post("/batches", openapi_extra=described(Batch, body=CreateBatchRequest))
    async def post_batch(request: Request) -> Response:
        return await jobs.create(request, services, kept())

    @router.get(
        "/batches", openapi_extra=described(BatchList, parameters=(_AFTER, _limit(100, 20)))
    )
    async def get_batches(request: Request) -> Response:
        return await jobs.list_batches(request, kept())

    one_batch = partial(described, parameters=(_BATCH_ID,), errors=(400, 404))

    @router.get("/batches/{batch_id}", openapi_extra=one_batch(Batch))
    async def get_batch(request: Request) -> Response:
        record = await kept().batch(request.path_params["batch_id"])
        return json_response(record.shown())

    @router.post("/batches/{batch_id}/cancel", openapi_extra=one_batch(Batch))
    async def post_cancel(request: Request) -> Response:
        return await jobs.cancel(request.path_params["batch_id"], kept())

    return router

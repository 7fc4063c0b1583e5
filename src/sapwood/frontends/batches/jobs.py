"""The routes of /v1/batches: offline jobs over HTTP."""

from __future__ import annotations

import time

from msgspec.structs import replace
from starlette.requests import Request
from starlette.responses import Response

from sapwood.base.errors import InvalidRequest, NotFound, UnsupportedFeature
from sapwood.frontends.batches.files import PURPOSES
from sapwood.frontends.batches.lines import BATCH_URLS
from sapwood.frontends.batches.protocol import CREATE_FIELDS
from sapwood.frontends.batches.store import BatchRecord, BatchStore, new_id
from sapwood.frontends.serving.services import Services
from sapwood.http.body import read_json
from sapwood.http.errors import json_response
from sapwood.http.listing import check_query, page, query_int
from sapwood.schema.fields import parse

_UNIT_S = {"m": 60, "h": 3600, "d": 24 * 3600}


async def create(request: Request, services: Services, store: BatchStore) -> Response:
    asked = parse(await read_json(request), CREATE_FIELDS)
    if asked.endpoint not in BATCH_URLS:
        raise UnsupportedFeature(
            f"endpoint is {asked.endpoint[:80]!r} but must be one of: {', '.join(BATCH_URLS)}",
            param="endpoint",
        )
    try:
        source = await store.file(asked.input_file_id)
    except NotFound as error:
        raise InvalidRequest(f"{error.message}; upload it first", param="input_file_id") from None
    if source.purpose not in PURPOSES:
        raise InvalidRequest(
            f"the file {source.id} was made for {source.purpose!r}, not for 'batch'; upload the "
            "lines with that purpose",
            param="input_file_id",
        )
    now = int(time.time())
    window_s = int(asked.completion_window[:-1]) * _UNIT_S[asked.completion_window[-1]]
    lives = asked.output_expires_after
    record = BatchRecord(
        id=new_id("batch_"),
        endpoint=asked.endpoint,
        model=services.model_name,
        input_file_id=source.id,
        completion_window=asked.completion_window,
        created_at=now,
        expires_at=now + window_s,
        metadata=asked.metadata,
        results_id=new_id("file-"),
        failures_id=new_id("file-"),
        results_live_s=None if lives is None else lives.seconds,
    )
    await store.add_batch(record)
    return json_response(record.shown())


async def list_batches(request: Request, store: BatchStore) -> Response:
    check_query(request.query_params, ("after", "limit"))
    limit = query_int(request.query_params, "limit", 20, low=1, high=100)
    found = await store.batches(after=request.query_params.get("after"), limit=limit + 1)
    items = [record.shown() for record in found[:limit]]
    return json_response(page(items, has_more=len(found) > limit))


async def cancel(batch_id: str, store: BatchStore) -> Response:
    """Cancel a batch: lines in progress are aborted, and finished answers are kept."""
    record = await store.update_batch(batch_id, _cancelled)
    store.changed.set()
    return json_response(record.shown())


def _cancelled(record: BatchRecord) -> BatchRecord:
    if record.status in ("validating", "in_progress"):
        return replace(record, status="cancelling", cancelling_at=int(time.time()))
    if record.status in ("cancelling", "cancelled"):
        return record
    raise InvalidRequest(f"the batch {record.id} is {record.status}, so it cannot be cancelled")

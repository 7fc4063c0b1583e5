"""Requests that the gateway itself sends to workers: health checks, and what all are asked."""

from __future__ import annotations

import asyncio

from sapwood.gateway.client import WorkerFailure
from sapwood.gateway.headers import metadata, request_head
from sapwood.gateway.worker import Worker
from sapwood.http.raw_headers import RawHeaders

MAX_ANSWER_BYTES = 16 << 20

JSON_BODY: RawHeaders = ((b"content-type", b"application/json"),)


async def get(worker: Worker, path: str, timeout_s: float) -> tuple[int, bytes]:
    """(status, body) of a GET; WorkerFailure if no whole answer comes."""
    return await ask(worker, "GET", path, timeout_s=timeout_s)


async def ask(
    worker: Worker,
    method: str,
    path: str,
    *,
    body: bytes = b"",
    headers: RawHeaders = (),
    pass_key: bool = False,
    timeout_s: float,
) -> tuple[int, bytes]:
    """(status, body) of a request; WorkerFailure if no whole answer comes.

    headers   of a client on whose behalf the gateway asks
    pass_key  whether the client's key is sent to a worker that has none of its own
    """
    if worker.link is not None:
        return await worker.link.ask(
            method,
            path,
            body=body,
            metadata=metadata(headers, extra=(), own_key=worker.spec.api_key, pass_key=pass_key),
            timeout_s=timeout_s,
        )
    head = request_head(
        method,
        worker.origin.base_path + path.encode("ascii"),
        host=worker.host,
        headers=headers,
        extra=(),
        num_body_bytes=len(body),
        own_key=worker.spec.api_key,
        pass_key=pass_key,
    )
    try:
        async with asyncio.timeout(timeout_s):
            answer = await worker.pool.ask(head, body)
            try:
                return answer.status, await answer.body(MAX_ANSWER_BYTES)
            finally:
                answer.close()
    except TimeoutError:
        raise WorkerFailure(f"no answer to {method} {path} within {timeout_s:g} s") from None

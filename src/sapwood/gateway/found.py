"""Requests about something that one worker holds: a stored response, a picture or a video, asked
for by its id.

They are stored by the worker that made them. The gateway remembers none of that: it asks all
workers whether they know the id, and sends the request to the one that does.
"""

from __future__ import annotations

import asyncio
import re
from typing import Any

import msgspec
import orjson
from starlette.requests import Request
from starlette.responses import Response

from sapwood.base.errors import EngineUnavailable, NotFound
from sapwood.gateway.chats import Respond
from sapwood.gateway.client import WorkerFailure
from sapwood.gateway.exchange import Proxy
from sapwood.gateway.headers import KEYS
from sapwood.gateway.own_requests import ask
from sapwood.gateway.proxy import Forwarded
from sapwood.gateway.worker import Worker, WorkerState
from sapwood.http.body import read_bytes
from sapwood.http.endpoints import Dialect, Endpoint
from sapwood.http.errors import OPENAI_ERRORS, json_response
from sapwood.http.listing import MAX_PAGE, check_query, paged

ASK_TIMEOUT_S = 10.0
_VIDEOS = "/v1/videos"
_MAX_PAGES = 1000
"""Of a worker's list; more are not looked at."""
_ID = re.compile(r"[A-Za-z0-9_.:-]{1,200}")


def found_dialect(proxy: Proxy, answer: Respond | None = None) -> Dialect:
    """answer: what answers requests for new responses; None: the workers"""
    dialect = Dialect("found")

    async def forward(request: Request) -> Response:
        id_ = request.path_params["response_id"]
        return Forwarded(proxy, request, worker=await owner(proxy, request, id_))

    @dialect.serves(
        Endpoint(paths=("/v1/responses",), methods=("POST",), access="user", is_documented=False)
    )
    async def create(request: Request) -> Response:
        body = await read_bytes(request)
        earlier = _earlier_response(body)
        worker = None if earlier is None else await owner(proxy, request, earlier)
        if worker is None and answer is not None:
            return answer(request, body)
        return Forwarded(proxy, request, body=body, worker=worker)

    for path, methods in (
        ("/v1/responses/{response_id}", ("GET", "DELETE")),
        ("/v1/responses/{response_id}/cancel", ("POST",)),
        ("/v1/responses/{response_id}/input_items", ("GET",)),
    ):
        dialect.serves(
            Endpoint(paths=(path,), methods=methods, access="user", is_documented=False)
        )(forward)
    return dialect


def pictures_dialect(proxy: Proxy) -> Dialect:
    """Pictures and videos that workers keep for a while."""
    dialect = Dialect("pictures", errors={"/v1": OPENAI_ERRORS})

    async def forward_picture(request: Request) -> Response:
        id_ = request.path_params["picture_id"]
        worker = await owner(proxy, request, id_, kind="picture", prefix="/v1/images/")
        return Forwarded(proxy, request, worker=worker)

    for path in ("/v1/images/{picture_id}", "/v1/images/{picture_id}/content"):
        dialect.serves(
            Endpoint(paths=(path,), methods=("GET",), access="user", is_documented=False)
        )(forward_picture)

    async def forward_video(request: Request) -> Response:
        id_ = request.path_params["video_id"]
        worker = await owner(proxy, request, id_, kind="video", prefix=_VIDEOS + "/")
        return Forwarded(proxy, request, worker=worker)

    for path, methods in (
        ("/v1/videos/{video_id}", ("GET", "DELETE")),
        ("/v1/videos/{video_id}/content", ("GET",)),
        ("/v1/videos/{video_id}/remix", ("POST",)),
    ):
        dialect.serves(
            Endpoint(paths=(path,), methods=methods, access="user", is_documented=False)
        )(forward_video)

    @dialect.serves(
        Endpoint(paths=(_VIDEOS,), methods=("GET",), access="user", is_documented=False)
    )
    async def list_videos(request: Request) -> Response:
        check_query(request.query_params, ("after", "limit", "order"))
        workers = [worker for worker in proxy.fleet if worker.state is WorkerState.READY]
        lists = await asyncio.gather(*(_videos_of(proxy, request, each) for each in workers))
        kept = [video for own in lists for video in own]
        kept.sort(key=lambda video: (video["created_at"], video["id"]))
        return json_response(paged(kept, request.query_params))

    return dialect


async def _videos_of(proxy: Proxy, request: Request, worker: Worker) -> list[dict[str, Any]]:
    """All videos of a worker, oldest first; none of one that serves no /v1/videos."""
    found: list[dict[str, Any]] = []
    path = f"{_VIDEOS}?order=asc&limit={MAX_PAGE}"
    more = path
    for _ in range(_MAX_PAGES):
        status, body = await _ask(proxy, request, worker, more)
        if status == 404:
            return []
        if status != 200:
            raise EngineUnavailable("a worker does not tell of its videos")
        try:
            page = _decode_videos(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise EngineUnavailable("a worker's list of videos cannot be read") from None
        found += [video for video in page.data if _is_video(video)]
        if not page.has_more or not page.last_id or not _ID.fullmatch(page.last_id):
            break
        more = f"{path}&after={page.last_id}"
    return found


def _is_video(video: dict[str, Any]) -> bool:
    return isinstance(video.get("id"), str) and isinstance(video.get("created_at"), int)


async def owner(
    proxy: Proxy,
    request: Request,
    id_: str,
    *,
    kind: str = "response",
    prefix: str = "/v1/responses/",
) -> Worker:
    """The worker that holds the response; NotFound if none of the workers does.

    kind    what it is called in errors, if it is no response
    prefix  of the path that tells of one by its id
    Raises  EngineUnavailable if that is unknown, because a worker did not answer
    """
    if not _ID.fullmatch(id_):
        raise NotFound(f"there is no {kind} {id_[:200]!r}")
    workers = [worker for worker in proxy.fleet if worker.state is WorkerState.READY]
    answers = await asyncio.gather(
        *(_knows(proxy, request, worker, prefix + id_) for worker in workers)
    )
    for worker, knows in zip(workers, answers, strict=True):
        if knows:
            return worker
    if None in answers or not workers:
        raise EngineUnavailable(f"not all workers say whether they have the {kind} {id_!r}")
    raise NotFound(f"no worker has a {kind} {id_!r}")


async def _knows(proxy: Proxy, request: Request, worker: Worker, path: str) -> bool | None:
    """None: the worker does not say."""
    try:
        status, body = await _ask(proxy, request, worker, path)
    except EngineUnavailable:
        return None
    if status != 200:
        return False if status < 500 else None
    try:
        return isinstance(orjson.loads(body), dict)
    except orjson.JSONDecodeError:
        return False


async def _ask(proxy: Proxy, request: Request, worker: Worker, path: str) -> tuple[int, bytes]:
    """(status, body) of a GET on behalf of the client. EngineUnavailable without an answer."""
    key = [(name, value) for name, value in request.headers.raw if name in KEYS]
    try:
        return await ask(
            worker,
            "GET",
            path,
            headers=key,
            pass_key=proxy.limits.pass_key,
            timeout_s=ASK_TIMEOUT_S,
        )
    except WorkerFailure as error:
        raise EngineUnavailable("a worker does not answer") from error


class _Videos(msgspec.Struct):
    data: list[dict[str, Any]]
    has_more: bool = False
    last_id: str | None = None


_decode_videos = msgspec.json.Decoder(_Videos).decode


class _Body(msgspec.Struct):
    previous_response_id: str | None = None


_decode = msgspec.json.Decoder(_Body).decode


def _earlier_response(body: bytes) -> str | None:
    """The response that this one goes on from, which one worker holds."""
    try:
        return _decode(body).previous_response_id
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return None  # the worker says what is wrong

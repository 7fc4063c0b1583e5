"""The table of endpoints of /v1/videos."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import FileResponse, Response

from sapwood.base.errors import NotFound
from sapwood.frontends.images.services import PaintingServices
from sapwood.frontends.images.video_files import VIDEO_TYPES
from sapwood.frontends.videos.bodies import read_video
from sapwood.frontends.videos.jobs import VideoJobs
from sapwood.frontends.videos.protocol import (
    REMIX_FIELDS,
    VIDEO_FORM,
    RemixRequest,
    Video,
    VideoDeleted,
    VideoList,
    VideoRequest,
)
from sapwood.frontends.videos.records import Variant, VideoRecord
from sapwood.http.body import read_json
from sapwood.http.endpoints import Dialect, Endpoint, query_parameter
from sapwood.http.errors import OPENAI_ERRORS, json_response
from sapwood.http.listing import check_query, paged, query_choice
from sapwood.http.openapi import BINARY
from sapwood.schema.fields import parse

EXAMPLE = {"prompt": "An oak in a storm", "size": "832x480", "num_frames": 33, "seed": 7}
_VARIANTS: tuple[Variant, ...] = ("video", "thumbnail", "spritesheet")
_TYPES = {"thumbnail": "image/webp", "spritesheet": "image/jpeg"}


def videos_dialect(services: PaintingServices, jobs: VideoJobs) -> Dialect:
    dialect = Dialect("videos", errors={"/v1": OPENAI_ERRORS})

    @dialect.serves(
        Endpoint(
            paths=("/v1/videos",),
            methods=("POST",),
            access="user",
            body=VideoRequest,
            form=VIDEO_FORM,
            example=EXAMPLE,
            answers=(Video,),
        )
    )
    async def post_video(request: Request) -> Response:
        most = services.config.max_picture_pixels
        asked, picture = await read_video(request, max_pixels=most, max_url_bytes=8 * most)
        return _json(jobs.shown(jobs.create(asked, picture)))

    @dialect.serves(
        Endpoint(
            paths=("/v1/videos",),
            methods=("GET",),
            access="user",
            answers=(VideoList,),
            parameters=(
                query_parameter("after", type="string"),
                query_parameter("limit", type="integer", minimum=1, maximum=100),
                query_parameter("order", type="string", enum=["desc", "asc"]),
            ),
        )
    )
    async def get_videos(request: Request) -> Response:
        check_query(request.query_params, ("after", "limit", "order"))
        kept = [msgspec.to_builtins(jobs.shown(record)) for record in jobs.store.all()]
        return json_response(paged(kept, request.query_params))

    @dialect.serves(
        Endpoint(
            paths=("/v1/videos/{video_id}",), methods=("GET",), access="user", answers=(Video,)
        )
    )
    async def get_video(request: Request) -> Response:
        return _json(jobs.shown(jobs.store.get(request.path_params["video_id"])))

    @dialect.serves(
        Endpoint(
            paths=("/v1/videos/{video_id}",),
            methods=("DELETE",),
            access="user",
            answers=(VideoDeleted,),
        )
    )
    async def delete_video(request: Request) -> Response:
        video_id = request.path_params["video_id"]
        jobs.delete(video_id)
        return _json(VideoDeleted(id=video_id, object="video.deleted", deleted=True))

    @dialect.serves(
        Endpoint(
            paths=("/v1/videos/{video_id}/content",),
            methods=("GET",),
            access="user",
            answers=(BINARY,),
            parameters=(query_parameter("variant", type="string", enum=list(_VARIANTS)),),
        )
    )
    async def get_video_content(request: Request) -> Response:
        check_query(request.query_params, ("variant",))
        variant = query_choice(request.query_params, "variant", _VARIANTS)
        return _content(jobs, jobs.store.get(request.path_params["video_id"]), variant)

    @dialect.serves(
        Endpoint(
            paths=("/v1/videos/{video_id}/remix",),
            methods=("POST",),
            access="user",
            body=RemixRequest,
            example={"prompt": "The same oak in snow"},
            answers=(Video,),
        )
    )
    async def post_video_remix(request: Request) -> Response:
        asked = parse(await read_json(request), REMIX_FIELDS)
        return _json(jobs.shown(jobs.remix(request.path_params["video_id"], asked.prompt)))

    return dialect


def _content(jobs: VideoJobs, record: VideoRecord, variant: str) -> Response:
    kind: Variant = next(each for each in _VARIANTS if each == variant)
    if record.status != "completed":
        raise NotFound(f"the video {record.id} is {record.status}: there is nothing to download")
    path = jobs.store.path(record, kind)
    return FileResponse(
        path,
        media_type=_TYPES.get(kind, VIDEO_TYPES[record.output_format]),
        filename=path.name,
        headers={"X-Content-Type-Options": "nosniff"},
    )


def _json(answer: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(answer), media_type="application/json")

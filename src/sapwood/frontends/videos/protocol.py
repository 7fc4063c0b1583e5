"""The bodies of /v1/videos: OpenAI's fields, and those of SGLang's diffusion server."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from sapwood.frontends.images.protocol import Scale, Seed, Steps
from sapwood.schema.fields import FieldTable, Int64, NotOffered

Positive = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
VideoFormat = Literal["mp4", "webm", "gif", "frames"]
Status = Literal["queued", "in_progress", "completed", "failed"]


class VideoRequest(msgspec.Struct, frozen=True, kw_only=True):
    """seconds, fps and num_frames: two of them say the third; none: the pipeline's own.

    size             "auto", or width x height in pixels
    input_reference  the first frame: a data URL, {"image_url": a data URL}, or a file of the form
    output_format    mp4 (H.264), webm (VP9), gif, or frames (a zip of PNG)
    """

    prompt: str
    model: str | None = None
    input_reference: str | dict[str, str] | None = None
    seconds: Positive | None = None
    fps: Annotated[int, msgspec.Meta(ge=1, le=120)] | None = None
    num_frames: Positive | None = None
    size: str = "auto"
    output_format: VideoFormat = "mp4"
    seed: Seed | None = None
    num_inference_steps: Steps | None = None
    guidance_scale: Scale | None = None
    guidance_scale_2: Scale | None = None
    true_cfg_scale: Scale | None = None
    negative_prompt: str | None = None
    max_sequence_length: Annotated[int, msgspec.Meta(ge=1, le=4096)] | None = None
    priority: Int64 = 0
    timeout: Annotated[float, msgspec.Meta(gt=0.0, le=1e6)] | None = None


class RemixRequest(msgspec.Struct, frozen=True, kw_only=True):
    prompt: str


VIDEO_FIELDS: FieldTable[VideoRequest] = FieldTable(
    title="POST /v1/videos",
    shape=VideoRequest,
    changes_nothing={
        "quality": "num_inference_steps says how much work goes into a video",
        "user": "nothing is kept by user",
    },
    not_offered={
        "generator_device": NotOffered(
            why="noise is drawn on the CPU, so that a seed gives the same video everywhere",
            idle=("cpu",),
        ),
        "enable_teacache": NotOffered(why="every step is computed"),
        "diffusers_kwargs": NotOffered(why="only the fields of this list reach the pipeline"),
        "output_path": NotOffered(why="the server's --output-path says where videos are kept"),
        "reference_url": NotOffered(why="send the picture itself as input_reference"),
        "extra_body": NotOffered(why="send its fields beside the others"),
    },
    left_out={"size": ("",), "input_reference": ("",)},
)
REMIX_FIELDS: FieldTable[RemixRequest] = FieldTable(
    title="POST /v1/videos/{video_id}/remix", shape=RemixRequest
)
VIDEO_FORM: dict[str, Any] = {
    "type": "object",
    "required": ["prompt"],
    "properties": {
        **{name: {"type": "string"} for name in VideoRequest.__struct_fields__},
        "input_reference": {"type": "string", "format": "binary"},
    },
}


class VideoFailure(msgspec.Struct, frozen=True, kw_only=True):
    code: str
    message: str


class Video(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A job as clients see it.

    progress    0 to 100
    expires_at  when the file is removed
    """

    id: str
    object: Literal["video"]
    model: str
    status: Status
    progress: int
    created_at: int
    size: str
    seconds: str
    quality: str
    prompt: str
    fps: int
    num_frames: int
    seed: int
    output_format: str
    completed_at: int | None = None
    expires_at: int | None = None
    error: VideoFailure | None = None
    remixed_from_video_id: str | None = None
    file_path: str | None = None
    peak_memory_mb: float | None = None
    inference_time_s: float | None = None


class VideoList(msgspec.Struct, frozen=True, kw_only=True):
    object: Literal["list"]
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class VideoDeleted(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["video.deleted"]
    deleted: bool

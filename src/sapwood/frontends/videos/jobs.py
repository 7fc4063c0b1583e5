"""Videos that are painted while their clients do other things."""

from __future__ import annotations

import asyncio
import io
import logging
import secrets
import uuid
from contextlib import aclosing

import msgspec
from PIL import Image

from sapwood.base.errors import InvalidRequest, Overloaded, SapwoodError
from sapwood.frontends.images.generations import check_most, draw_events, picture_size
from sapwood.frontends.images.pictures import decoded
from sapwood.frontends.images.services import PaintingServices
from sapwood.frontends.images.video_files import (
    encoded_video,
    require_writer,
    spritesheet,
    thumbnail,
)
from sapwood.frontends.videos.protocol import Video, VideoFailure, VideoRequest
from sapwood.frontends.videos.records import Variant, VideoRecord, VideoStore
from sapwood.schema.limits import PICTURE_PROMPT
from sapwood.schema.painting import (
    InputPicture,
    Paint,
    PaintDone,
    PaintFailed,
    PaintProgress,
    Picture,
    PictureOptions,
    VideoDefaults,
)

log = logging.getLogger(__name__)


class VideoJobs:
    """Starts, follows and ends jobs. It lives on the server's event loop."""

    def __init__(self, services: PaintingServices, store: VideoStore) -> None:
        self._services, self.store = services, store
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def create(self, asked: VideoRequest, picture: InputPicture | None) -> VideoRecord:
        """A job that has begun. InvalidRequest names the field and the limit."""
        services = self._services
        services.check_model(asked.model)
        PICTURE_PROMPT.check(len(asked.prompt), "prompt")
        PICTURE_PROMPT.check(len(asked.negative_prompt or ""), "negative_prompt")
        require_writer(asked.output_format)
        usual = self._usual()
        fps, num_frames = self._times(asked, usual)
        defaults = services.engine.info.traits.defaults
        config = services.config
        if asked.num_inference_steps is not None:
            most = config.max_inference_steps
            check_most(
                "num_inference_steps", asked.num_inference_steps, most, "--max-inference-steps"
            )
        size = picture_size(asked.size, config.max_picture_pixels)
        width, height = size or (defaults.width or 0, defaults.height or 0)
        check_most(
            "num_frames times width times height",
            num_frames * width * height,
            config.max_video_pixels,
            "--max-video-pixels",
        )
        record = VideoRecord(
            id=f"video_{uuid.uuid4().hex}",
            model=services.model_name,
            prompt=asked.prompt,
            options=PictureOptions(
                width=width or None,
                height=height or None,
                num_frames=num_frames,
                num_inference_steps=asked.num_inference_steps,
                guidance_scale=asked.guidance_scale,
                guidance_scale_2=asked.guidance_scale_2,
                true_cfg_scale=asked.true_cfg_scale,
                negative_prompt=asked.negative_prompt,
                max_sequence_length=asked.max_sequence_length,
            ),
            fps=fps,
            num_frames=num_frames,
            size=f"{width}x{height}",
            seed=secrets.randbelow(2**31) if asked.seed is None else asked.seed,
            output_format=asked.output_format,
            created_at=self.store.now_s(),
            priority=asked.priority,
            timeout_s=asked.timeout or config.picture_timeout or None,
        )
        return self._begin(record, picture)

    def remix(self, video_id: str, prompt: str) -> VideoRecord:
        """The same job, noise and picture with another prompt."""
        PICTURE_PROMPT.check(len(prompt), "prompt")
        self._usual()
        earlier = self.store.get(video_id)
        if earlier.status != "completed":
            raise InvalidRequest(
                f"the video {video_id} is {earlier.status}, but must be completed to be remixed",
                param="video_id",
            )
        raw = self.store.picture(earlier)
        picture = None
        if raw is not None:
            picture = decoded(
                raw, "input_reference", max_pixels=self._services.config.max_picture_pixels
            )
        record = msgspec.structs.replace(
            earlier,
            id=f"video_{uuid.uuid4().hex}",
            prompt=prompt,
            remixed_from=earlier.id,
            created_at=self.store.now_s(),
            status="queued",
            progress=0,
            completed_at=None,
            num_bytes=0,
        )
        return self._begin(record, picture)

    def delete(self, video_id: str) -> None:
        """A job that goes on ends between two steps."""
        self.store.get(video_id)
        self.store.remove(video_id)
        task = self._tasks.get(video_id)
        if task is not None:
            task.cancel()

    def shown(self, record: VideoRecord) -> Video:
        is_done = record.status == "completed"
        path = self.store.path(record, "video") if is_done and self._services.shows_paths else None
        ends = record.completed_at
        return Video(
            id=record.id,
            object="video",
            model=record.model,
            status=record.status,
            progress=record.progress,
            created_at=int(record.created_at),
            size=record.size,
            seconds=str(max(1, round(record.num_frames / record.fps))),
            quality="standard",
            prompt=record.prompt,
            fps=record.fps,
            num_frames=record.num_frames,
            seed=record.seed,
            output_format=record.output_format,
            completed_at=None if ends is None else int(ends),
            expires_at=int(ends + self.store.max_age_s) if is_done and ends is not None else None,
            error=record.failure,
            remixed_from_video_id=record.remixed_from,
            file_path=None if path is None else str(path),
            peak_memory_mb=record.peak_bytes / 1e6 if is_done else None,
            inference_time_s=record.paint_s if is_done else None,
        )

    def _usual(self) -> VideoDefaults:
        info = self._services.engine.info
        if info.traits.video is None:
            raise InvalidRequest(
                f"this server draws pictures with {info.pipeline}, not videos; send the prompt to "
                "/v1/images/generations",
                param="model",
            )
        most = self._services.config.max_waiting_pictures
        if self.store.num_open >= most:
            raise Overloaded(
                f"{most} videos are waiting or being painted, and no more are taken in; try again "
                "later, or start the server with a larger --max-waiting-pictures"
            )
        return info.traits.video

    def _times(self, asked: VideoRequest, usual: VideoDefaults) -> tuple[int, int]:
        """Frames per second, and frames."""
        fps = usual.fps if asked.fps is None else asked.fps
        frames = asked.num_frames
        if frames is None:
            frames = usual.num_frames if asked.seconds is None else fps * asked.seconds
        elif asked.seconds is not None and asked.fps is None:
            fps = max(1, round(frames / asked.seconds))
        elif asked.seconds is not None and abs(frames / fps - asked.seconds) >= 1.0:
            raise InvalidRequest(
                f"{frames} frames at {fps} per second last {frames / fps:.1f} s, but seconds is "
                f"{asked.seconds}; send two of seconds, fps and num_frames",
                param="seconds",
            )
        check_most("num_frames", frames, self._services.config.max_video_frames, _FRAMES_FLAG)
        return fps, frames

    def _begin(self, record: VideoRecord, picture: InputPicture | None) -> VideoRecord:
        self.store.add(record, None if picture is None else _as_png(picture))
        paint = Paint(
            request_id=f"paint-{uuid.uuid4().hex}",
            prompt=record.prompt,
            seed=record.seed,
            options=msgspec.structs.replace(
                record.options, pictures=() if picture is None else (picture,)
            ),
            priority=record.priority,
            timeout_s=record.timeout_s,
        )
        task = asyncio.create_task(self._follow(record, paint))
        self._tasks[record.id] = task
        task.add_done_callback(lambda _: self._tasks.pop(record.id, None))
        return record

    async def _follow(self, record: VideoRecord, paint: Paint) -> None:
        """Until the job's file is there, or the reason why it is not."""
        try:
            async with aclosing(draw_events(self._services, paint, {})) as events:
                async for event in events:
                    if isinstance(event, PaintProgress):
                        record.status = "in_progress"
                        # The last percent is for the autoencoder and the file.
                        record.progress = min(99, 100 * event.step // event.num_steps)
                    elif isinstance(event, PaintFailed):
                        self._fail(record, event.error_type, event.message)
                    else:
                        await self._finish(record, event)
        except (SapwoodError, OSError) as error:
            log.error("the video %s cannot be kept", record.id, exc_info=error)
            self._fail(record, "storage", f"the video was painted, but not written: {error}")

    async def _finish(self, record: VideoRecord, done: PaintDone) -> None:
        files = await asyncio.to_thread(_files, done.picture, record.output_format, record.fps)
        record.status, record.progress = "completed", 100
        record.completed_at = self.store.now_s()
        record.num_frames = done.picture.num_frames
        record.size = f"{done.picture.width}x{done.picture.height}"
        record.peak_bytes, record.paint_s = done.peak_bytes, done.paint_s
        self.store.finish(record, files)

    def _fail(self, record: VideoRecord, code: str, message: str) -> None:
        record.status, record.completed_at = "failed", self.store.now_s()
        record.failure = VideoFailure(code=code, message=message)
        self.store.finish(record, {})


_FRAMES_FLAG = "--max-video-frames"


def _files(video: Picture, output_format: str, fps: int) -> dict[Variant, bytes]:
    return {
        "video": encoded_video(video, output_format, fps),
        "thumbnail": thumbnail(video),
        "spritesheet": spritesheet(video),
    }


def _as_png(picture: InputPicture) -> bytes:
    file = io.BytesIO()
    image = Image.frombytes("RGB", (picture.width, picture.height), picture.pixels)
    image.save(file, "PNG")
    return file.getvalue()

"""`sapwood.Painter`: pictures in a Python program, with the loop of the server."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from sapwood.app.painting.engine_process import process_memory
from sapwood.app.painting.folder import is_painting_folder
from sapwood.app.painting.loading import load_painting, plan_painting
from sapwood.base.channel import CallbackSender, QueueChannel
from sapwood.base.clock import MonotonicClock
from sapwood.base.errors import ConfigError, InvalidRequest, SapwoodError
from sapwood.diffusion.loop import PaintingLoop
from sapwood.diffusion.scheduler import StepScheduler
from sapwood.frontends.images.video_files import SUFFIXES, encoded_video, frames_of
from sapwood.schema.config.painting import PaintingConfig
from sapwood.schema.painting import (
    InputPicture,
    Paint,
    PaintDone,
    PainterInput,
    PainterOutput,
    PaintFailed,
    PaintProgress,
    Picture,
    PictureOptions,
    StopPainting,
)

if TYPE_CHECKING:
    from PIL.Image import Image

OnStep = Callable[[int, int], None]
"""Is called after each step with (steps of all pictures that are done, steps of all pictures)."""

_JPEG_QUALITY = 95
_USUAL_FPS = 24
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
VIDEO_SUFFIXES = {f".{suffix}": kind for kind, suffix in SUFFIXES.items()}
"""Endings of file names, and what frontends/images/video_files.py calls the format."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PaintedPicture:
    """A picture and what it was made of.

    fps         frames per second of a video, as the pipeline was trained
    paint_s     seconds from the request to the picture
    peak_bytes  the most memory that the process has had
    """

    prompt: str
    seed: int
    picture: Picture
    num_steps: int
    paint_s: float
    peak_bytes: int
    fps: int = _USUAL_FPS

    @property
    def image(self) -> Image:
        """The picture, or a video's first frame, as Pillow has it."""
        return self.frames[0]

    @property
    def frames(self) -> list[Image]:
        """All frames of a video; a picture is one."""
        return list(frames_of(self.picture))

    def save(self, path: str | Path, *, fps: int | None = None) -> None:
        """Write a file whose name says the format: .png, .jpg, .jpeg or .webp of a picture, .mp4,
        .webm, .gif or .zip (a PNG per frame) of a video.

        fps  frames per second; None: as the pipeline was trained
        """
        suffix = Path(path).suffix.lower()
        if suffix in VIDEO_SUFFIXES:
            kind = VIDEO_SUFFIXES[suffix]
            Path(path).write_bytes(encoded_video(self.picture, kind, fps or self.fps))
            return
        if suffix not in PICTURE_SUFFIXES or self.picture.num_frames > 1:
            known = VIDEO_SUFFIXES if self.picture.num_frames > 1 else PICTURE_SUFFIXES
            raise InvalidRequest(f"{path} must end in {', '.join(known)}")
        if suffix == ".png":
            self.image.save(path)
        else:
            self.image.convert("RGB").save(path, quality=_JPEG_QUALITY)


class Painter:
    """A diffusion model in this process. One thread may use it.

    with Painter("/models/flux") as painter:
        painter.paint("an oak in fog", seed=7)[0].save("oak.png")
    """

    def __init__(self, model: str | Path, **options: Any) -> None:
        """Load a diffusers folder; options: as the fields of PaintingConfig.

        Raises StartupError if the folder cannot be read, or does not fit this machine."""
        if not is_painting_folder(str(model)):
            raise ConfigError(f"{model} is no folder with model_index.json, so it draws nothing")
        config = PaintingConfig(**options)
        loaded = load_painting(plan_painting(str(model), config))
        clock = MonotonicClock()
        self.plan = loaded.plan
        self._inbox: QueueChannel[PainterInput] = QueueChannel()
        video = loaded.pipeline.traits.video
        self.draws_videos = video is not None
        self._fps = _USUAL_FPS if video is None else video.fps
        self._outputs: list[PainterOutput] = []
        self._num_asked = 0
        self._loop: PaintingLoop | None = PaintingLoop(
            loaded.pipeline,
            StepScheduler(loaded.plan.limits, clock),
            self._inbox,
            CallbackSender(self._outputs.append),
            clock=clock,
            text_cache_bytes=config.text_cache_bytes,
            adapters=loaded.adapters,
            room=loaded.plan.memory,
            memory=process_memory,
        )

    def paint(
        self,
        prompt: str | Sequence[str],
        *,
        n: int = 1,
        seed: int | None = None,
        images: Sequence[Image] = (),
        on_step: OnStep | None = None,
        **options: Any,
    ) -> list[PaintedPicture]:
        """n pictures per prompt; all go through the transformer together.

        seed     of the first picture of each prompt, the others have seed + 1, …; None: random
        images   to change or to look at
        options  the fields of PictureOptions: width, height, num_inference_steps, …
        Raises   InvalidRequest for what the pipeline cannot draw
        """
        if self._loop is None:
            raise SapwoodError("this painter is closed")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        unknown = sorted(set(options) - set(PictureOptions.__struct_fields__))
        if unknown:
            raise InvalidRequest(f"unknown option {', '.join(unknown)}", param=unknown[0])
        first = secrets.randbelow(2**31) if seed is None else seed
        if images:
            options["pictures"] = tuple(_brought(image) for image in images)
        asked = PictureOptions(**options)
        paints = [self._asked(text, first + place, asked) for text in prompts for place in range(n)]
        done = self._drawn(paints, on_step)
        return [_painted(paint, done[paint.request_id], self._fps) for paint in paints]

    def close(self) -> None:
        """Give the model's memory back."""
        self._loop = None

    def __enter__(self) -> Painter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _asked(self, prompt: str, seed: int, options: PictureOptions) -> Paint:
        self._num_asked += 1
        return Paint(request_id=str(self._num_asked), prompt=prompt, seed=seed, options=options)

    def _drawn(self, paints: Sequence[Paint], on_step: OnStep | None) -> dict[str, PaintDone]:
        assert self._loop is not None, "paint has looked"
        done: dict[str, PaintDone] = {}
        steps: dict[str, tuple[int, int]] = {}
        # The loop refuses more than may wait; so only as many are asked as there is room for.
        waiting = list(reversed(paints))
        room = self.plan.limits.max_running
        try:
            with torch.inference_mode():
                while len(done) < len(paints):
                    while waiting and len(paints) - len(waiting) - len(done) < room:
                        self._inbox.send(waiting.pop())
                    self._loop.turn(0.0)
                    self._take(done, steps)
                    if on_step is not None and steps:
                        _tell(on_step, steps, len(paints))
        finally:
            # After an error or Ctrl-C nothing of these pictures may stay.
            for paint in paints:
                if paint.request_id not in done:
                    self._inbox.send(StopPainting(paint.request_id))
            if len(done) < len(paints):
                self._loop.turn(0.0)
                self._outputs.clear()
        return done

    def _take(self, done: dict[str, PaintDone], steps: dict[str, tuple[int, int]]) -> None:
        outputs, self._outputs[:] = list(self._outputs), []
        for event in outputs:
            match event:
                case PaintFailed():
                    error = InvalidRequest if event.status == 400 else SapwoodError
                    raise error(event.message, param=event.param)
                case PaintDone():
                    done[event.request_id] = event
                case PaintProgress():
                    steps[event.request_id] = (event.step, event.num_steps)


def _tell(on_step: OnStep, steps: dict[str, tuple[int, int]], num_pictures: int) -> None:
    """Pictures that have not begun will take as many steps as the others."""
    num_steps = next(iter(steps.values()))[1]
    on_step(sum(step for step, _ in steps.values()), num_steps * num_pictures)


def _painted(paint: Paint, done: PaintDone, fps: int) -> PaintedPicture:
    return PaintedPicture(
        prompt=paint.prompt,
        seed=paint.seed,
        picture=done.picture,
        num_steps=done.num_steps,
        paint_s=done.paint_s,
        peak_bytes=done.peak_bytes,
        fps=fps,
    )


def _brought(image: Image) -> InputPicture:
    colours = image.convert("RGB")
    return InputPicture(width=colours.width, height=colours.height, pixels=colours.tobytes())

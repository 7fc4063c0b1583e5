"""Wan 2.1 and 2.2: videos from a prompt, and from a picture that they begin with.

Source: diffusers' WanPipeline and WanImageToVideoPipeline."""

from __future__ import annotations

import html
import re
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sapwood.base.errors import ConfigError, InvalidRequest
from sapwood.models.dit.wan import PromptKeys, VideoRow, WanTransformer
from sapwood.models.encoder.t5 import T5Encoder
from sapwood.models.vae.wan import AutoencoderKLWan
from sapwood.pipelines.components import ComponentFolder, Precisions
from sapwood.pipelines.interface import (
    PictureRequest,
    PromptText,
    PromptVectors,
    Schedule,
    as_pixels,
)
from sapwood.pipelines.noise.flow_unipc import flow_schedule
from sapwood.pipelines.pictures import from_pixels, resized
from sapwood.pipelines.requests import refuse_unused, text_length
from sapwood.pipelines.trajectory import PictureNoise, checked_steps, guided, latent_size
from sapwood.schema.painting import PictureDefaults, PipelineTraits, VideoDefaults

_SPACES = re.compile(r"\s+")
_USUAL_WIDTH, _USUAL_HEIGHT = 832, 480


@dataclass(slots=True, kw_only=True, eq=False)
class VideoTrajectory:
    """Latents [channels, F, h, w] of one video.

    templates  the rows of a step, without latents and timestep: with the prompt, and perhaps
               without it; for each transformer of the pipeline
    scales     of guidance, of each transformer
    boundary   below this timestep the second transformer draws
    beside     [more channels, F, h, w] that each latent is given besides; or None
    given      [channels, 1, h, w]: the first latents, which are no noise; or None
    """

    latents: Tensor
    schedule: Schedule
    noise: PictureNoise
    templates: tuple[tuple[VideoRow, ...], ...]
    scales: tuple[float, ...]
    boundary: float = 0.0
    beside: Tensor | None = None
    given: Tensor | None = None
    num_done: int = 0

    @property
    def num_steps(self) -> int:
        return len(self.schedule.timesteps)

    @property
    def num_tokens(self) -> int:
        return sum(row.num_tokens for row in self.templates[0])

    @property
    def finished(self) -> Tensor:
        """The latents with those that are given."""
        if self.given is None:
            return self.latents
        return torch.cat((self.given, self.latents[:, 1:]), dim=1)

    def rows(self) -> list[VideoRow]:
        """As Trajectory.rows."""
        timestep = self.schedule.timesteps[self.num_done]
        latents = self.schedule.scaled(self.finished, self.num_done)
        if self.beside is not None:
            latents = torch.cat((latents, self.beside))
        return [
            replace(row, latents=latents, timestep=timestep)
            for row in self.templates[self._model(timestep)]
        ]

    def advance(self, predictions: Sequence[Tensor]) -> None:
        """As Trajectory.advance."""
        scale = self.scales[self._model(self.schedule.timesteps[self.num_done])]
        prediction = predictions[0].to(self.latents.dtype)
        if len(predictions) == 2:
            prediction = guided(prediction, predictions[1].to(self.latents.dtype), scale)
        self.latents = self.schedule.step(self.latents, prediction, self.num_done, self._draw)
        self.num_done += 1

    def _model(self, timestep: float) -> int:
        return 1 if timestep < self.boundary else 0

    def _draw(self, like: Tensor) -> Tensor:
        return self.noise(like.shape, like.dtype).to(like.device)


class WanPipeline:
    """Wan of a diffusers folder, which draws from a prompt."""

    default_steps = 50
    default_guidance = 5.0
    default_frames = 81
    max_pictures = 0
    max_text = 512

    def __init__(self, folder: ComponentFolder, precisions: Precisions) -> None:
        self.name = folder.pipeline_class
        self._vae = folder.load("vae", AutoencoderKLWan, precisions.vae)
        self._vae.tiles = precisions.vae_tiling
        self._encoder = folder.load("text_encoder", T5Encoder, precisions.text_encoder(0))
        self._tokenizer = folder.tokenizer("tokenizer")
        self._schedule = folder.config("scheduler")
        flow_schedule(self._schedule, 1)
        self._dtype, self._device = precisions.dit, folder.device
        self._models = [
            folder.load(name, WanTransformer, precisions.dit, precisions.dit_scheme)
            for name in ("transformer", "transformer_2")
            if name in folder.index
        ]
        if "transformer" not in folder.index:
            raise ConfigError(f"{folder.path} has no transformer, which {self.name} wants")
        ratio = folder.fields.get("boundary_ratio")
        self._boundary = 0.0
        if ratio is not None and len(self._models) == 2:
            self._boundary = float(ratio) * int(self._schedule.get("num_train_timesteps", 1000))
        self._has_given_frames = bool(folder.fields.get("expand_timesteps", False))

    @property
    def traits(self) -> PipelineTraits:
        """As Pipeline.traits."""
        return PipelineTraits(
            defaults=PictureDefaults(
                width=_USUAL_WIDTH,
                height=_USUAL_HEIGHT,
                num_inference_steps=self.default_steps,
                guidance_scale=self.default_guidance,
            ),
            size_multiple=2 * self._vae.scale,
            max_input_pictures=self.max_pictures,
            needs_picture=self.max_pictures > 0,
            video=VideoDefaults(
                num_frames=self.default_frames,
                fps=24 if self._vae.scale > 8 else 16,
                frame_step=self._vae.frame_step,
            ),
        )

    def texts(self, request: PictureRequest) -> tuple[PromptText, ...]:
        """As Pipeline.texts."""
        passes = 2 if self._scales(request)[0] > 1.0 else 1
        refuse_unused(
            request, self.name, passes=passes, max_pictures=self.max_pictures, draws_videos=True
        )
        if request.true_cfg_scale is not None:
            raise InvalidRequest(
                f"{self.name} has one guidance alone; send guidance_scale", param="true_cfg_scale"
            )
        if request.guidance_scale_2 is not None and not self._boundary:
            raise InvalidRequest(
                f"this {self.name} has one transformer; leave guidance_scale_2 out",
                param="guidance_scale_2",
            )
        length = text_length(request, self.max_text, self.max_text)
        found = [PromptText(_clean(request.prompt), length)]
        if passes == 2:
            found.append(PromptText(_clean(request.negative_prompt or ""), length, "negative"))
        return tuple(found)

    def encode(self, text: PromptText) -> PromptVectors:
        """As Pipeline.encode. Without padding: the transformer knows what padding becomes."""
        token_ids = self._tokenizer(
            text.text,
            max_length=text.max_sequence_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        return PromptVectors(self._encoder(token_ids.to(self._device)).states[0].to(self._dtype))

    def begin(
        self, request: PictureRequest, vectors: Sequence[PromptVectors]
    ) -> Generator[None, None, VideoTrajectory]:
        """As Pipeline.begin."""
        size = self._latent_size(request)
        num_steps = request.num_inference_steps
        steps = checked_steps(self.default_steps if num_steps is None else num_steps)
        schedule = flow_schedule(self._schedule, steps)
        noise = PictureNoise(request.seed)
        latents = noise((self._vae.latent_channels, *size), torch.float32).to(self._device)
        brought = yield from self._brought(request, size)
        length = text_length(request, self.max_text, self.max_text)
        return VideoTrajectory(
            latents=latents,
            schedule=schedule,
            noise=noise,
            templates=tuple(
                tuple(
                    VideoRow(
                        latents=latents,
                        text=own.states,
                        num_padding=length - len(own.states),
                        rotations=model.rotations(size),
                        timestep=0.0,
                        keys=PromptKeys(),
                        num_given=0 if brought.given is None else size[1] * size[2] // 4,
                        picture=brought.vectors if model.picture is not None else None,
                        model=index,
                    )
                    for own in vectors
                )
                for index, model in enumerate(self._models[: 2 if self._boundary else 1])
            ),
            scales=self._scales(request),
            boundary=self._boundary,
            beside=brought.beside,
            given=brought.given,
        )

    def predict(self, rows: Sequence[VideoRow]) -> list[Tensor]:
        """As Pipeline.predict; rows for different transformers are computed apart."""
        found: list[Tensor | None] = [None] * len(rows)
        for index, model in enumerate(self._models):
            own = [place for place, row in enumerate(rows) if row.model == index]
            if own:
                for place, made in zip(own, model([rows[each] for each in own]), strict=True):
                    found[place] = made
        return [made for made in found if made is not None]

    def finish(self, trajectory: VideoTrajectory) -> Generator[None, None, Tensor]:
        """As Pipeline.finish: [frames, H, W, 3]."""
        frames = yield from self._vae.decode_video(trajectory.finished)
        return torch.stack([as_pixels(frame) for frame in frames])

    def _scales(self, request: PictureRequest) -> tuple[float, float]:
        first = request.guidance_scale
        if first is None:
            first = self.default_guidance
        second = request.guidance_scale_2
        return first, first if second is None else second

    def _latent_size(self, request: PictureRequest) -> tuple[int, int, int]:
        """Latents in time, height and width."""
        height, width = request.height or _USUAL_HEIGHT, request.width or _USUAL_WIDTH
        sides = latent_size(height, width, 2 * self._vae.scale, unit=2)
        frames = self.default_frames if request.num_frames is None else request.num_frames
        if frames < 1:
            raise InvalidRequest(f"num_frames must be >= 1, got {frames}", param="num_frames")
        # As diffusers rounds frames that are no multiple plus one.
        step = self._vae.frame_step
        return (frames // step if frames % step != 1 else (frames - 1) // step) + 1, *sides

    def _brought(
        self, request: PictureRequest, size: tuple[int, int, int]
    ) -> Generator[None, None, Brought]:
        yield from ()
        return Brought()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Brought:
    """What a picture becomes that a video begins with; the fields are VideoTrajectory's.

    vectors  [P, size] of the image encoder
    """

    beside: Tensor | None = None
    given: Tensor | None = None
    vectors: Tensor | None = None


class WanImageToVideoPipeline(WanPipeline):
    """Wan that draws a video from its first picture and a prompt."""

    max_pictures = 1

    def __init__(self, folder: ComponentFolder, precisions: Precisions) -> None:
        super().__init__(folder, precisions)
        self._image_encoder = None
        if self._models[0].picture is not None:
            from sapwood.pipelines.clip_pictures import ClipPictures

            self._image_encoder = ClipPictures(folder, precisions.text_encoder(1))

    def texts(self, request: PictureRequest) -> tuple[PromptText, ...]:
        """As Pipeline.texts."""
        if not request.images:
            raise InvalidRequest(
                f"{self.name} draws a video from its first picture; send one", param="image"
            )
        return super().texts(request)

    def _brought(
        self, request: PictureRequest, size: tuple[int, int, int]
    ) -> Generator[None, None, Brought]:
        count, height, width = size
        scale, step = self._vae.scale, self._vae.frame_step
        vectors = None
        if self._image_encoder is not None:
            vectors = self._image_encoder(request.images[0])
            yield
        picture = from_pixels(resized(request.images[0], height * scale, width * scale))
        first = picture.to(self._device)
        if self._has_given_frames:
            given = yield from self._vae.encode_video(first)
            return Brought(given=given, vectors=vectors)
        num_frames = 1 + step * (count - 1)
        frames = torch.cat((first, first.new_zeros(num_frames - 1, *first.shape[1:])))
        latents = yield from self._vae.encode_video(frames)
        mask = latents.new_zeros(step, *size)
        mask[:, 0] = 1.0
        return Brought(beside=torch.cat((mask, latents)), vectors=vectors)


def _clean(text: str) -> str:
    """As diffusers cleans prompts, apart from its repair of wrongly decoded letters."""
    return _SPACES.sub(" ", html.unescape(html.unescape(text))).strip()

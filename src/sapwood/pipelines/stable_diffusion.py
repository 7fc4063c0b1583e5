"""Stable Diffusion 1.5 and XL: from a prompt, or from a picture that gets some noise.

Source: diffusers' StableDiffusionPipeline and StableDiffusionXLPipeline, and their Img2Img ones."""

from __future__ import annotations

from collections.abc import Generator, Sequence

import torch
from torch import Tensor

from sapwood.models.dit.unet import PictureRow, UNet
from sapwood.models.encoder.clip import ClipTextEncoder
from sapwood.models.vae.kl import AutoencoderKL
from sapwood.pipelines.components import ComponentFolder, Precisions
from sapwood.pipelines.interface import (
    PictureRequest,
    PromptText,
    PromptVectors,
    Schedule,
    as_pixels,
)
from sapwood.pipelines.noise.registry import schedule_class
from sapwood.pipelines.pictures import from_pixels, resized
from sapwood.pipelines.requests import refuse_unused, text_length
from sapwood.pipelines.tokens import padded_ids
from sapwood.pipelines.trajectory import (
    PictureNoise,
    PictureTrajectory,
    checked_steps,
    latent_size,
)
from sapwood.schema.painting import PictureDefaults, PipelineTraits

NOTHING = "nothing"
"""The role of a text whose vectors are zeros."""


class StableDiffusionPipeline:
    """Stable Diffusion 1.x and 2.x of a diffusers folder."""

    default_steps = 50
    default_guidance = 7.5
    default_strength = 0.8

    def __init__(self, folder: ComponentFolder, precisions: Precisions) -> None:
        self.name = folder.pipeline_class
        self._tokenizer = folder.tokenizer("tokenizer")
        self._clip = folder.load("text_encoder", ClipTextEncoder, precisions.text_encoder(0))
        self._unet = folder.load("unet", UNet, precisions.dit, precisions.dit_scheme)
        self._vae = folder.load("vae", AutoencoderKL, precisions.vae)
        self._vae.tiles = precisions.vae_tiling
        self._schedule = folder.config("scheduler")
        self._make_schedule = schedule_class(self._schedule)
        self._dtype, self._device = precisions.dit, folder.device

    @property
    def traits(self) -> PipelineTraits:
        """As Pipeline.traits."""
        side = self._unet.sample_size * self._vae.scale
        return PipelineTraits(
            defaults=PictureDefaults(
                width=side,
                height=side,
                num_inference_steps=self.default_steps,
                guidance_scale=self.default_guidance,
            ),
            size_multiple=self._vae.scale,
            max_input_pictures=1,
            draws_over_picture=True,
        )

    def texts(self, request: PictureRequest) -> tuple[PromptText, ...]:
        """As Pipeline.texts."""
        passes = 2 if self._scale(request) > 1.0 else 1
        refuse_unused(
            request, self.name, passes=passes, max_pictures=1, takes_strength=bool(request.images)
        )
        length = int(self._tokenizer.model_max_length)
        length = text_length(request, length, length)
        found = [PromptText(request.prompt, length)]
        if passes == 2:
            found.append(self._negative(request, length))
        return tuple(found)

    def _negative(self, request: PictureRequest, length: int) -> PromptText:
        return PromptText(request.negative_prompt or "", length, "negative")

    def encode(self, text: PromptText) -> PromptVectors:
        """As Pipeline.encode."""
        states = self._clip(self._token_ids(self._tokenizer, text)).states
        return PromptVectors(states[0].to(self._dtype))

    def _token_ids(self, tokenizer: object, text: PromptText) -> Tensor:
        return padded_ids(tokenizer, text.text, text.max_sequence_length, self._device)

    def begin(
        self, request: PictureRequest, vectors: Sequence[PromptVectors]
    ) -> Generator[None, None, PictureTrajectory]:
        """As Pipeline.begin."""
        side = self._unet.sample_size * self._vae.scale
        height, width = side, side
        if request.images:
            height, width = request.images[0].shape[:2]
        height, width = request.height or height, request.width or width
        size = latent_size(height, width, self._vae.scale, unit=1)
        steps = request.num_inference_steps
        num_steps = checked_steps(self.default_steps if steps is None else steps)
        noise = PictureNoise(request.seed)
        strength = None
        if request.images:
            strength = self.default_strength if request.strength is None else request.strength
        schedule = self._make_schedule(self._schedule, num_steps, strength=strength)
        latents = yield from self._first_latents(request, size, noise, schedule)
        return PictureTrajectory(
            latents=latents,
            schedule=schedule,
            noise=noise,
            templates=tuple(
                PictureRow(
                    latents=latents,
                    text=own.states,
                    timestep=0.0,
                    pooled=own.pooled,
                    sizes=self._sizes((size[0] * self._vae.scale, size[1] * self._vae.scale)),
                )
                for own in vectors
            ),
            dtype=self._dtype,
            scale=self._scale(request),
        )

    def _first_latents(
        self,
        request: PictureRequest,
        size: tuple[int, int],
        noise: PictureNoise,
        schedule: Schedule,
    ) -> Generator[None, None, Tensor]:
        shape = (self._vae.latent_channels, *size)
        if not request.images:
            drawn = noise(shape, self._dtype).to(self._device)
            return drawn * schedule.initial_scale
        height, width = (side * self._vae.scale for side in size)
        pixels = from_pixels(resized(request.images[0], height, width)).to(self._device)
        found: Tensor = yield from self._vae.encode_tiled(pixels, noise.generator)
        drawn = noise(shape, self._dtype).to(self._device)
        return schedule.noised(found[0].to(self._dtype), drawn, 0)

    def predict(self, rows: Sequence[PictureRow]) -> list[Tensor]:
        """As Pipeline.predict."""
        return self._unet(rows)

    def finish(self, trajectory: PictureTrajectory) -> Generator[None, None, Tensor]:
        """As Pipeline.finish."""
        picture = yield from self._vae.decode_tiled(trajectory.latents[None])
        return as_pixels(picture[0])

    def _scale(self, request: PictureRequest) -> float:
        if request.guidance_scale is None:
            return self.default_guidance
        return request.guidance_scale

    def _sizes(self, size: tuple[int, int]) -> tuple[float, ...]:
        """What the U-Net is told of the picture's height and width."""
        return ()


class StableDiffusionXLPipeline(StableDiffusionPipeline):
    """Stable Diffusion XL: two encoders side by side, and the picture's size as a condition."""

    default_guidance = 5.0
    default_strength = 0.3

    def __init__(self, folder: ComponentFolder, precisions: Precisions) -> None:
        super().__init__(folder, precisions)
        self._tokenizer_2 = folder.tokenizer("tokenizer_2")
        self._clip_2 = folder.load("text_encoder_2", ClipTextEncoder, precisions.text_encoder(1))
        self._has_zeros = bool(folder.fields.get("force_zeros_for_empty_prompt", True))

    def _negative(self, request: PictureRequest, length: int) -> PromptText:
        if request.negative_prompt is None and self._has_zeros:
            return PromptText("", length, NOTHING)
        return super()._negative(request, length)

    def encode(self, text: PromptText) -> PromptVectors:
        """As Pipeline.encode: the states before the last layer of both encoders."""
        parts = [
            encoder(self._token_ids(tokenizer, text), skipped_layers=1, is_normed=False)
            for encoder, tokenizer in (
                (self._clip, self._tokenizer),
                (self._clip_2, self._tokenizer_2),
            )
        ]
        pooled = parts[-1].pooled
        assert pooled is not None
        states = torch.cat([part.states for part in parts], dim=-1)[0].to(self._dtype)
        own = pooled[0].to(self._dtype)
        if text.role == NOTHING:
            return PromptVectors(torch.zeros_like(states), torch.zeros_like(own))
        return PromptVectors(states, own)

    def _sizes(self, size: tuple[int, int]) -> tuple[float, ...]:
        """The size of the picture that it might be a part of, the part's corner, its own size."""
        height, width = (float(side) for side in size)
        return (height, width, 0.0, 0.0, height, width)

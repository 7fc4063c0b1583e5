"""Flux.1: dev and schnell draw from a prompt, Kontext looks at a picture that it changes.

Two encoders read a prompt: T5's states are the tokens, CLIP's pooled vector the condition. Four
neighbouring latents are one token. The timesteps are shifted by the picture's number of tokens.
Source: diffusers' FluxPipeline and FluxKontextPipeline."""

from __future__ import annotations

from collections.abc import Generator, Sequence

import numpy as np
import torch
from torch import Tensor

from sapwood.base.errors import InvalidRequest
from sapwood.layers.axial_rope import grid
from sapwood.models.dit.flux import FluxTransformer
from sapwood.models.dit.rows import DenoisingRow
from sapwood.models.encoder.clip import ClipTextEncoder
from sapwood.models.encoder.t5 import T5Encoder
from sapwood.models.vae.kl import AutoencoderKL
from sapwood.pipelines.components import ComponentFolder, Precisions
from sapwood.pipelines.interface import (
    PictureRequest,
    PromptText,
    PromptVectors,
)
from sapwood.pipelines.noise.flow_match import FlowMatchSchedule, shift_by_tokens
from sapwood.pipelines.pictures import from_mask, from_pixels, pack, resized
from sapwood.pipelines.tokens import TokenPipeline, padded_ids
from sapwood.pipelines.trajectory import (
    PictureNoise,
    TokenTrajectory,
    latent_size,
)

KONTEXT_SIZES = (
    *((672, 1568), (688, 1504), (720, 1456), (752, 1392), (800, 1328), (832, 1248)),
    *((880, 1184), (944, 1104), (1024, 1024), (1104, 944), (1184, 880), (1248, 832)),
    *((1328, 800), (1392, 752), (1456, 720), (1504, 688), (1568, 672)),
)
"""Width and height of the pictures that Kontext was trained to look at."""


class FluxPipeline(TokenPipeline[FluxTransformer, AutoencoderKL]):
    """Flux.1 of a diffusers folder."""

    default_steps = 28
    default_guidance = 3.5

    def __init__(self, folder: ComponentFolder, precisions: Precisions) -> None:
        super().__init__(folder, precisions, FluxTransformer, AutoencoderKL)
        self._tokenizers = [folder.tokenizer(name) for name in ("tokenizer", "tokenizer_2")]
        self._clip = folder.load("text_encoder", ClipTextEncoder, precisions.text_encoder(0))
        self._t5 = folder.load("text_encoder_2", T5Encoder, precisions.text_encoder(1))

    def encode(self, text: PromptText) -> PromptVectors:
        """As Pipeline.encode."""
        lengths = (self._tokenizers[0].model_max_length, text.max_sequence_length)
        clip_ids, t5_ids = (
            padded_ids(tokenizer, text.text, length, self._device)
            for tokenizer, length in zip(self._tokenizers, lengths, strict=True)
        )
        pooled = self._clip(clip_ids).pooled
        assert pooled is not None
        states = self._t5(t5_ids).states
        return PromptVectors(states[0].to(self._dtype), pooled[0].to(self._dtype))

    def begin(
        self, request: PictureRequest, vectors: Sequence[PromptVectors]
    ) -> Generator[None, None, TokenTrajectory]:
        """As Pipeline.begin."""
        size, num_steps = self._latent_size(request), self._num_steps(request)
        seen = yield from self._seen(request)
        noise = PictureNoise(request.seed)
        mu = shift_by_tokens(self._schedule, size[0] * size[1] // 4)
        sigmas = np.linspace(1.0, 1.0 / num_steps, num_steps)
        schedule = FlowMatchSchedule(
            self._schedule, sigmas=sigmas, mu=mu, strength=request.strength
        )
        latents, beside = yield from self._started(request, size, noise, schedule)
        positions = _positions(size, 0)
        tokens = None
        if seen is not None:
            positions = torch.cat((positions, _positions((seen.shape[1], seen.shape[2]), 1)))
            tokens = pack(seen).to(self._dtype)
        guidance = self._guidance(request)
        return TokenTrajectory(
            latents=latents,
            size=size,
            schedule=schedule,
            noise=noise,
            templates=tuple(
                DenoisingRow(
                    latents=latents,
                    text=own.states,
                    rotations=self._transformer.rotations(len(own.states), positions),
                    timestep=0.0,
                    pooled=own.pooled,
                    guidance=guidance if self._transformer.has_guidance else None,
                )
                for own in vectors
            ),
            scale=request.true_cfg_scale or 1.0,
            seen=tokens,
            beside=beside,
        )

    def _started(
        self,
        request: PictureRequest,
        size: tuple[int, int],
        noise: PictureNoise,
        schedule: FlowMatchSchedule,
    ) -> Generator[None, None, tuple[Tensor, Tensor | None]]:
        """The latents before the first step, and what the tokens are given besides; as tokens."""
        yield from ()
        channels = self._transformer.out_channels // 4
        return pack(noise((channels, *size), self._dtype)).to(self._device), None

    def _told_guidance(self) -> float | None:
        return self.default_guidance if self._transformer.has_guidance else None

    def _is_guided(self, request: PictureRequest) -> bool:
        return request.negative_prompt is not None and (request.true_cfg_scale or 1.0) > 1.0

    def _seen(self, request: PictureRequest) -> Generator[None, None, Tensor | None]:
        """Latents [channels, h, w] of the picture to look at."""
        yield from ()
        return None


class FluxKontextPipeline(FluxPipeline):
    """It looks at one picture, whose tokens come after those of the latents, or at none."""

    max_pictures = 1

    def _latent_size(self, request: PictureRequest) -> tuple[int, int]:
        """A size that is asked for keeps its shape, but gets the area of a usual picture."""
        usual = self._usual_side
        height, width = request.height or usual, request.width or usual
        if min(height, width) < 1:
            raise InvalidRequest(f"a picture has no size {width}x{height}", param="size")
        shape = width / height
        width, height = round((usual**2 * shape) ** 0.5), round((usual**2 / shape) ** 0.5)
        return latent_size(height, width, self._multiple, unit=2)

    def _seen(self, request: PictureRequest) -> Generator[None, None, Tensor | None]:
        if not request.images:
            return None
        height, width = request.images[0].shape[:2]
        shape = width / height
        _, width, height = min((abs(shape - w / h), w, h) for w, h in KONTEXT_SIZES)
        width = width // self._multiple * self._multiple
        height = height // self._multiple * self._multiple
        pixels = from_pixels(resized(request.images[0], height, width)).to(self._device)
        latents: Tensor = yield from self._vae.encode_tiled(pixels)
        return latents[0]


class FluxFillPipeline(FluxPipeline):
    """It draws the part of a picture that a mask shows: each token is given what stays of the
    picture, and the mask."""

    default_steps = 50
    default_guidance = 30.0
    max_pictures = 1
    takes_mask = True

    def texts(self, request: PictureRequest) -> tuple[PromptText, ...]:
        """As Pipeline.texts."""
        if not request.images or request.mask is None:
            raise InvalidRequest(
                f"{self.name} wants a picture, and a mask of the part that is to be drawn",
                param="mask" if request.images else "image",
            )
        return super().texts(request)

    def _is_guided(self, request: PictureRequest) -> bool:
        return False

    def _latent_size(self, request: PictureRequest) -> tuple[int, int]:
        height, width = request.images[0].shape[:2]
        height, width = request.height or height, request.width or width
        return latent_size(height, width, self._multiple, unit=2)

    def _started(
        self,
        request: PictureRequest,
        size: tuple[int, int],
        noise: PictureNoise,
        schedule: FlowMatchSchedule,
    ) -> Generator[None, None, tuple[Tensor, Tensor | None]]:
        assert request.mask is not None
        scale = self._vae.scale
        height, width = size[0] * scale, size[1] * scale
        picture = from_pixels(resized(request.images[0], height, width)).to(self._device)
        mask = from_mask(request.mask, height, width).to(self._device)
        whole: Tensor = yield from self._vae.encode_tiled(picture, noise.generator)
        drawn = noise(whole.shape, self._dtype).to(self._device)
        latents = schedule.noised(whole.to(self._dtype), drawn, 0)
        staying = picture * (1.0 - mask)
        kept: Tensor = yield from self._vae.encode_tiled(staying, noise.generator)
        # The mask is not made smaller: its pixels are channels of a latent.
        blocks = mask.reshape(size[0], scale, size[1], scale).permute(1, 3, 0, 2)
        pixels = pack(blocks.reshape(scale * scale, *size))
        beside = torch.cat((pack(kept[0]), pixels), dim=-1)
        return pack(latents[0]), beside.to(self._dtype)


def _positions(size: tuple[int, int], picture: int) -> Tensor:
    """[S, 3] of the tokens of latents of that size: which picture, row, column"""
    places = grid(size[0] // 2, size[1] // 2)
    return torch.cat((places.new_full((len(places), 1), picture), places), dim=1)

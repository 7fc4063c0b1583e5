"""Z-Image and Z-Image-Turbo: pictures from a prompt.

Qwen3 reads the prompt as a message of a chat; the states before its last layer are the vectors. The
latents are float32, whatever the transformer's type. Source: diffusers' ZImagePipeline."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sapwood.models.dit.rows import DenoisingRow
from sapwood.models.dit.z_image import ZImageTransformer
from sapwood.models.vae.kl import AutoencoderKL
from sapwood.pipelines.components import ComponentFolder, Precisions
from sapwood.pipelines.interface import PictureRequest, PromptText, PromptVectors, as_pixels
from sapwood.pipelines.noise.flow_match import FlowMatchSchedule, shift_by_tokens
from sapwood.pipelines.text_decoder import load_text_decoder
from sapwood.pipelines.tokens import TokenPipeline
from sapwood.pipelines.trajectory import (
    PictureNoise,
    TokenTrajectory,
    guided,
)

USUAL_SIDE = 1024


class ZImagePipeline(TokenPipeline[ZImageTransformer, AutoencoderKL]):
    """Z-Image of a diffusers folder."""

    default_steps = 50
    default_guidance = 5.0
    is_guided_from = 0.0

    def __init__(self, folder: ComponentFolder, precisions: Precisions) -> None:
        super().__init__(folder, precisions, ZImageTransformer, AutoencoderKL)
        self._tokenizer = folder.tokenizer("tokenizer")
        self._encoder = load_text_decoder(folder, "text_encoder", precisions.text_encoder(0))

    def encode(self, text: PromptText) -> PromptVectors:
        """As Pipeline.encode: the vectors have gone through the transformer's layers for text."""
        message = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": text.text}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=True,
        )
        token_ids = self._tokenizer(
            message, max_length=text.max_sequence_length, truncation=True, return_tensors="pt"
        ).input_ids[0]
        last = self._encoder.config.num_layers - 1
        (states,) = self._encoder(token_ids, layers=[last])
        return PromptVectors(self._transformer.refined(states.to(self._dtype)))

    def begin(
        self, request: PictureRequest, vectors: Sequence[PromptVectors]
    ) -> Generator[None, None, TokenTrajectory]:
        """As Pipeline.begin."""
        yield from ()
        size, num_steps = self._latent_size(request), self._num_steps(request)
        noise = PictureNoise(request.seed)
        latents = patched(noise((self._transformer.in_channels, *size), torch.float32))
        latents = latents.to(self._device)
        patches = (size[0] // 2, size[1] // 2)
        return TokenTrajectory(
            latents=latents,
            size=size,
            schedule=FlowMatchSchedule(
                self._schedule,
                sigmas=torch.linspace(1.0, 1.0 / num_steps, num_steps).tolist(),
                mu=shift_by_tokens(self._schedule, len(latents)),
            ),
            noise=noise,
            templates=tuple(
                DenoisingRow(
                    latents=latents,
                    text=own.states,
                    rotations=self._transformer.rotations(len(own.states), patches),
                    timestep=0.0,
                )
                for own in vectors
            ),
            # diffusers adds this many times the difference of two passes.
            scale=1.0 + self._guidance(request),
            guide=guided,
        )

    def predict(self, rows: Sequence[DenoisingRow]) -> list[Tensor]:
        """As Pipeline.predict."""
        typed = [replace(row, latents=row.latents.to(self._dtype)) for row in rows]
        return self._transformer(typed)

    def finish(self, trajectory: TokenTrajectory) -> Generator[None, None, Tensor]:
        """As Pipeline.finish."""
        latents = whole_of(trajectory.latents, trajectory.size)[None]
        picture = yield from self._vae.decode_tiled(latents)
        return as_pixels(picture[0])

    @property
    def _usual_side(self) -> int:
        return USUAL_SIDE


def patched(latents: Tensor) -> Tensor:
    """latents [channels, h, w] -> [h/2 * w/2, 4 * channels]: a token has pixel after pixel"""
    channels, height, width = latents.shape
    blocks = latents.reshape(channels, height // 2, 2, width // 2, 2)
    return blocks.permute(1, 3, 2, 4, 0).reshape(-1, 4 * channels)


def whole_of(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """The inverse of `patched`; size: (h, w)"""
    height, width = size
    blocks = tokens.reshape(height // 2, width // 2, 2, 2, -1)
    return blocks.permute(4, 0, 2, 1, 3).reshape(-1, height, width)

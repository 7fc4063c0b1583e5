"""Flux.2 Klein: pictures from a prompt.

Qwen3 reads the prompt as a message of a chat, filled up with padding; the states before three of
its layers, side by side, are the vectors. Source: diffusers' Flux2KleinPipeline."""

from __future__ import annotations

from collections.abc import Generator, Sequence

import numpy as np
import torch
from torch import Tensor

from sapwood.base.errors import ConfigError
from sapwood.layers.axial_rope import grid
from sapwood.models.dit.flux2 import Flux2Transformer
from sapwood.models.dit.rows import DenoisingRow
from sapwood.models.vae.kl import AutoencoderKLFlux2
from sapwood.pipelines.components import ComponentFolder, Precisions
from sapwood.pipelines.interface import PictureRequest, PromptText, PromptVectors, as_pixels
from sapwood.pipelines.noise.flow_match import FlowMatchSchedule
from sapwood.pipelines.pictures import unpack
from sapwood.pipelines.text_decoder import load_text_decoder
from sapwood.pipelines.tokens import TokenPipeline
from sapwood.pipelines.trajectory import (
    PictureNoise,
    TokenTrajectory,
)


class Flux2KleinPipeline(TokenPipeline[Flux2Transformer, AutoencoderKLFlux2]):
    """Flux.2 Klein of a diffusers folder."""

    default_steps = 50
    default_guidance = 4.0
    text_layers: tuple[int, ...] = (9, 18, 27)

    def __init__(self, folder: ComponentFolder, precisions: Precisions) -> None:
        super().__init__(folder, precisions, Flux2Transformer, AutoencoderKLFlux2)
        self._is_distilled = bool(folder.fields.get("is_distilled", False))
        self._tokenizer = folder.tokenizer("tokenizer")
        if self._tokenizer.padding_side != "right" or self._tokenizer.pad_token_id is None:
            raise ConfigError("Flux.2's tokenizer must have a padding token, and pad at the right")
        self._encoder = load_text_decoder(folder, "text_encoder", precisions.text_encoder(0))
        if self._transformer.has_guidance:
            raise ConfigError("a Flux.2 Klein with an input for guidance is not implemented")

    def encode(self, text: PromptText) -> PromptVectors:
        """As Pipeline.encode."""
        message = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": text.text}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,
        )
        length = text.max_sequence_length
        token_ids = self._tokenizer(
            message, max_length=length, truncation=True, return_tensors="pt"
        ).input_ids[0]
        pad_id = self._tokenizer.pad_token_id
        states = self._encoder.padded(token_ids, pad_id, length, layers=self.text_layers)
        return PromptVectors(torch.cat(states, dim=-1).to(self._dtype))

    def begin(
        self, request: PictureRequest, vectors: Sequence[PromptVectors]
    ) -> Generator[None, None, TokenTrajectory]:
        """As Pipeline.begin."""
        yield from ()
        size, num_steps = self._latent_size(request), self._num_steps(request)
        noise = PictureNoise(request.seed)
        patches = (size[0] // 2, size[1] // 2)
        drawn = noise((self._transformer.in_channels, *patches), self._dtype)
        latents = drawn.flatten(1).t().contiguous().to(self._device)
        places = grid(*patches)
        positions = torch.nn.functional.pad(places, (1, 1))
        return TokenTrajectory(
            latents=latents,
            size=size,
            schedule=FlowMatchSchedule(
                self._schedule,
                sigmas=np.linspace(1.0, 1.0 / num_steps, num_steps),
                mu=shift_by_tokens_and_steps(len(latents), num_steps),
            ),
            noise=noise,
            templates=tuple(
                DenoisingRow(
                    latents=latents,
                    text=own.states,
                    rotations=self._transformer.rotations(len(own.states), positions),
                    timestep=0.0,
                )
                for own in vectors
            ),
            scale=self._guidance(request),
        )

    def finish(self, trajectory: TokenTrajectory) -> Generator[None, None, Tensor]:
        """As Pipeline.finish."""
        tokens = self._vae.tokens_to_decode(trajectory.latents)
        picture = yield from self._vae.decode_tiled(unpack(tokens, trajectory.size)[None])
        return as_pixels(picture[0])

    def _guidance(self, request: PictureRequest) -> float:
        """1: one pass, as a distilled model has it always."""
        if self._is_distilled:
            return 1.0
        return super()._guidance(request)


def shift_by_tokens_and_steps(num_tokens: int, num_steps: int) -> float:
    """mu, from measurements at 10 and at 200 steps; of large pictures it is that at 200 steps."""
    at_200 = 0.00016927 * num_tokens + 0.45666666
    if num_tokens > 4300:
        return at_200
    at_10 = 8.73809524e-05 * num_tokens + 1.89833333
    slope = (at_200 - at_10) / 190.0
    return slope * num_steps + at_200 - 200.0 * slope

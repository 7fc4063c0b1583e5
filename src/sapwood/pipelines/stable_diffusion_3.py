"""Stable Diffusion 3 and 3.5: pictures from a prompt.

Three encoders read it: the states of two CLIPs side by side come before T5's, and their two pooled
vectors are the condition. T5 may be left out; zeros stand in its place. Source: diffusers'
StableDiffusion3Pipeline."""

from __future__ import annotations

from collections.abc import Generator, Sequence

import torch
import torch.nn.functional as F

from sapwood.models.dit.rows import DenoisingRow
from sapwood.models.dit.sd3 import SD3Transformer
from sapwood.models.encoder.clip import ClipTextEncoder
from sapwood.models.encoder.t5 import T5Encoder
from sapwood.models.vae.kl import AutoencoderKL
from sapwood.pipelines.components import ComponentFolder, Precisions
from sapwood.pipelines.interface import PictureRequest, PromptText, PromptVectors
from sapwood.pipelines.noise.flow_match import FlowMatchSchedule, shift_by_tokens
from sapwood.pipelines.pictures import pack
from sapwood.pipelines.tokens import TokenPipeline, padded_ids
from sapwood.pipelines.trajectory import (
    PictureNoise,
    TokenTrajectory,
)


class StableDiffusion3Pipeline(TokenPipeline[SD3Transformer, AutoencoderKL]):
    """Stable Diffusion 3 of a diffusers folder."""

    default_steps = 28
    default_guidance = 7.0
    usual_text = 256

    def __init__(self, folder: ComponentFolder, precisions: Precisions) -> None:
        super().__init__(folder, precisions, SD3Transformer, AutoencoderKL)
        self._tokenizers = [folder.tokenizer(name) for name in ("tokenizer", "tokenizer_2")]
        self._clips = [
            folder.load(name, ClipTextEncoder, precisions.text_encoder(index))
            for index, name in enumerate(("text_encoder", "text_encoder_2"))
        ]
        self._t5: T5Encoder | None = None
        if "text_encoder_3" in folder.index:
            self._t5 = folder.load("text_encoder_3", T5Encoder, precisions.text_encoder(2))
            self._t5_tokenizer = folder.tokenizer("tokenizer_3")

    def encode(self, text: PromptText) -> PromptVectors:
        """As Pipeline.encode."""
        length = int(self._tokenizers[0].model_max_length)
        ids = [padded_ids(each, text.text, length, self._device) for each in self._tokenizers]
        parts = [
            encoder(own, skipped_layers=1, is_normed=False)
            for encoder, own in zip(self._clips, ids, strict=True)
        ]
        pooled = [part.pooled[0] for part in parts if part.pooled is not None]
        clips = torch.cat([part.states[0] for part in parts], dim=-1).to(self._dtype)
        if self._t5 is None:
            shape = (text.max_sequence_length, self._transformer.text_size)
            t5 = torch.zeros(shape, dtype=self._dtype, device=self._device)
        else:
            token_ids = padded_ids(
                self._t5_tokenizer, text.text, text.max_sequence_length, self._device
            )
            t5 = self._t5(token_ids).states[0].to(self._dtype)
        padded = F.pad(clips, (0, t5.shape[-1] - clips.shape[-1]))
        return PromptVectors(torch.cat((padded, t5)), torch.cat(pooled).to(self._dtype))

    def begin(
        self, request: PictureRequest, vectors: Sequence[PromptVectors]
    ) -> Generator[None, None, TokenTrajectory]:
        """As Pipeline.begin."""
        yield from ()
        size, num_steps = self._latent_size(request), self._num_steps(request)
        positions = self._transformer.positions((size[0] // 2, size[1] // 2))
        noise = PictureNoise(request.seed)
        shape = (self._transformer.in_channels, *size)
        latents = pack(noise(shape, self._dtype)).to(self._device)
        mu = None
        if self._schedule.get("use_dynamic_shifting"):
            mu = shift_by_tokens({"max_shift": 1.16, **self._schedule}, len(latents))
        return TokenTrajectory(
            latents=latents,
            size=size,
            schedule=FlowMatchSchedule(self._schedule, num_steps=num_steps, mu=mu),
            noise=noise,
            templates=tuple(
                DenoisingRow(
                    latents=latents,
                    text=own.states,
                    rotations=positions,
                    timestep=0.0,
                    pooled=own.pooled,
                )
                for own in vectors
            ),
            scale=self._guidance(request),
        )

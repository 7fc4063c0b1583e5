"""Stable Diffusion 3 and 3.5: pictures from a prompt.

Three encoders read it: the states of two CLIPs side by side come before T5's, and their two pooled
vectors are the condition. T5 may be left out; zeros stand in its place. Source: diffusers'
StableDiffusion3Pipeline."""

from __future__ import annotations

from collections.abc import Generator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sapwood.models.dit.rows import DenoisingRow
from sapwood.models.dit.sd3 import SD3Transformer
from sapwood.models.encoder.clip import ClipTextEncoder
from sapwood.models.encoder.t5 import T5Encoder
from sapwood.models.vae.kl import AutoencoderKL
from sapwood.pipelines.components import ComponentFolder, Precisions
from sapwood.pipelines.interface import PictureRequest, PromptText, PromptVectors, as_pixels
from sapwood.pipelines.noise.flow_match import FlowMatchSchedule, shift_by_tokens
from sapwood.pipelines.pictures import pack, unpack
from sapwood.pipelines.requests import refuse_unused, text_length
from sapwood.pipelines.trajectory import (
    PictureNoise,
    TokenTrajectory,
    checked_steps,
    latent_size,
)
from sapwood.schema.painting import PictureDefaults, PipelineTraits

USUAL_TEXT, MAX_TEXT = 256, 512
USUAL_LATENTS = 128


class StableDiffusion3Pipeline:
    """Stable Diffusion 3 of a diffusers folder."""

    default_steps = 28
    default_guidance = 7.0

    def __init__(self, folder: ComponentFolder, precisions: Precisions) -> None:
        self.name = folder.pipeline_class
        self._tokenizers = [folder.tokenizer(name) for name in ("tokenizer", "tokenizer_2")]
        self._clips = [
            folder.load(name, ClipTextEncoder, precisions.text_encoder(index))
            for index, name in enumerate(("text_encoder", "text_encoder_2"))
        ]
        self._t5: T5Encoder | None = None
        if "text_encoder_3" in folder.index:
            self._t5 = folder.load("text_encoder_3", T5Encoder, precisions.text_encoder(2))
            self._t5_tokenizer = folder.tokenizer("tokenizer_3")
        self._transformer = folder.load(
            "transformer", SD3Transformer, precisions.dit, precisions.dit_scheme
        )
        self._vae = folder.load("vae", AutoencoderKL, precisions.vae)
        self._vae.tiles = precisions.vae_tiling
        self._schedule = folder.config("scheduler")
        self._dtype, self._device = precisions.dit, folder.device

    @property
    def traits(self) -> PipelineTraits:
        """As Pipeline.traits."""
        side = USUAL_LATENTS * self._vae.scale
        return PipelineTraits(
            defaults=PictureDefaults(
                width=side,
                height=side,
                num_inference_steps=self.default_steps,
                guidance_scale=self.default_guidance,
            ),
            size_multiple=2 * self._vae.scale,
        )

    def texts(self, request: PictureRequest) -> tuple[PromptText, ...]:
        """As Pipeline.texts."""
        passes = 2 if self._scale(request) > 1.0 else 1
        refuse_unused(request, self.name, passes=passes)
        length = text_length(request, USUAL_TEXT, MAX_TEXT)
        found = [PromptText(request.prompt, length)]
        if passes == 2:
            found.append(PromptText(request.negative_prompt or "", length, "negative"))
        return tuple(found)

    def encode(self, text: PromptText) -> PromptVectors:
        """As Pipeline.encode."""
        length = int(self._tokenizers[0].model_max_length)
        parts = [
            encoder(
                self._token_ids(tokenizer, text.text, length), skipped_layers=1, is_normed=False
            )
            for encoder, tokenizer in zip(self._clips, self._tokenizers, strict=True)
        ]
        pooled = [part.pooled[0] for part in parts if part.pooled is not None]
        clips = torch.cat([part.states[0] for part in parts], dim=-1).to(self._dtype)
        if self._t5 is None:
            shape = (text.max_sequence_length, self._transformer.text_size)
            t5 = torch.zeros(shape, dtype=self._dtype, device=self._device)
        else:
            token_ids = self._token_ids(self._t5_tokenizer, text.text, text.max_sequence_length)
            t5 = self._t5(token_ids).states[0].to(self._dtype)
        padded = F.pad(clips, (0, t5.shape[-1] - clips.shape[-1]))
        return PromptVectors(torch.cat((padded, t5)), torch.cat(pooled).to(self._dtype))

    def _token_ids(self, tokenizer: object, text: str, length: int) -> Tensor:
        assert callable(tokenizer)
        found: Tensor = tokenizer(
            text, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
        return found.to(self._device)

    def begin(
        self, request: PictureRequest, vectors: Sequence[PromptVectors]
    ) -> Generator[None, None, TokenTrajectory]:
        """As Pipeline.begin."""
        yield from ()
        usual = USUAL_LATENTS * self._vae.scale
        height, width = request.height or usual, request.width or usual
        size = latent_size(height, width, 2 * self._vae.scale, unit=2)
        steps = request.num_inference_steps
        num_steps = checked_steps(self.default_steps if steps is None else steps)
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
            scale=self._scale(request),
        )

    def predict(self, rows: Sequence[DenoisingRow]) -> list[Tensor]:
        """As Pipeline.predict."""
        return self._transformer(rows)

    def finish(self, trajectory: TokenTrajectory) -> Generator[None, None, Tensor]:
        """As Pipeline.finish."""
        latents = unpack(trajectory.latents, trajectory.size)[None]
        picture = yield from self._vae.decode_tiled(latents)
        return as_pixels(picture[0])

    def _scale(self, request: PictureRequest) -> float:
        if request.guidance_scale is None:
            return self.default_guidance
        return request.guidance_scale

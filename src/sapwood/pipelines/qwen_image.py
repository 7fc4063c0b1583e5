"""Qwen-Image and Qwen-Image-2512: pictures from a prompt.

Qwen2.5-VL reads the prompt within a template, whose own tokens are dropped afterwards. Guidance of
two passes keeps the length of each token's prediction. Source: diffusers' QwenImagePipeline."""

from __future__ import annotations

from collections.abc import Generator, Sequence

import numpy as np

from sapwood.models.dit.qwen_image import QwenImageTransformer
from sapwood.models.dit.rows import DenoisingRow
from sapwood.models.vae.qwen_image import AutoencoderKLQwenImage
from sapwood.pipelines.components import ComponentFolder, Precisions
from sapwood.pipelines.interface import PictureRequest, PromptText, PromptVectors
from sapwood.pipelines.noise.flow_match import FlowMatchSchedule, shift_by_tokens
from sapwood.pipelines.pictures import pack
from sapwood.pipelines.text_decoder import load_text_decoder
from sapwood.pipelines.tokens import TokenPipeline
from sapwood.pipelines.trajectory import (
    PictureNoise,
    TokenTrajectory,
    guided_with_norm,
)

TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, "
    "quantity, text, spatial relationships of the objects and background:<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
NUM_DROPPED = 34
"""Tokens of the template before the prompt."""


class QwenImageGuided(TokenPipeline[QwenImageTransformer, AutoencoderKLQwenImage]):
    """What Qwen's pipelines have alike: guidance by a second pass, with a negative prompt alone."""

    default_steps = 50
    default_guidance = 4.0
    usual_text, max_text = 512, 1024

    def _told_guidance(self) -> float | None:
        return None

    def _guidance(self, request: PictureRequest) -> float:
        scale = request.true_cfg_scale
        return self.default_guidance if scale is None else scale

    def _is_guided(self, request: PictureRequest) -> bool:
        return request.negative_prompt is not None and self._guidance(request) > 1.0


class QwenImagePipeline(QwenImageGuided):
    """Qwen-Image of a diffusers folder."""

    def __init__(self, folder: ComponentFolder, precisions: Precisions) -> None:
        super().__init__(folder, precisions, QwenImageTransformer, AutoencoderKLQwenImage)
        self._tokenizer = folder.tokenizer("tokenizer")
        self._encoder = load_text_decoder(folder, "text_encoder", precisions.text_encoder(0))

    def encode(self, text: PromptText) -> PromptVectors:
        """As Pipeline.encode."""
        token_ids = self._tokenizer(
            TEMPLATE.format(text.text),
            max_length=self.max_text + NUM_DROPPED,
            truncation=True,
            return_tensors="pt",
        ).input_ids[0]
        (states,) = self._encoder(token_ids)
        kept = states[NUM_DROPPED:][: text.max_sequence_length]
        return PromptVectors(kept.to(self._dtype))

    def begin(
        self, request: PictureRequest, vectors: Sequence[PromptVectors]
    ) -> Generator[None, None, TokenTrajectory]:
        """As Pipeline.begin."""
        yield from ()
        size, num_steps = self._latent_size(request), self._num_steps(request)
        noise = PictureNoise(request.seed)
        channels = self._transformer.in_channels // 4
        latents = pack(noise((channels, *size), self._dtype)).to(self._device)
        patches = (size[0] // 2, size[1] // 2)
        mu = shift_by_tokens(self._schedule, len(latents))
        sigmas = np.linspace(1.0, 1.0 / num_steps, num_steps)
        return TokenTrajectory(
            latents=latents,
            size=size,
            schedule=FlowMatchSchedule(self._schedule, sigmas=sigmas, mu=mu),
            noise=noise,
            templates=tuple(
                DenoisingRow(
                    latents=latents,
                    text=own.states,
                    rotations=self._transformer.rotations(len(own.states), [patches]),
                    timestep=0.0,
                )
                for own in vectors
            ),
            scale=self._guidance(request),
            guide=guided_with_norm,
        )

"""Qwen-Image and Qwen-Image-2512: pictures from a prompt.

Qwen2.5-VL reads the prompt within a template, whose own tokens are dropped afterwards. Guidance of
two passes keeps the length of each token's prediction. Source: diffusers' QwenImagePipeline."""

from __future__ import annotations

from collections.abc import Generator, Sequence

import numpy as np
from torch import Tensor

from sapwood.models.dit.qwen_image import QwenImageTransformer
from sapwood.models.dit.rows import DenoisingRow
from sapwood.models.vae.qwen_image import AutoencoderKLQwenImage
from sapwood.pipelines.components import ComponentFolder, Precisions
from sapwood.pipelines.interface import PictureRequest, PromptText, PromptVectors, as_pixels
from sapwood.pipelines.noise.flow_match import FlowMatchSchedule, shift_by_tokens
from sapwood.pipelines.pictures import pack, unpack
from sapwood.pipelines.requests import refuse_unused, text_length
from sapwood.pipelines.text_decoder import load_text_decoder
from sapwood.pipelines.trajectory import (
    PictureNoise,
    TokenTrajectory,
    checked_steps,
    guided_with_norm,
    latent_size,
)
from sapwood.schema.painting import PictureDefaults, PipelineTraits

TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, "
    "quantity, text, spatial relationships of the objects and background:<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
NUM_DROPPED = 34
"""Tokens of the template before the prompt."""
USUAL_TEXT, MAX_TEXT = 512, 1024
USUAL_LATENTS = 128


class QwenImagePipeline:
    """Qwen-Image of a diffusers folder."""

    default_steps = 50
    default_scale = 4.0

    def __init__(self, folder: ComponentFolder, precisions: Precisions) -> None:
        self.name = folder.pipeline_class
        self._tokenizer = folder.tokenizer("tokenizer")
        self._encoder = load_text_decoder(folder, "text_encoder", precisions.text_encoder(0))
        self._transformer = folder.load(
            "transformer", QwenImageTransformer, precisions.dit, precisions.dit_scheme
        )
        self._vae = folder.load("vae", AutoencoderKLQwenImage, precisions.vae)
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
                guidance_scale=None,
            ),
            size_multiple=2 * self._vae.scale,
        )

    def texts(self, request: PictureRequest) -> tuple[PromptText, ...]:
        """As Pipeline.texts."""
        passes = self._passes(request)
        refuse_unused(request, self.name, passes=passes)
        length = text_length(request, USUAL_TEXT, MAX_TEXT)
        found = [PromptText(request.prompt, length)]
        if passes == 2:
            found.append(PromptText(request.negative_prompt or "", length, "negative"))
        return tuple(found)

    def encode(self, text: PromptText) -> PromptVectors:
        """As Pipeline.encode."""
        token_ids = self._tokenizer(
            TEMPLATE.format(text.text),
            max_length=MAX_TEXT + NUM_DROPPED,
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
        usual = USUAL_LATENTS * self._vae.scale
        height, width = request.height or usual, request.width or usual
        size = latent_size(height, width, 2 * self._vae.scale, unit=2)
        steps = request.num_inference_steps
        num_steps = checked_steps(self.default_steps if steps is None else steps)
        noise = PictureNoise(request.seed)
        channels = self._transformer.in_channels // 4
        latents = pack(noise((channels, *size), self._dtype)).to(self._device)
        patches = (size[0] // 2, size[1] // 2)
        mu = shift_by_tokens(self._schedule, len(latents))
        sigmas = np.linspace(1.0, 1.0 / num_steps, num_steps)
        scale = request.true_cfg_scale
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
            scale=self.default_scale if scale is None else scale,
            guide=guided_with_norm,
        )

    def predict(self, rows: Sequence[DenoisingRow]) -> list[Tensor]:
        """As Pipeline.predict."""
        return self._transformer(rows)

    def finish(self, trajectory: TokenTrajectory) -> Generator[None, None, Tensor]:
        """As Pipeline.finish."""
        latents = unpack(trajectory.latents, trajectory.size)[None]
        picture = yield from self._vae.decode_tiled(latents)
        return as_pixels(picture[0])

    def _passes(self, request: PictureRequest) -> int:
        scale = self.default_scale if request.true_cfg_scale is None else request.true_cfg_scale
        return 2 if request.negative_prompt is not None and scale > 1.0 else 1

"""Qwen-Image-Edit and Edit-Plus (2509, 2511): they change a picture, or draw from several.

Qwen2.5-VL reads the prompt together with the pictures, whose latents the transformer looks at too,
after those that it draws. Source: diffusers' QwenImageEditPipeline, QwenImageEditPlusPipeline."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence

import numpy as np
import torch
from torch import Tensor

from sapwood.base.errors import InvalidRequest
from sapwood.models.dit.qwen_image import QwenImageTransformer
from sapwood.models.dit.rows import DenoisingRow
from sapwood.models.vae.qwen_image import AutoencoderKLQwenImage
from sapwood.pipelines.components import ComponentFolder, Precisions
from sapwood.pipelines.interface import PictureRequest, PromptText, PromptVectors
from sapwood.pipelines.noise.flow_match import FlowMatchSchedule, shift_by_tokens
from sapwood.pipelines.picture_reader import PICTURE, PictureReader
from sapwood.pipelines.pictures import from_pixels, pack, resized
from sapwood.pipelines.qwen_image import QwenImageGuided
from sapwood.pipelines.trajectory import (
    PictureNoise,
    TokenTrajectory,
    guided_with_norm,
    latent_size,
)

TEMPLATE = (
    "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, "
    "texture, objects, background), then explain how the user's text instruction should alter or "
    "modify the image. Generate a new image that meets the user's requirements while maintaining "
    "consistency with the original input where appropriate.<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
NUM_DROPPED = 64
"""Tokens of the template before the prompt."""
_ONE = f"<|vision_start|>{PICTURE}<|vision_end|>"
_SIDES = 32
"""Pixels by which the sides of pictures to look at grow."""


class QwenImageEditPipeline(QwenImageGuided):
    """Qwen-Image-Edit of a diffusers folder: it looks at one picture.

    area       of the picture that the transformer looks at, in pixels
    read_area  of the pictures that go beside the prompt
    """

    max_pictures = 1
    needs_picture = True
    area = read_area = 1024**2

    def __init__(self, folder: ComponentFolder, precisions: Precisions) -> None:
        super().__init__(folder, precisions, QwenImageTransformer, AutoencoderKLQwenImage)
        self._reader = PictureReader(
            folder, precisions.text_encoder(0), NUM_DROPPED + self.max_text
        )

    def texts(self, request: PictureRequest) -> tuple[PromptText, ...]:
        """As Pipeline.texts: the pictures go beside each."""
        if not request.images:
            raise InvalidRequest(f"{self.name} wants a picture that it changes", param="image")
        found = super().texts(request)
        shown = tuple(self._fitted(each, self.read_area) for each in request.images)
        return tuple(
            PromptText(text.text, text.max_sequence_length, text.role, images=shown)
            for text in found
        )

    def encode(self, text: PromptText) -> PromptVectors:
        """As Pipeline.encode."""
        # Not by format: a prompt may have braces.
        before, after = TEMPLATE.split("{}")
        whole = f"{before}{self._shown(len(text.images))}{text.text}{after}"
        return PromptVectors(self._reader(whole, text.images)[NUM_DROPPED:].to(self._dtype))

    def begin(
        self, request: PictureRequest, vectors: Sequence[PromptVectors]
    ) -> Generator[None, None, TokenTrajectory]:
        """As Pipeline.begin."""
        size, num_steps = self._latent_size(request), self._num_steps(request)
        seen: list[Tensor] = []
        sizes = [(size[0] // 2, size[1] // 2)]
        for picture in request.images:
            pixels = from_pixels(self._fitted(picture, self.area)).to(self._device)
            latents: Tensor = yield from self._vae.encode_tiled(pixels)
            seen.append(pack(latents[0]).to(self._dtype))
            sizes.append((latents.shape[-2] // 2, latents.shape[-1] // 2))
        noise = PictureNoise(request.seed)
        drawn = pack(noise((self._transformer.in_channels // 4, *size), self._dtype))
        first = drawn.to(self._device)
        sigmas = np.linspace(1.0, 1.0 / num_steps, num_steps)
        mu = shift_by_tokens(self._schedule, len(first))
        return TokenTrajectory(
            latents=first,
            size=size,
            schedule=FlowMatchSchedule(self._schedule, sigmas=sigmas, mu=mu),
            noise=noise,
            templates=tuple(
                DenoisingRow(
                    latents=first,
                    text=own.states,
                    rotations=self._transformer.rotations(len(own.states), sizes),
                    timestep=0.0,
                )
                for own in vectors
            ),
            scale=self._guidance(request),
            guide=guided_with_norm,
            seen=torch.cat(seen),
        )

    def _shown(self, num_pictures: int) -> str:
        return _ONE * num_pictures

    def _fitted(self, picture: Tensor, area: int) -> Tensor:
        """The picture with about that area, and its shape."""
        height, width = fitted(picture.shape[0], picture.shape[1], area)
        return resized(picture, height, width)

    def _latent_size(self, request: PictureRequest) -> tuple[int, int]:
        shape = self._shape_of(request).shape
        height, width = fitted(shape[0], shape[1], self.area)
        height, width = request.height or height, request.width or width
        return latent_size(height, width, self._multiple, unit=2)

    def _shape_of(self, request: PictureRequest) -> Tensor:
        """The picture whose shape a request without a size gets."""
        return request.images[0]


class QwenImageEditPlusPipeline(QwenImageEditPipeline):
    """Qwen-Image-Edit-2509 and -2511: up to a handful of pictures, told apart by numbers."""

    max_pictures = 8
    read_area = 384**2

    def _shown(self, num_pictures: int) -> str:
        return "".join(f"Picture {number + 1}: {_ONE}" for number in range(num_pictures))

    def _shape_of(self, request: PictureRequest) -> Tensor:
        return request.images[-1]


def fitted(height: int, width: int, area: int) -> tuple[int, int]:
    """The sides of a picture of about that area, with the shape of the one that is given.

    Raises InvalidRequest for a picture that is too long for a side of its own."""
    ratio = width / height
    wide = math.sqrt(area * ratio)
    tall = wide / ratio
    found = (round(tall / _SIDES) * _SIDES, round(wide / _SIDES) * _SIDES)
    if min(found) < 1:
        raise InvalidRequest(
            f"a picture has {width}x{height} pixels, which is too long for this model",
            param="image",
        )
    return found

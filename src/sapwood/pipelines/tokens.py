"""What pipelines share whose transformers take tokens: their components, a request's texts, size,
steps and guidance. What a pipeline does otherwise, it overrides."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from sapwood.layers.build import Build
from sapwood.models.dit.rows import DenoisingRow
from sapwood.models.loader.assign import Loadable
from sapwood.pipelines.components import ComponentFolder, Precisions
from sapwood.pipelines.interface import PictureRequest, PromptText, as_pixels
from sapwood.pipelines.pictures import unpack
from sapwood.pipelines.requests import refuse_unused, text_length
from sapwood.pipelines.trajectory import TokenTrajectory, checked_steps, latent_size
from sapwood.schema.painting import PictureDefaults, PipelineTraits


class Transformer(Loadable, Protocol):
    def __call__(self, rows: Sequence[DenoisingRow]) -> list[Tensor]: ...


class Autoencoder(Loadable, Protocol):
    """scale: pixels per latent, in height and in width; tiles: whether it works tile by tile"""

    tiles: bool

    @property
    def scale(self) -> int: ...

    def decode_tiled(self, latents: Tensor) -> Generator[None, None, Tensor]: ...


M = TypeVar("M", bound=Transformer)
V = TypeVar("V", bound=Autoencoder)


class TokenPipeline(Generic[M, V]):
    """The parts of a Pipeline that models with tokens of 2x2 latents have alike.

    default_guidance         guidance_scale of a request that has none
    usual_latents            height and width, in latents, of the pictures that it was trained on
    usual_text, max_text     tokens of a prompt, without a wish and at most
    max_pictures             that a request may bring
    needs_picture            whether it must bring one
    takes_mask               whether the first one needs a mask
    is_guided_from           guidance of more than this takes a second pass
    """

    default_steps: int
    default_guidance: float
    usual_latents = 128
    usual_text, max_text = 512, 512
    max_pictures = 0
    needs_picture = False
    takes_mask = False
    is_guided_from = 1.0

    def __init__(
        self,
        folder: ComponentFolder,
        precisions: Precisions,
        transformer: Callable[[Mapping[str, Any], Build], M],
        vae: Callable[[Mapping[str, Any], Build], V],
    ) -> None:
        self.name = folder.pipeline_class
        self._transformer = folder.load(
            "transformer", transformer, precisions.dit, precisions.dit_scheme
        )
        self._vae = folder.load("vae", vae, precisions.vae)
        self._vae.tiles = precisions.vae_tiling
        self._schedule = folder.config("scheduler")
        self._dtype, self._device = precisions.dit, folder.device

    @property
    def traits(self) -> PipelineTraits:
        """As Pipeline.traits."""
        return PipelineTraits(
            defaults=PictureDefaults(
                width=self._usual_side,
                height=self._usual_side,
                num_inference_steps=self.default_steps,
                guidance_scale=self._told_guidance(),
            ),
            size_multiple=self._multiple,
            max_input_pictures=self.max_pictures,
            needs_picture=self.needs_picture or self.takes_mask,
            takes_mask=self.takes_mask,
            draws_over_picture=self.takes_mask,
        )

    def texts(self, request: PictureRequest) -> tuple[PromptText, ...]:
        """As Pipeline.texts."""
        passes = 2 if self._is_guided(request) else 1
        refuse_unused(
            request,
            self.name,
            passes=passes,
            max_pictures=self.max_pictures,
            takes_mask=self.takes_mask,
            takes_strength=self.takes_mask,
        )
        length = text_length(request, self.usual_text, self.max_text)
        found = [PromptText(request.prompt, length)]
        if passes == 2:
            found.append(PromptText(request.negative_prompt or "", length, "negative"))
        return tuple(found)

    def predict(self, rows: Sequence[DenoisingRow]) -> list[Tensor]:
        """As Pipeline.predict."""
        return self._transformer(rows)

    def finish(self, trajectory: TokenTrajectory) -> Generator[None, None, Tensor]:
        """As Pipeline.finish."""
        latents = unpack(trajectory.latents, trajectory.size)[None]
        picture = yield from self._vae.decode_tiled(latents)
        return as_pixels(picture[0])

    @property
    def _multiple(self) -> int:
        """Pixels by which a picture's sides grow."""
        return 2 * self._vae.scale

    @property
    def _usual_side(self) -> int:
        return self.usual_latents * self._vae.scale

    def _told_guidance(self) -> float | None:
        return self.default_guidance

    def _guidance(self, request: PictureRequest) -> float:
        if request.guidance_scale is None:
            return self.default_guidance
        return request.guidance_scale

    def _is_guided(self, request: PictureRequest) -> bool:
        """Whether a step has a second pass."""
        return self._guidance(request) > self.is_guided_from

    def _latent_size(self, request: PictureRequest) -> tuple[int, int]:
        height, width = request.height or self._usual_side, request.width or self._usual_side
        return latent_size(height, width, self._multiple, unit=2)

    def _num_steps(self, request: PictureRequest) -> int:
        steps = request.num_inference_steps
        return checked_steps(self.default_steps if steps is None else steps)


def padded_ids(tokenizer: Any, text: str, length: int, device: torch.device) -> Tensor:
    """[1, length] int64: a text that is filled up, or cut off"""
    found: Tensor = tokenizer(
        text, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
    return found.to(device)

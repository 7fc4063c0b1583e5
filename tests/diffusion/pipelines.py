"""A pipeline of numbers: what it draws tells how it was driven."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sapwood.base.errors import InvalidRequest
from sapwood.pipelines.interface import PictureRequest, PromptText, PromptVectors
from sapwood.schema.painting import PictureDefaults, PipelineTraits


@dataclass(eq=False)
class CountingTrajectory:
    """Each step adds the prompt's number; so the picture is noise + steps * number."""

    request: PictureRequest
    latents: Tensor
    numbers: tuple[Tensor, ...]
    num_steps: int
    num_tokens: int
    num_done: int = 0

    def rows(self) -> list[Tensor]:
        return list(self.numbers)

    def advance(self, predictions: Sequence[Tensor]) -> None:
        self.latents = self.latents + predictions[0]
        self.num_done += 1


class CountingPipeline:
    """Draws pictures of one level. The prompt "refuse" is refused, "break" breaks in a step."""

    name = "CountingPipeline"

    def __init__(self, *, tiles: int = 3) -> None:
        self.tiles = tiles
        self.encoded: list[str] = []
        self.batches: list[int] = []
        self.pieces: list[int] = []

    @property
    def traits(self) -> PipelineTraits:
        defaults = PictureDefaults(width=16, height=16, num_inference_steps=4)
        return PipelineTraits(defaults=defaults, size_multiple=8)

    def texts(self, request: PictureRequest) -> tuple[PromptText, ...]:
        if request.prompt == "refuse":
            raise InvalidRequest("this prompt is refused", param="prompt")
        texts = (PromptText(request.prompt, 8),)
        if request.negative_prompt is not None:
            texts += (PromptText(request.negative_prompt, 8, "negative"),)
        return texts

    def encode(self, text: PromptText) -> PromptVectors:
        self.encoded.append(text.text)
        return PromptVectors(torch.full((8,), float(len(text.text))))

    def begin(
        self, request: PictureRequest, vectors: Sequence[PromptVectors]
    ) -> Generator[None, None, CountingTrajectory]:
        yield
        if request.prompt == "stumble":
            raise IndexError("a bug in one picture's work")
        height, width = request.height or 16, request.width or 16
        return CountingTrajectory(
            request=request,
            latents=torch.tensor(float(request.seed)),
            numbers=tuple(own.states[0] for own in vectors),
            num_steps=request.num_inference_steps or 4,
            num_tokens=height * width // 64 * len(vectors),
        )

    def predict(self, rows: Sequence[Any]) -> list[Tensor]:
        self.batches.append(len(rows))
        if any(float(row) == len("break") for row in rows):
            raise RuntimeError("a bug of ours")
        return list(rows)

    def finish(self, trajectory: Any) -> Generator[None, None, Tensor]:
        for tile in range(self.tiles):
            self.pieces.append(tile)
            yield
        request = trajectory.request
        shape = (request.height or 16, request.width or 16, 3)
        return torch.full(shape, int(trajectory.latents) % 256, dtype=torch.uint8)

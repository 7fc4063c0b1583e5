"""The state of one picture, for pipelines whose transformers take tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sapwood.base.errors import InvalidRequest
from sapwood.models.dit.rows import DenoisingRow
from sapwood.models.dit.unet import PictureRow
from sapwood.pipelines.interface import Schedule

Guide = Callable[[Tensor, Tensor, float], Tensor]
"""(prediction with the prompt, without it, scale) -> what the step is taken with"""


def guided(positive: Tensor, negative: Tensor, scale: float) -> Tensor:
    """Ho and Salimans 2022, arXiv:2207.12598."""
    return negative + scale * (positive - negative)


def guided_with_norm(positive: Tensor, negative: Tensor, scale: float) -> Tensor:
    """The same, whose tokens [S, channels] keep the length of those of the prompt's prediction."""
    mixed = guided(positive, negative, scale)
    wanted: Tensor = torch.linalg.vector_norm(positive, dim=-1, keepdim=True)
    found: Tensor = torch.linalg.vector_norm(mixed, dim=-1, keepdim=True)
    return mixed * (wanted / found)


class PictureNoise:
    """All noise of one picture, in the order in which diffusers draws it: on the CPU."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator("cpu").manual_seed(seed)

    def __call__(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.randn(tuple(shape), generator=self.generator, dtype=dtype)


@dataclass(slots=True, kw_only=True, eq=False)
class TokenTrajectory:
    """Latents [S, channels] of one picture.

    size       height and width of the latents, before they are packed into tokens
    templates  the rows of a step, without latents and timestep: with the prompt, and perhaps
               without it
    seen       [N, channels]: tokens of pictures to look at, after those of the latents; or None
    beside     [S, more channels]: what each token is given besides; or None
    guide      joins the predictions of two rows
    """

    latents: Tensor
    size: tuple[int, int]
    schedule: Schedule
    noise: PictureNoise
    templates: tuple[DenoisingRow, ...]
    scale: float = 1.0
    guide: Guide = guided
    seen: Tensor | None = None
    beside: Tensor | None = None
    kept: Kept | None = None
    num_done: int = 0

    @property
    def num_steps(self) -> int:
        return len(self.schedule.timesteps)

    @property
    def num_tokens(self) -> int:
        seen = 0 if self.seen is None else len(self.seen)
        return sum(len(row.text) + len(self.latents) + seen for row in self.templates)

    def rows(self) -> list[DenoisingRow]:
        """As Trajectory.rows."""
        latents = self.schedule.scaled(self.latents, self.num_done)
        if self.beside is not None:
            latents = torch.cat((latents, self.beside), dim=-1)
        if self.seen is not None:
            latents = torch.cat((latents, self.seen))
        timestep = self.schedule.timesteps[self.num_done]
        return [
            replace(row, latents=latents, timestep=timestep, num_wanted=len(self.latents))
            for row in self.templates
        ]

    def advance(self, predictions: Sequence[Tensor]) -> None:
        """As Trajectory.advance."""
        prediction = predictions[0].to(self.latents.dtype)
        if len(predictions) == 2:
            other = predictions[1].to(self.latents.dtype)
            prediction = self.guide(prediction, other, self.scale)
        self.latents = self.schedule.step(self.latents, prediction, self.num_done, self._draw)
        self.num_done += 1
        if self.kept is not None:
            self.latents = self.kept.restored(self.latents, self.schedule, self.num_done)

    def _draw(self, like: Tensor) -> Tensor:
        return self.noise(like.shape, like.dtype).to(like.device)


@dataclass(slots=True, kw_only=True, eq=False)
class PictureTrajectory:
    """Latents [channels, h, w] of one picture.

    templates  the rows of a step, without latents and timestep: with the prompt, and perhaps
               without it
    """

    latents: Tensor
    schedule: Schedule
    noise: PictureNoise
    templates: tuple[PictureRow, ...]
    dtype: torch.dtype
    scale: float = 1.0
    num_done: int = 0

    @property
    def num_steps(self) -> int:
        return len(self.schedule.timesteps)

    @property
    def num_tokens(self) -> int:
        return sum(row.num_tokens for row in self.templates)

    def rows(self) -> list[PictureRow]:
        """As Trajectory.rows."""
        latents = self.schedule.scaled(self.latents, self.num_done).to(self.dtype)
        timestep = self.schedule.timesteps[self.num_done]
        return [replace(row, latents=latents, timestep=timestep) for row in self.templates]

    def advance(self, predictions: Sequence[Tensor]) -> None:
        """As Trajectory.advance."""
        prediction = predictions[0].to(self.latents.dtype)
        if len(predictions) == 2:
            prediction = guided(prediction, predictions[1].to(self.latents.dtype), self.scale)
        self.latents = self.schedule.step(self.latents, prediction, self.num_done, self._draw)
        self.num_done += 1

    def _draw(self, like: Tensor) -> Tensor:
        return self.noise(like.shape, like.dtype).to(like.device)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Kept:
    """The part of a picture that stays as it was.

    finished  its latents, like those of the trajectory
    noise     that they get before a step
    mask      1 where the picture is drawn anew, 0 where it stays
    """

    finished: Tensor
    noise: Tensor
    mask: Tensor

    def restored(self, latents: Tensor, schedule: Schedule, num_done: int) -> Tensor:
        old = self.finished
        if num_done < len(schedule.timesteps):
            old = schedule.noised(old, self.noise, num_done)
        return (1.0 - self.mask) * old + self.mask * latents


def checked_steps(num_steps: int) -> int:
    if num_steps < 1:
        raise InvalidRequest(
            f"num_inference_steps must be >= 1, got {num_steps}", param="num_inference_steps"
        )
    return num_steps


def latent_size(height: int, width: int, multiple: int, *, unit: int) -> tuple[int, int]:
    """Height and width in latents, of the largest picture not larger than asked for.

    multiple  pixels by which a picture's sides can grow
    unit      latents by which they grow then
    Raises    InvalidRequest for a picture without a pixel
    """
    found = (unit * (height // multiple), unit * (width // multiple))
    if min(found) < 1:
        raise InvalidRequest(
            f"a picture of {width}x{height} pixels is too small for this model: its sides must be "
            f"at least {multiple} pixels",
            param="size",
        )
    return found
